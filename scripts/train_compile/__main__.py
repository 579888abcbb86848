from maxtext.compile import cli

cli()
