"""A group of commands whose commands are the modules of a package."""

import importlib
import pkgutil
from typing import Any

import click

from polyfuse.spec import BackendError, SpecError, Unsupported, how_to_install


class Group(click.Group):
    """A click group whose help lists each command with its whole first sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        commands = [(name, command) for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=1000)) for name, command in commands])


class ModuleGroup(Group):
    """A click group that finds its commands in a package: a new command is a new module, and no list to edit.

    Every module whose name does not begin with `_` defines `command`, a click command or, in a nested package, a group.
    It is named after the module, with `-` for `_`. A module is imported when its command is invoked or listed, so what
    takes long to import is imported inside of the command. The library's own errors become one line on stderr and exit
    status 2.
    """

    def __init__(self, *args: Any, package: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, sorted; imports none of them."""
        return sorted(self._modules())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None if there is none."""
        module = self._modules().get(cmd_name)
        if module is None:
            return None
        command: click.Command = importlib.import_module(f"{self.package}.{module}").command
        command.name = cmd_name
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command that is asked for. Raises `click.UsageError` for the library's own errors."""
        try:
            return super().invoke(ctx)
        except (SpecError, Unsupported, BackendError) as error:
            raise click.UsageError(str(error)) from error
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "polyfuse":
                raise  # a mistake of ours: no package is missing
            raise click.UsageError(how_to_install(error.name)) from error

    def _modules(self) -> dict[str, str]:
        """The name of every command to the name of its module."""
        found = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return {module.name.replace("_", "-"): module.name for module in found if not module.name.startswith("_")}
