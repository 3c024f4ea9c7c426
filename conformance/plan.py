"""What of an op the covering cases vary, and the case that a choice of values makes.

Most of it follows from the spec: every dtype of every array, arrays that are given or not, one dimension or two, and
the values of attributes. An op's `Plan` adds sizes, the values of attributes that are numbers, fills and layouts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyfuse.conformance.case import Case
from polyfuse.conformance.covering import ABSENT, Factor
from polyfuse.spec import REQUIRED, AttrSpec, OpSpec, TensorSpec

GIVEN = "given"  # an optional array whose dtype is that of another


@dataclass(frozen=True)
class Plan:
    """What an op adds to its spec.

    `sizes` are factors of the op's own; `case(chosen)` turns their values into what else a `Case` needs: dimensions,
    host arguments, and attributes, dtypes or fills that depend on them. It raises `SpecError` for values that do not
    go together. `blank` are the sizes that leave nothing to see of other factors: no results. `needs` names arrays that
    are given only where another is, or where a size is not 0. `attrs` are values of attributes, `fills` and `layouts`
    the names of those of arrays, with blanks between them; of each the first is the usual one. `read` names the factors
    of fills and layouts that `case` looks at: nothing else refuses these.
    """

    sizes: Mapping[str, tuple[Any, ...]]
    case: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    attrs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    blank: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    fills: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    read: tuple[str, ...] = ()


def factors(spec: OpSpec, plan: Plan) -> list[Factor]:
    """The factors of an op, those that are structure first."""
    found = [f for tensor in spec.tensors for f in _dtype_factors(spec, tensor)]
    found += [Factor(name, values, blank=plan.blank.get(name, ())) for name, values in plan.sizes.items()]
    found += [Factor(a.name, _values(a, plan)) for a in spec.attrs if len(_values(a, plan)) > 1]
    for tensor in spec.tensors:
        if tensor.split:
            found.append(_about(tensor, "split", (False, True), structure=True))
    for tensor in spec.tensors:
        for kind, values in (("fill", plan.fills), ("layout", plan.layouts)):
            if tensor.name in values:
                free = f"{tensor.name}.{kind}" not in plan.read
                found.append(_about(tensor, kind, tuple(values[tensor.name].split()), structure=False, free=free))
    return found


def case_of(name: str, spec: OpSpec, plan: Plan, chosen: Mapping[str, Any]) -> Case:
    """The case of a choice of values, by the factors' names."""
    own = dict(plan.case(chosen))
    dtypes: dict[str, str] = {}
    present, split = [], []
    fill: dict[str, str] = {}
    layout: dict[str, str] = {}
    for tensor in spec.tensors:
        value = chosen.get(tensor.name, tensor.dtypes[0])
        if tensor.optional and tensor.name in chosen and value != ABSENT:
            present.append(tensor.name)
        if tensor.dtype_var:
            dtypes[tensor.dtype_var] = chosen[tensor.dtype_var]
        elif value not in (ABSENT, GIVEN):
            dtypes[tensor.name] = value
        if chosen.get(f"{tensor.name}.split"):
            split.append(tensor.name)
        for kind, found in (("fill", fill), ("layout", layout)):
            if chosen.get(f"{tensor.name}.{kind}") is not None:
                found[tensor.name] = chosen[f"{tensor.name}.{kind}"]
    attrs = {a.name: chosen[a.name] for a in spec.attrs if a.name in chosen}
    return Case(
        name,
        own.pop("dims"),
        attrs | own.pop("attrs", {}),
        dtypes | own.pop("dtypes", {}),
        present=(*present, *own.pop("present", ())),
        split=tuple(split),
        fill=own.pop("fill", {}) | fill,
        layout=layout,
        **own,
    )


def label(value: Any) -> str:
    """A value in the name of a case."""
    if isinstance(value, (tuple, list)):
        return "x".join(map(label, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _dtype_factors(spec: OpSpec, tensor: TensorSpec) -> Iterator[Factor]:
    if tensor.host_unless:
        return  # the op's plan gives it
    if tensor.optional:
        own = (GIVEN,) if tensor.dtype_var or len(tensor.dtypes) == 1 else tensor.dtypes
        yield Factor(tensor.name, (*own, ABSENT) if tensor.by_position else (ABSENT, *own))
    elif tensor.dtype_var:
        if tensor == next(t for t in spec.tensors if t.dtype_var == tensor.dtype_var):
            yield Factor(tensor.dtype_var, tensor.dtypes)
    elif len(tensor.dtypes) > 1:
        yield Factor(tensor.name, tensor.dtypes)


def _values(attr: AttrSpec, plan: Plan) -> tuple[Any, ...]:
    if attr.name in plan.attrs:
        return plan.attrs[attr.name]
    if attr.kind == "bool":
        return (attr.default, not attr.default)
    if attr.values:
        usual = attr.values[0] if attr.default is REQUIRED else attr.default
        others = (*attr.values, *((None,) if attr.optional else ()))
        return (usual, *(v for v in others if v != usual))
    return ()


def _about(tensor: TensorSpec, kind: str, values: tuple[Any, ...], *, structure: bool, free: bool = False) -> Factor:
    under, values = (tensor.name, (None, *values)) if tensor.optional else ("", values)
    return Factor(f"{tensor.name}.{kind}", values, structure, under, content=kind == "fill", free=free)
