"""`python -m fkernel` is the command `fkernel`."""

from fkernel.cli import app

app(prog_name="fkernel")
