"""`polyfuse`: the command line. A command is a module of this package that defines `command`; no list names it."""

import click

import polyfuse
from polyfuse.cli._group import ModuleGroup


@click.group(
    cls=ModuleGroup,
    package=__name__,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(polyfuse.__version__, prog_name="polyfuse")
def main() -> None:
    """Fused ops for vision-language and hybrid-attention models, one spec and many backends.

    \b
    Example:
      polyfuse info
    """
