"""The bench cases of the model files: which of them are asked for, and what one of them will take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from polyfuse.bench.peers.check import TIED
from polyfuse.configs import model_configs
from polyfuse.conformance import Case
from polyfuse.conformance.cases import model_case
from polyfuse.conformance.inputs import described
from polyfuse.spec import OPS, Call, SpecError, bind

FEW = 256  # rows of a call from which the time of a large one is estimated


@dataclass(frozen=True)
class BenchCase:
    """A case of `bench` in a model file. Its name in the model file is `name`."""

    op: str
    model: str
    name: str
    case: Case

    def call(self, case: Case | None = None) -> Call:
        """The call of the case, or of another case of its op, without its arrays."""
        return bind(OPS[self.op], described(OPS[self.op], case or self.case))

    def few_rows(self) -> Case | None:
        """The same case with few rows, or None where rows cannot be left out, as the arguments name them."""
        case = self.case
        if {*case.host, *case.present} & {*TIED, "grid_thw"}:
            return None
        masked = "num_rows" in case.present
        fewer: dict[str, Any] = {"L": FEW, "slots": FEW, "conv_slots": FEW, "...": (1, FEW) if masked else (FEW,)}
        if masked:
            fewer["E"] = 1
        return replace(case, dims={name: _least(size, fewer.get(name)) for name, size in case.dims.items()})


def bench_cases(ops: Sequence[str] = (), model: str | None = None, patterns: Sequence[str] = ()) -> list[BenchCase]:
    """The bench cases of these ops (default: all), of a model, whose names match one of the patterns, as of files.

    Raises `SpecError`, with what there is, for a model or a pattern that has none, and where nothing is left.
    """
    found = [
        BenchCase(op, name, shape.name, model_case(name, shape))
        for name, config in model_configs().items()
        for op, shapes in config.bench.items()
        for shape in shapes
    ]
    if model is not None:
        models = list(model_configs())
        if model not in models:
            raise SpecError(f"--model: expected one of {', '.join(models)}, got {model!r}")
        found = _chosen(found, [case for case in found if case.model == model], f"--model {model}", "model")
    within = f"--model {model} " if model else ""
    if ops:
        found = _chosen(found, [case for case in found if case.op in ops], f"{within}--op {' --op '.join(ops)}", "op")
    for pattern in patterns:
        _chosen(found, [case for case in found if fnmatchcase(case.name, pattern)], f"--case {pattern}", "name")
    return [c for c in found if not patterns or any(fnmatchcase(c.name, pattern) for pattern in patterns)]


def _chosen(among: Sequence[BenchCase], found: list[BenchCase], asked: str, field: str) -> list[BenchCase]:
    """What was found. Raises `SpecError` with the choices if that is nothing."""
    if not found:
        choices = dict.fromkeys(getattr(case, field) for case in among)
        raise SpecError(f"{asked}: no bench case; expected one of {', '.join(choices)}")
    return found


def _least(size: Any, limit: Any) -> Any:
    """A dimension, or several, of at most a limit for each of the first ones."""
    if limit is None:
        return size
    if isinstance(size, tuple):
        return (*(min(pair) for pair in zip(size, limit, strict=False)), *size[len(limit) :])
    return min(size, limit)
