"""Which op computes a y and quantises it, from which tensors and with which attributes of its own."""

from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.fx import Node

from polyfuse.runtime.fusion._nodes import NARROW, Labels, dtype_of, is_float, rounded, same, sizes
from polyfuse.runtime.fusion._values import (
    Clamped,
    Half,
    Normalised,
    Normed,
    Operand,
    Part,
    Product,
    Shifted,
    Silu,
    Value,
    Weighted,
    near_of,
)

aten = torch.ops.aten

# An alpha that leaves every 16-bit gate as it is: with it, and not with 1, the op rounds the sigmoid as well.
ROUNDED_SIGMOID = float(np.nextafter(np.float32(1), np.float32(2)))

_NORM_ROUNDINGS = (
    "rms_norm_block_quant: the squares of a row are added in the op's own order, and nothing is rounded before q; "
    "materialize=False takes it"
)


@dataclass(frozen=True)
class Call:
    """A call of an op: its tensors by argument, its attributes, and the node that its third result replaces."""

    op: str
    tensors: dict[str, Node]
    attrs: dict[str, Any] = field(default_factory=dict)
    sum: Node | None = None


def call_for(y: Value, at: Node, labels: Labels, materialize: bool) -> tuple[Call, str]:
    """The op that computes y, or else takes it as rows `at`, and why it is not one that computes more of it."""
    found: Call | str = ""
    match y:
        case Product() | Weighted():
            found = _silu_mul(y, at, labels, materialize)
        case Silu():
            found = "silu_mul_block_quant: silu(gate) is not multiplied by an up"
        case Normalised():
            found = "rms_norm_block_quant: the normalised rows have no weight"
        case Normed():
            found = _NORM_ROUNDINGS if materialize else _rms_norm(y, at, labels)
        case _ if near := near_of(y):
            found = "" if near.scaled else near.reason
    return (found, "") if isinstance(found, Call) else (Call("block_quant", {"x": at}), found)


def _silu_mul(y: Product | Weighted, at: Node, labels: Labels, materialize: bool) -> Call | str:
    product = y.product if isinstance(y, Weighted) else y
    silu, shift = product.silu, product.up if isinstance(product.up, Shifted) else None
    gate, up = _clamp_of(silu.gate), _clamp_of(shift.of if shift else product.up)
    tensors = _gate_and_up(gate.of, up.of, at, labels)
    if tensors is None:
        return "silu_mul_block_quant: gate and up have not the dtype and the rows of one another, or of y"
    reason = _other_limits(gate, silu, up) or _other_roundings(y, shift, dtype_of(tensors["x"]), materialize)
    if reason:
        return f"silu_mul_block_quant: {reason}"
    if isinstance(y, Weighted):
        weight = _row_weight(y.weight, sizes(tensors["x"])[:-1], labels)
        if weight is None:
            return "silu_mul_block_quant: the weights are not one for each row, in a dtype of the op"
        tensors["row_weight"] = weight
    alpha = ROUNDED_SIGMOID if _rounds_sigmoid(silu) and materialize else silu.alpha
    attrs = {
        "interleaved": "up" not in tensors and isinstance(gate.of, Half) and gate.of.interleaved,
        "alpha": 1.0 if alpha is None else alpha,
        "up_offset": shift.offset if shift else 0.0,
        "limit": silu.high if gate.high is None else gate.high,
        "limit_on": "input" if silu.high is None else "silu",
        "materialize": materialize,
    }
    if attrs["limit_on"] == "silu" and attrs["alpha"] != 1:
        return "silu_mul_block_quant: silu is clamped, and its sigmoid is rounded or has an alpha"
    return Call("silu_mul_block_quant", tensors, attrs)


def _rounds_sigmoid(silu: Silu) -> bool:
    """Whether silu has no alpha, or 1, and yet is written out as a product with a sigmoid."""
    return bool(silu.steps) and silu.alpha in (None, 1.0)


class _Clamp(NamedTuple):
    """A value before it was clamped, and its bounds; None is no bound."""

    of: Operand
    low: float | None
    high: float | None


def _clamp_of(value: Operand) -> _Clamp:
    if isinstance(value, Clamped):
        return _Clamp(value.of, value.low, value.high)
    return _Clamp(value, None, None)


def _other_limits(gate: _Clamp, silu: Silu, up: _Clamp) -> str:
    """Why the clamps are not those of one limit: gate or silu above, up on both sides; empty if they are."""
    limit = silu.high if gate.high is None else gate.high
    if gate.low is not None:
        return "the gate is clamped from below"
    if gate.high is not None and silu.high is not None:
        return "both the gate and silu(gate) are clamped"
    if (up.low, up.high) != (None if limit is None else -limit, limit):
        of_up = "not clamped" if up.low is None and up.high is None else f"clamped to {(up.low, up.high)}"
        of_gate = "not clamped" if limit is None else f"clamped to at most {limit}"
        return f"up is {of_up}, and the gate {of_gate}"
    return "the limit is not > 0" if limit is not None and not limit > 0 else ""


