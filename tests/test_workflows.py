"""The workflows of the project call commands that there are."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from polyfuse.cli import main

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def commands(workflow: Path) -> Iterator[str]:
    """Every line of every step that is run."""
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


def parse(group: click.Group, words: list[str], parent: click.Context | None = None) -> str:
    """The command that the words call, its options parsed and nothing run. Raises `click.UsageError`."""
    context = group.make_context(group.name, list(words), parent)
    words = [*context._protected_args, *context.args]
    if not words and group.invoke_without_command:
        return context.command_path
    name, command, rest = group.resolve_command(context, words)
    assert command is not None
    assert name is not None
    if isinstance(command, click.Group):
        return parse(command, rest, context)
    command.make_context(name, rest, context)
    return name


POLYFUSE = [line for workflow in WORKFLOWS for line in commands(workflow) if "polyfuse " in line and "pip" not in line]


@pytest.mark.parametrize("line", POLYFUSE)
def test_a_workflow_calls_a_command_with_its_options(line: str) -> None:
    assert parse(main, shlex.split(line.partition("polyfuse ")[2]))


def test_there_are_such_lines_and_a_wrong_one_is_found() -> None:
    assert len(POLYFUSE) >= 3
    with pytest.raises(click.UsageError):
        parse(main, ["conformance", "--levle", "quick"])


def test_what_make_is_asked_for_is_a_target() -> None:
    targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    asked = [line.split()[1] for workflow in WORKFLOWS for line in commands(workflow) if line.startswith("make ")]
    assert asked
    assert set(asked) <= targets
