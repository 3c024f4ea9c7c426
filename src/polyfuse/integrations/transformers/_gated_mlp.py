"""What makes a module a gated MLP: SiLU of one projection times another, and a projection down."""

from typing import Any

from torch import nn

from polyfuse.integrations.transformers._formula import formula


def _formulas() -> set[str]:
    """What an MLP's `forward` may compute, as `formula` writes it: the factors of the product in either order."""
    halves = "chunk(gate_up_proj(x), 2, dim=-1)"
    two_projections = ("silu(gate_proj(x))", "up_proj(x)")
    one_for_both_halves = (f"silu(getitem({halves}, 0))", f"getitem({halves}, 1)")
    formulas = set()
    for activated_gate, up in (two_projections, one_for_both_halves):
        formulas.add(f"down_proj(mul({activated_gate}, {up}))")
        formulas.add(f"down_proj(mul({up}, {activated_gate}))")
    return formulas


FORMULAS = _formulas()


def is_gated(module: nn.Module) -> bool:
    """Whether a trace of a module's `forward` gives a gated MLP."""
    return formula(module) in FORMULAS


def projections(module: nn.Module) -> list[Any]:
    """Gate, up and down, or both halves and down; nothing if there are no such children."""
    children = module._modules
    first = ["gate_up_proj"] if "gate_up_proj" in children else ["gate_proj", "up_proj"]
    names = [*first, "down_proj"]
    return [children[name] for name in names] if all(name in children for name in names) else []
