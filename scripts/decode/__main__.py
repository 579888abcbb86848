from maxtext.decode import cli

cli()
