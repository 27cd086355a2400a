"""`python -m compress_uq_cli`."""

from compress_uq_cli.main import run

run()
