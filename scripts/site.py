"""Build the site of the documentation: `scripts/site.py FOLDER`. A warning of MkDocs is an error.

The pages stay plain Markdown that reads well in a repository. Here they are laid out as in the repository, so that
their links hold. A script of the examples becomes a page, any other file that a page links to is copied, and a link to
a folder becomes its text.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from polyfuse.spec import OPS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build/pages"
# Of `polyfuse.dispatch` what a user of the ops or the author of a backend meets; the rest is the path of a call.
CHOICE = ["use_backend", "explain", "call_counts", "refresh", "Explanation", "Candidate", "Preference"]
CHOICE += ["Backend", "Device", "Support"]
API = {
    "Choice of a backend": f"polyfuse.dispatch\n    options:\n      members: {CHOICE}",
    "Transformers models": "polyfuse.integrations.transformers",
    "Runtime": "polyfuse.runtime",
    "Fusion pass": "polyfuse.runtime.fusion",
    "Compile ahead": "polyfuse.bench.warmup\n    options:\n      members: [warmup, Warmup, Kernel]",
    "Names of vLLM": "polyfuse.compat.vllm",
    "Names of SGLang": "polyfuse.compat.sglang",
}
CSS = """
.md-grid { max-width: 76rem; } /* 120 columns of code */
.md-typeset pre > code { font-size: .75em; }
.md-typeset table:not([class]) { display: block; overflow-x: auto; }
.md-typeset code { overflow-wrap: anywhere; }
.md-typeset img { max-width: 100%; }
"""


def lay_out() -> None:
    """Write the pages, the pictures and the configuration into build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]
    pages += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")]
    files = {*ROOT.glob("benchmarks/plots/*.svg"), *ROOT.glob("docs/**/*.svg"), *ROOT.glob("docs/**/*.png")}
    notebooks = [*ROOT.glob("examples/*.ipynb")]
    for page in pages:
        target = PAGES / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        text, linked = _linked(page)
        target.write_text(text, encoding="utf-8")
        files |= linked.difference(pages, notebooks)
    for path in files:
        target = PAGES / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for script in scripts():
        text = f"# {script.name}\n\n```python\n{script.read_text(encoding='utf-8')}```\n"
        (PAGES / script.relative_to(ROOT)).with_suffix(".md").write_text(text, encoding="utf-8")
    for notebook in notebooks:
        # MkDocs does not see the links in a notebook: they lead from the page's own folder to that of another page.
        text = re.sub(r"\]\((\.\./[\w/]+)\.md\)", r"](../\1/)", notebook.read_text(encoding="utf-8"))
        (PAGES / notebook.relative_to(ROOT)).write_text(text, encoding="utf-8")
    for name in OPS:  # who looks for an op finds its page first, as wide as its definition
        page = PAGES / f"docs/ops/{name}.md"
        text = page.read_text(encoding="utf-8")
        page.write_text(f"---\nsearch:\n  boost: 8\nhide: [toc]\n---\n\n{text}", encoding="utf-8")
    (PAGES / "site.css").write_text(CSS)
    ops = ", ".join(f"[`{name}`](ops/{name}.md)" for name in OPS)
    names = ", ".join(f"`{name}`" for name in ("use_backend", "explain", "call_counts", "refresh"))
    parts = [f"# API\n\nEach op has a page: {ops}. What a call can raise: [errors](errors.md)."]
    parts += [f"{names} and `warmup` are also names of `polyfuse`."]
    parts += [f"## {title}\n\n::: {module}" for title, module in API.items()]
    (PAGES / "docs/api.md").write_text("\n\n".join(parts) + "\n")


def scripts() -> list[Path]:
    """The scripts of the examples, each of which is a page."""
    return sorted(ROOT.glob("examples/*.py"))


def _linked(page: Path) -> tuple[str, set[Path]]:
    """A page's text as the site has it, without links to folders, and the files that it links to but for scripts."""
    files: set[Path] = set()

    def link(match: re.Match[str]) -> str:
        path = match[2].partition("#")[0]
        if not path or re.match(r"https?://", path):
            return match[0]
        target = (page.parent / path).resolve()
        if target in scripts():
            return f"[{match[1]}]({path.removesuffix('.py')}.md)"
        if not target.is_file():
            return match[1]
        files.add(target)
        return match[0]

    # What stands in a fence is code: `linears["gate"](x)` is no link.
    parts = re.split(r"(^```.*?^```$)", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(r"(?<!!)\[([^\[\]]+)\]\(([^)\s]+)\)", link, part) for part in parts[::2]]
    return "".join(parts), files


def main(folder: str) -> None:
    lay_out()
    ops = "\n".join(f"      - {name}: docs/ops/{name}.md" for name in OPS)
    examples = "\n".join(f"      - {path.name}: examples/{path.stem}.md" for path in scripts())
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = settings.replace("  - Ops: OPS", f"  - Ops:\n{ops}").replace("      - SCRIPTS", examples)
    configured = ROOT / "build/mkdocs.yml"
    configured.write_text(settings.replace("build/", "").replace("paths: [src]", "paths: [../src]"))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(configured)]
    sys.exit(subprocess.run([*command, "--site-dir", str(Path(folder).resolve())], cwd=ROOT).returncode)


if __name__ == "__main__":
    main(sys.argv[1])
