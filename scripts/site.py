"""Build the site of the documentation: `scripts/site.py FOLDER`. A warning of MkDocs is an error.

The pages stay plain Markdown that reads well in a repository. Here they are laid out as in the repository, so that
their links hold; a link to what is no page becomes its text; an op's page gets a picture of it, drawn from its spec.
"""

import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

from polyfuse.spec import OPS, OpSpec

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build/pages"
API = {
    "Ops": "polyfuse.dispatch",
    "Transformers models": "polyfuse.integrations.transformers",
    "Runtime": "polyfuse.runtime",
    "Fusion pass": "polyfuse.runtime.fusion",
    "Names of vLLM": "polyfuse.compat.vllm",
    "Names of SGLang": "polyfuse.compat.sglang",
}
CSS = """
.md-typeset table:not([class]) { display: block; overflow-x: auto; }
.md-typeset code { overflow-wrap: anywhere; }
.md-typeset img { max-width: 100%; background: #fff; }
"""
ROW, WIDTH = 44, 760


def lay_out() -> None:
    """Write the pages, the pictures and the configuration into build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")]
    pictures = [*ROOT.glob("benchmarks/plots/*.svg")]
    notebooks = [*ROOT.glob("examples/*.ipynb")]
    kept = {path.resolve() for path in (*pages, *pictures, *notebooks)}
    for page in pages:
        target = PAGES / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_linked(page, kept), encoding="utf-8")
    for picture in pictures:
        target = PAGES / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    for notebook in notebooks:
        # MkDocs does not see the links in a notebook: they lead from the page's own folder to that of another page.
        text = re.sub(r"\]\((\.\./[\w/]+)\.md\)", r"](../\1/)", notebook.read_text(encoding="utf-8"))
        (PAGES / notebook.relative_to(ROOT)).write_text(text, encoding="utf-8")
    for name, spec in OPS.items():
        page = PAGES / f"docs/ops/{name}.md"
        page.with_suffix(".svg").write_text(picture_of(spec), encoding="utf-8")
        alternative = f"What {name} reads and writes"
        text = page.read_text(encoding="utf-8")
        text = f"---\nsearch:\n  boost: 8\n---\n\n{text}"  # who looks for an op finds its page first
        page.write_text(text.replace("\n```text", f"\n![{alternative}]({name}.svg)\n\n```text", 1), encoding="utf-8")
    (PAGES / "site.css").write_text(CSS)
    sections = [f"## {title}\n\n::: {module}\n    options:\n      heading_level: 3" for title, module in API.items()]
    (PAGES / "docs/api.md").write_text("# API\n\n" + "\n\n".join(sections) + "\n")


def _linked(page: Path, kept: set[Path]) -> str:
    """A page's text, without the links that lead to no page or picture of the site."""

    def link(match: re.Match[str]) -> str:
        path = match[2].partition("#")[0]
        outside = re.match(r"https?://", path)
        return match[0] if outside or not path or (page.parent / path).resolve() in kept else match[1]

    return re.sub(r"(?<!!)\[([^\[\]]+)\]\(([^)\s]+)\)", link, page.read_text(encoding="utf-8"))


def picture_of(spec: OpSpec) -> str:
    """An op as an SVG: what it reads on the left, the one op, what it writes on the right."""
    inputs = [(t.name + (" (optional)" if t.optional else ""), t.shapes[0]) for t in spec.tensors]
    outputs = [(o.name, o.shape) for o in spec.outputs] + [(f"{name} (in place)", ()) for name in spec.updated]
    height = 24 + ROW * max(len(inputs), len(outputs))
    middle = height / 2
    parts = [_box(300, middle - 24, 160, 48, spec.name, "", "#3f51b5", "#fff")]
    for x, rows in ((12, inputs), (508, outputs)):
        top = middle - ROW * len(rows) / 2
        for i, (name, shape) in enumerate(rows):
            y = top + ROW * i + 4
            dims = f"[{', '.join(shape)}]" if shape else ""
            dims = dims if len(dims) <= 38 else dims[:36] + " ..."
            parts.append(_box(x, y, 240, ROW - 8, name, dims, "#e8eaf6", "#1a1a1a"))
            ends = (252, y + 18, 300, middle) if x == 12 else (460, middle, 508, y + 18)
            parts.append('<path d="M{} {}L{} {}" stroke="#5c6bc0" stroke-width="1.5"/>'.format(*ends))
    body = "".join(parts)
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{body}</svg>\n'


def _box(x: float, y: float, width: float, height: float, name: str, below: str, fill: str, ink: str) -> str:
    centre = x + width / 2
    first = y + height / 2 + (-3 if below else 4)
    lines = f'<text x="{centre}" y="{first}" font-size="12" fill="{ink}" text-anchor="middle">{escape(name)}</text>'
    if below:
        place = f'x="{centre}" y="{first + 14}"'
        lines += f'<text {place} font-size="10" fill="{ink}" text-anchor="middle">{escape(below)}</text>'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}"/>{lines}'


def main(folder: str) -> None:
    lay_out()
    ops = "\n".join(f"      - {name}: docs/ops/{name}.md" for name in OPS)
    settings = (ROOT / "mkdocs.yml").read_text().replace("  - Ops: OPS", f"  - Ops:\n{ops}")
    configured = ROOT / "build/mkdocs.yml"
    configured.write_text(settings.replace("build/", "").replace("paths: [src]", "paths: [../src]"))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(configured)]
    sys.exit(subprocess.run([*command, "--site-dir", str(Path(folder).resolve())], cwd=ROOT).returncode)


if __name__ == "__main__":
    main(sys.argv[1])
