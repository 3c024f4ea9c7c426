"""`python -m polyfuse` is `polyfuse`."""

from polyfuse.cli import main

main(prog_name="polyfuse")
