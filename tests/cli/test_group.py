"""The command line's groups: a command is a file, and it is imported when it is needed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import polyfuse.cli
from polyfuse.cli import main
from polyfuse.cli._group import ModuleGroup

COMMAND = """
import click
@click.command()
def command():
    \"\"\"Say {name}.\"\"\"
    click.echo("this is {name}")
"""
NESTED = """
import click
from polyfuse.cli._group import ModuleGroup
@click.group(cls=ModuleGroup, package=__name__)
def command():
    \"\"\"Say more.\"\"\"
"""
FAILING = """
import click
from polyfuse.spec import SpecError
@click.command()
def command():
    raise SpecError("failing: x: expected 1, got 2")
"""


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A group over a package of three commands, a nested package of one, and two modules that are none."""
    files = {
        "__init__.py": "",
        "say_hello.py": COMMAND.format(name="hello"),
        "broken.py": "import a_module_that_is_not_there",
        "failing.py": FAILING,
        "_helper.py": "raise AssertionError",
        "more/__init__.py": NESTED,
        "more/say_bye.py": COMMAND.format(name="bye"),
    }
    for name, text in files.items():
        path = tmp_path / "commands" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield ModuleGroup(package="commands")
    for name in [name for name in sys.modules if name.split(".")[0] == "commands"]:
        del sys.modules[name]


def invoke(group, *args):
    return CliRunner().invoke(group, list(args), prog_name="tool")


def test_a_command_is_a_module_and_imported_alone(group):
    result = invoke(group, "say-hello")
    assert (result.exit_code, result.output) == (0, "this is hello\n")
    assert {name for name in sys.modules if name.startswith("commands")} == {"commands", "commands.say_hello"}


def test_a_command_is_named_after_its_module(group):
    assert "Usage: tool say-hello [OPTIONS]" in invoke(group, "say-hello", "--help").output
    assert "No such command 'say_hello'" in invoke(group, "say_hello").output
    for hidden in ("helper", "_helper"):
        assert f"No such command '{hidden}'" in invoke(group, hidden).output


def test_a_nested_package_is_a_group(group):
    assert invoke(group, "more", "say-bye").output == "this is bye\n"
    listing = invoke(group, "more", "--help").output
    assert "Usage: tool more [OPTIONS] COMMAND [ARGS]..." in listing
    assert "say-bye  Say bye." in listing


def test_the_librarys_errors_are_usage_errors(group):
    failing, broken = invoke(group, "failing"), invoke(group, "broken")
    assert (failing.exit_code, failing.output) == (2, "Error: failing: x: expected 1, got 2\n")
    assert broken.exit_code == 2
    assert broken.output == ("Error: a_module_that_is_not_there is not installed\n")


def test_every_module_is_a_command():
    folder = Path(polyfuse.cli.__file__).parent
    modules = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    expected = {path.stem.replace("_", "-") for path in modules if not path.name.startswith("_")}
    listing = invoke(main, "--help").output.split("Commands:\n")[1]
    assert set(re.findall(r"^  (\S+)", listing, re.MULTILINE)) == expected
    assert "..." not in listing, "each command stands with its whole first sentence"
    assert {"bench", "demo", "new-backend", "soak"} <= expected


@pytest.mark.parametrize("args", [["--help"], ["bench", "--help"], ["soak", "encoder", "--help"]])
def test_help_imports_no_framework(args):
    code = f"""
import sys
from polyfuse.cli import main
main({args!r}, standalone_mode=False)
print({{"torch", "numpy", "jax", "transformers", "jinja2"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
