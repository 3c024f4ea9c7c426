"""Everything in the documentation that can run does run, and what it prints is what the page shows.

A page's Python blocks are executed in order in one namespace, the `polyfuse` commands of its console blocks are run,
and its YAML blocks are read as a polyfuse.yaml. A text block right after Python is what it prints, as are the lines
after a command; `...` stands for anything.

A block under the comment `<!-- not run: WHY -->` is not run: its Python must parse, and its `polyfuse` commands must
exist with their options. The test that checks it has WHY in its name.
"""

import ast
import contextlib
import doctest
import io
import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from torch._dynamo.utils import counters

import polyfuse
from polyfuse.cli import main
from polyfuse.configs import model_configs, user_config
from polyfuse.spec import OPS

# What Inductor imports warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES += [ROOT / "examples/README.md", *sorted(ROOT.glob("examples/*/README.md"))]
# The blocks of this page are files: its own test adds them to a copy of the tree.
OTHERS = ROOT / "docs/adding_an_op.md"
LANGUAGES = {"python", "console", "shell", "yaml", "text"}
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and why it is not run or an empty text."""

    page: Path
    line: int
    language: str
    text: str
    why_not: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"

    def commands(self) -> Iterator[tuple[dict[str, str], list[str], str]]:
        """The environment, the words and the output of each command of a console or shell block."""
        prompt = "$ " if self.language == "console" else ""
        blocks = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:] if prompt else self.text.splitlines()
        for block in blocks:
            line, _, output = block.partition("\n")
            words = shlex.split(line, comments=True)
            environment = {}
            while words and "=" in words[0]:
                name, _, environment[name] = words.pop(0).partition("=")
            yield environment, words, output


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        marker = NOT_RUN.fullmatch(lines[opened - 1]) if opened else None
        text = "\n".join(lines[opened + 1 : number]) + "\n"
        found.append(Block(page, opened + 1, lines[opened][3:], text, marker[1] if marker else ""))
        opened = None
    assert opened is None, f"{page}:{opened}: this fence is not closed"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def arguments(words: list[str]) -> list[str] | None:
    """What a command passes to `polyfuse`, also as `python -m polyfuse`; None for another command."""
    if words[:1] == ["polyfuse"]:
        return words[1:]
    for i, pair in enumerate(pairwise(words)):
        if pair == ("-m", "polyfuse"):
            return words[i + 2 :]
    return None


def same(block: Block, shown: str, printed: str) -> None:
    checker = doctest.OutputChecker()
    if not checker.check_output(shown, printed, SAME):
        pytest.fail(f"{block} shows\n{shown}\nand not\n{printed}", pytrace=False)


EVERY = [block for page in PAGES if page != OTHERS for block in blocks(page)]
WITH_PYTHON = list(dict.fromkeys(block.page for block in EVERY if block.language == "python"))


def id_of(value: Any) -> str:
    return f"{value}-{value.why_not}" if isinstance(value, Block) and value.why_not else str(value)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run in, with the settings and counts of a new process, before and after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    counters.clear()  # of graphs compiled before
    polyfuse.refresh()
    yield tmp_path
    polyfuse.refresh()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python(page: Path, elsewhere: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    last, printed = None, ""
    for block in blocks(page):
        if block.language == "python" and not block.why_not:
            out = io.StringIO()
            code = compile("\n" * block.line + block.text, name(page), "exec")
            with contextlib.redirect_stdout(out):
                exec(code, names)
            last, printed = block, out.getvalue()
            continue
        if block.language == "text" and last is not None:
            same(block, block.text, printed)
        last = None


@pytest.mark.parametrize("block", [b for b in EVERY if b.language == "console" and not b.why_not], ids=id_of)
def test_console(block: Block, elsewhere: Path) -> None:
    for environment, words, output in block.commands():
        given = arguments(words)
        assert given is not None, f"{block}: not a polyfuse command: {words}; mark the block as not run, and say why"
        result = CliRunner().invoke(main, given, env=environment)
        assert result.exit_code == 0, f"{block}: {words}: {result.output}"
        if output.strip():
            same(block, output, result.output)
        polyfuse.refresh()


@pytest.mark.parametrize("block", [b for b in EVERY if b.language == "yaml" and not b.why_not], ids=id_of)
def test_yaml_is_a_config_file(block: Block, elsewhere: Path) -> None:
    (elsewhere / "polyfuse.yaml").write_text(block.text)
    read = user_config()
    assert read is not None
    assert read[0].model_fields_set, f"{block}: sets nothing"


@pytest.mark.parametrize("block", [b for b in EVERY if b.why_not], ids=id_of)
def test_a_block_that_is_not_run_could_be(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "python":
        ast.parse(block.text)
    if block.language not in ("console", "shell"):
        return
    called: list[str] = []
    # A group's own function and that of every command end here, with their arguments parsed.
    monkeypatch.setattr(click.Command, "invoke", lambda command, ctx: called.append(str(command.name)))
    monkeypatch.chdir(ROOT)
    for _, words, _ in block.commands():
        given = arguments(words)
        if given is not None:
            called.clear()
            result = CliRunner().invoke(main, given)
            assert result.exit_code == 0, f"{block}: {words}: {result.output}"
            assert called, f"{block}: {words}: no command"


@pytest.mark.parametrize("page", [page for page in PAGES if page != OTHERS], ids=name)
def test_code_is_fenced_and_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: {block.language!r}"
        assert block.language != "shell" or block.why_not, f"{block}: say why it is not run"
    assert not re.findall(r"(?<=\n\n) {4}\S.*", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT), target
        assert there.exists(), f"{name(page)}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{name(page)}: {target}: {sorted(anchors(there))}"


OF_EXAMPLES = re.compile("mychip|rms_norm")  # what a page adds to the repository as an example


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_and_files_that_the_text_speaks_of_exist(page: Path) -> None:
    quoted = [text for text in re.findall(r"`([^`\n]+)`", prose(page)) if not OF_EXAMPLES.search(text)]
    dotted = [match[0] for text in quoted if (match := re.match(r"polyfuse(\.\w+)+", text))]
    for known in (text for text in dotted if text not in ("polyfuse.yaml", "polyfuse.backends")):
        assert pkgutil.resolve_name(known) is not None
    for path in quoted:
        if re.fullmatch(r"(src|tests|docs|configs|benchmarks|examples|spec|conformance)/[\w/.-]*", path):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{name(page)}: {path}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    words = prose(ROOT / "README.md").split()
    assert len(words) <= 600
    assert len((ROOT / "README.md").read_text().split()) <= 660, "with its code"


def test_the_readme_has_no_numbers_of_its_own() -> None:
    text = re.sub(r"\*Device time.*?\*$", "", prose(ROOT / "README.md"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\(\S+\)", "]", text)
    assert set(re.findall(r"(?<![\w.-])\d[\w.,]*", text)) == {"3.11"}


def test_the_readme_lists_every_op_that_models_have() -> None:
    listed = re.findall(r"^\| \[`(\w+)`\]\(docs/ops/(\w+)\.md\)", prose(ROOT / "README.md"), flags=re.MULTILINE)
    assert all(op == page for op, page in listed)
    in_models = {op for model in model_configs().values() for op in model.ops}
    assert in_models <= {op for op, _ in listed} <= set(OPS)


def test_every_page_can_be_found_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = re.findall(r"\]\(([^)\s#]+)", prose(page))
        todo += [(page.parent / target).resolve() for target in targets if not target.startswith("http")]
    written = {page for page in PAGES if page.parent.name != "ops"}
    assert written <= seen, written - seen


def test_a_page_is_read_as_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("""<!-- not run: a reason -->
```console
$ A=1 polyfuse info --x  # a remark
out
$ torchrun -m polyfuse ops
```
# A `title`, in two

```python
1
```
""")
    first, second = blocks(page)
    assert (first.line, first.language, first.why_not) == (2, "console", "a reason")
    assert list(first.commands()) == [
        ({"A": "1"}, ["polyfuse", "info", "--x"], "out\n"),
        ({}, ["torchrun", "-m", "polyfuse", "ops"], ""),
    ]
    assert [arguments(words) for _, words, _ in first.commands()] == [["info", "--x"], ["ops"]]
    assert (second.text, second.why_not) == ("1\n", "")
    assert anchors(page) == {"a-title-in-two"}
    with pytest.raises(pytest.fail.Exception, match="shows\nb"):
        same(second, "b", "a")
    same(second, "a\n...\nc", "a\nb\nc\n")
