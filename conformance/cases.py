"""The conformance cases of an op: its own, then the real shapes of the model files."""

from polyfuse.configs import ModelCase, model_configs
from polyfuse.conformance.case import Case
from polyfuse.conformance.ops import suite


def cases(op: str) -> tuple[Case, ...]:
    """The op's own cases, those of `conformance.ops.<op>`."""
    return tuple(suite(op).cases())


def all_cases(op: str) -> tuple[Case, ...]:
    """The op's own cases and those of the model files, names unique."""
    found = list(cases(op))
    for model, config in model_configs().items():
        found += [model_case(model, shape) for shape in config.ops.get(op, [])]
    names = [c.name for c in found]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"{op}: case names used twice: {', '.join(sorted(twice))}")
    return tuple(found)


def model_case(model: str, shape: ModelCase) -> Case:
    """One real shape of a model file as a case."""
    return Case(
        f"{model}-{shape.name}",
        {name: tuple(size) if isinstance(size, list) else size for name, size in shape.dims.items()},
        shape.attrs,
        shape.dtypes,
        {name: tuple(tuple(n) if isinstance(n, list) else n for n in rows) for name, rows in shape.host.items()},
        as_tensor=tuple(shape.as_tensor),
        present=tuple(shape.present),
        fill=shape.fill,
    )
