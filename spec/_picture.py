"""The picture of an op, as SVG: its steps in one box, what each reads from memory, and what each writes there."""

import textwrap
from html import escape

from polyfuse.spec._types import OpSpec, Step

# Pixels. Narrow, with large text, so that it reads on a phone, where it fills the width.
WIDTH, MARGIN = 440, 12
BOX, BOX_WIDTH = 134, 172  # the left edge of the box of all steps
LINE, ROW, HEAD = 15, 18, 44
STYLE = """<style>
  text { font: 11px sans-serif; fill: #1f2328 } .name { font: 11px monospace } .op { font: bold 13px monospace }
  .small { font-size: 10px; fill: #59636e }
  .paper { fill: #ffffff } .box { fill: #eef1f9; stroke: #4657a8 } .step { fill: #ffffff; stroke: #aab3d9 }
  .way { stroke: #59636e; fill: none } .tip { fill: #59636e } .optional { stroke-dasharray: 3 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9da7b1 } .paper { fill: #0d1117 }
    .box { fill: #1a2138; stroke: #7d8fe0 } .step { fill: #0d1117; stroke: #4a568f }
    .way { stroke: #9da7b1 } .tip { fill: #9da7b1 }
  }
</style>"""


def op_picture(spec: OpSpec) -> str:
    """An op as an SVG picture for light and for dark pages."""
    optional = {t.name for t in spec.tensors if t.optional}
    parts = [_text(BOX + BOX_WIDTH / 2, MARGIN + 18, spec.name, "op", "middle")]
    parts.append(_text(MARGIN, MARGIN + 18, "read", "small"))
    parts.append(_text(WIDTH - MARGIN, MARGIN + 18, "written", "small", "end"))
    y = HEAD
    for i, step in enumerate(spec.steps):
        height = _height(step)
        if i:
            parts.append(_arrow(BOX + BOX_WIDTH / 2, y - ROW + 2, BOX + BOX_WIDTH / 2, y - 1))
        parts.append(_step(step, y, height, optional, set(spec.updated)))
        y += height + ROW
    bottom = y - ROW + 10
    notes = ["What lies in the box stays on the chip."]
    notes += ["Dashed: optional."] if optional else []
    notes += ["*: updated in place."] if spec.updated else []
    parts.append(_text(MARGIN, bottom + 20, " ".join(notes), "small"))
    height = bottom + 20 + MARGIN
    box = f'<rect class="box" x="{BOX}" y="{MARGIN}" width="{BOX_WIDTH}" height="{bottom - MARGIN}" rx="6"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH * 4 // 3}">'
    paper = f'<rect class="paper" width="{WIDTH}" height="{height}"/>'
    title = f"<title>{escape(_words(spec))}</title>"
    return "\n".join([head, title, STYLE, paper, box, *parts, "</svg>\n"])


def _words(spec: OpSpec) -> str:
    """The steps in words, for who does not see the picture."""
    return f"{spec.name}, in one pass: {'; '.join(step.does for step in spec.steps)}"


def _lines(step: Step) -> list[str]:
    return textwrap.wrap(step.does, 25)


def _height(step: Step) -> int:
    return LINE * max(len(_lines(step)), len(step.reads), len(step.gives)) + 10


def _step(step: Step, y: int, height: int, optional: set[str], updated: set[str]) -> str:
    """One step's box, with an arrow from each array that it reads, and to each that it gives."""
    x, width, middle = BOX + 10, BOX_WIDTH - 20, y + height / 2
    parts = [f'<rect class="step" x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>']
    for place, line in _spread(_lines(step), middle):
        parts.append(_text(x + width / 2, place + 4, line, "", "middle"))
    for place, name in _spread(step.reads, middle):
        parts.append(_text(MARGIN, place + 4, name, "name"))
        parts.append(_arrow(MARGIN + 6.8 * len(name) + 4, place, x - 1, place, name in optional))
    for place, name in _spread(step.gives, middle):
        shown = f"{name}*" if name in updated else name
        parts.append(_text(WIDTH - MARGIN, place + 4, shown, "name", "end"))
        parts.append(_arrow(x + width, place, WIDTH - MARGIN - 6.8 * len(shown) - 4, place, name in optional))
    return "\n".join(parts)


def _spread(texts: list[str] | tuple[str, ...], middle: float) -> list[tuple[float, str]]:
    """Each text with the height of its line, the lines around a middle."""
    return [(middle + LINE * (i - (len(texts) - 1) / 2), text) for i, text in enumerate(texts)]


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _arrow(x: float, y: float, to_x: float, to_y: float, dashed: bool = False) -> str:
    """An arrow to the right, or down."""
    style = "way optional" if dashed else "way"
    tip = "-5 -3 0 6" if to_x > x else "-3 -5 6 0"
    a, b, c, d = tip.split()
    return (
        f'<path class="{style}" d="M{x:g} {y:g}L{to_x:g} {to_y:g}"/>'
        f'<path class="tip" d="M{to_x:g} {to_y:g}l{a} {b}l{c} {d}z"/>'
    )