def _other_roundings(y: Product | Weighted, shift: Shifted | None, dtype: torch.dtype, materialize: bool) -> str:
    """Why the op's last bits may differ, or without `materialize` more than those; empty if they do not."""
    product = y.product if isinstance(y, Weighted) else y
    silu = product.silu
    roundings = {"silu(gate)": silu.rounded, "the product": product.rounded}
    roundings |= zip(("sigmoid(alpha * gate)", "alpha * gate"), silu.steps[::-1], strict=False)
    roundings |= {"up plus a number": shift.rounded} if shift else {}
    roundings |= {"the product with the row's weight": y.rounded} if isinstance(y, Weighted) else {}
    allowed = (dtype,) if materialize else (dtype, torch.float32)
    for name, other in roundings.items():
        if other not in allowed:
            return f"{name} is rounded to {other}, and not to {dtype}"
    if not materialize:
        return ""
    if shift and rounded(shift.offset, dtype) != shift.offset:
        return f"the number added to up is not one of {dtype}, to which PyTorch rounds it on some devices"
    if _rounds_sigmoid(silu) and dtype not in NARROW:
        return "silu is written out, not torch's own"
    return silu.inexact


def _gate_and_up(gate: Operand, up: Operand, at: Node, labels: Labels) -> dict[str, Node] | None:
    """The tensors that have gate and up, in rows of y's width and one dtype: one if they are the halves of one."""
    if isinstance(gate, Half) and gate.part is Part.GATE and up == Half(gate.x, Part.UP, gate.interleaved):
        width = sizes(gate.x)[-1]
        return {"x": gate.x} if same((width,), (2 * sizes(at)[-1],)) else None
    for x in _with_rows(gate, at, labels):
        for other in _with_rows(up, at, labels):
            if same(sizes(x), sizes(other)) and dtype_of(x) is dtype_of(other):
                return {"x": x, "up": other}
    return None


def _with_rows(value: Operand, at: Node, labels: Labels) -> list[Node]:
    """The nodes with a value in its own dtype and rows of y's width, those in y's shape first."""
    own = [node for node in labels.having(value) if is_float(node)]
    found = [node for node in own if dtype_of(node) is dtype_of(own[0]) and same(sizes(node)[-1:], sizes(at)[-1:])]
    return sorted((node for node in found if len(sizes(node)) > 1), key=lambda node: not same(sizes(node), sizes(at)))


def _row_weight(weight: Operand, lead: tuple[Any, ...], labels: Labels) -> Node | None:
    """The node that has a weight for each row, as [*lead] or [*lead, 1]."""
    for node in labels.having(weight):
        if is_float(node) and (same(sizes(node), lead) or same(sizes(node), (*lead, 1))):
            return node
    return None


def _rms_norm(y: Normed, at: Node, labels: Labels) -> Call | str:
    normalised = y.normalised
    weight, offset = (y.weight.of, y.weight.offset) if isinstance(y.weight, Shifted) else (y.weight, 0.0)
    rows = _with_rows(normalised.of, at, labels) if same(sizes(normalised.rows)[-1:], sizes(at)[-1:]) else []
    weights = [node for node in labels.having(weight) if is_float(node) and same(sizes(node), sizes(at)[-1:])]
    if not rows:
        return "rms_norm_block_quant: the rows that are normalised are not those of y"
    if not weights:
        return "rms_norm_block_quant: the weights are not one for each column"
    x, dtype = rows[0], dtype_of(rows[0])
    if not {normalised.rounded, y.rounded} <= {dtype, torch.float32}:
        return f"rms_norm_block_quant: y is rounded to another dtype than {dtype}"
    if not 0 < normalised.eps < inf:
        return "rms_norm_block_quant: eps is not a float32 > 0"
    attrs = {"eps": normalised.eps, "weight_offset": offset}
    terms = x.args[:2]
    if x.target is aten.add.Tensor and not x.kwargs and all(_is_term(term, x) for term in terms):
        tensors = {"x": terms[0], "weight": weights[0], "residual": terms[1]}
        return Call("rms_norm_block_quant", tensors, attrs, sum=x)  # type: ignore[arg-type]
    return Call("rms_norm_block_quant", {"x": x, "weight": weights[0]}, attrs)


def _is_term(term: Any, total: Node) -> bool:
    return isinstance(term, Node) and same(sizes(term), sizes(total)) and dtype_of(term) is dtype_of(total)
