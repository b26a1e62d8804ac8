"""The commands of `diffmas` as functions; `diffmas.cli.main` makes a command line of them."""
