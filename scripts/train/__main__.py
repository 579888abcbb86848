from maxtext.train import cli

cli()
