"""Sweep the launch parameters of Triton kernels on a device, and keep the fastest: what `polyfuse tune` does."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton
import yaml

from polyfuse.bench.results import Results, device_name
from polyfuse.bench.timing import Clock
from polyfuse.configs import launch_entries, model_configs, tuning_file
from polyfuse.conformance import Case, Trial, cases, make_inputs, place
from polyfuse.conformance.cases import model_case
from polyfuse.dispatch import check_device, registry
from polyfuse.spec import OPS, fail
from polyfuse.triton_impl._tuning import Tiles, Values, architecture

GAIN = 0.98  # of the rule's time: what is within the noise of two measurements does not replace it

Measure = Callable[[Callable[[], Any]], float]  # device microseconds of a call


@dataclass(frozen=True)
class Sweep:
    """What was found for an op's calls up to a size (None: all larger ones), which are timed by `calls`.

    `ratio` is the geometric mean of the times with `chosen` over those with the rule's values. `rejected` says of
    values that are not taken whatever their time is why: another bit in a result, or an error of the compiler.
    """

    op: str
    size: int | None
    calls: tuple[str, ...]
    rule: dict[str, int]
    chosen: dict[str, int]
    ratio: float
    tried: int
    rejected: dict[str, str]


@dataclass
class Tuned(Results):
    """The sweeps on a device, and what the measured kernels are known by."""

    arch: str
    sweeps: list[Sweep] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path | None = None) -> Path:
        """Write the device's file, in a folder or the user's cache: other kernels' entries and other keys stay."""
        path = tuning_file(self.device, folder)
        new = {(op, source, triton.__version__, self.arch): self._ranges(op) for op, source in self.sources.items()}
        old = {(e.op, e.source, e.triton, e.arch): e.model_dump(exclude_none=True) for e in launch_entries(path)}
        kept = [entry for key, entry in old.items() if key not in new]
        made = [dict(zip(("op", "source", "triton", "arch"), key, strict=True), ranges=r) for key, r in new.items()]
        head = yaml.safe_dump({"device": self.device, "versions": dict(self.versions)}, sort_keys=False)
        if path.is_file():
            head = path.read_text(encoding="utf-8").partition("launch:\n")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + yaml.safe_dump({"launch": kept + made}, sort_keys=False), encoding="utf-8")
        return path

    def _ranges(self, op: str) -> list[dict[str, Any]]:
        found = [sweep for sweep in self.sweeps if sweep.op == op]
        return [{**({"size": s.size} if s.size else {}), "parameters": s.chosen} for s in found]


def tunable() -> dict[str, Tiles]:
    """The ops of the Triton backend that have launch parameters to choose."""
    backend = registry().get("triton")
    modules = {op: importlib.import_module(f"{backend.module}.{op}") for op in OPS if op in backend.implements}
    return {op: module.TILES for op, module in modules.items() if isinstance(getattr(module, "TILES", None), Tiles)}


def tune(
    ops: Sequence[str] = (), device: str = "cuda", on_sweep: Callable[[Tuned, Sweep], None] | None = None
) -> Tuned:
    """Sweep ops on a device, by the models' bench cases. What is found holds once it is saved and read again.

    Raises `SpecError` for an op without launch parameters, and on a CPU, where kernels are interpreted.
    """
    known = tunable()
    for op in ops:
        if op not in known:
            fail("tune", "op", f"one of {', '.join(known)}, which have launch parameters", op)
    check_device("tune: device", device, ["torch"])
    if torch.device(device).type == "cpu":
        fail("tune", "device", "an accelerator: on a CPU kernels are interpreted, and no time means anything", device)
    where = torch.empty(0, device=device).device
    result = Tuned(device_name(device).split("(")[-1].rstrip(")"), architecture(where))
    for op in ops or known:
        models = model_configs().items()
        calls = [model_case(name, shape) for name, config in models for shape in config.bench.get(op, [])]
        for sweep in sweep_op(op, known[op], calls, device, Clock(device).replay_us):
            result.sweeps.append(sweep)
            if on_sweep:
                on_sweep(result, sweep)
        result.sources[op] = known[op].source()
    return result


def sweep_op(op: str, tiles: Tiles, calls: Sequence[Case], device: str, measure: Measure) -> Iterator[Sweep]:
    """One sweep for each range of the op's rule; of a range in which no call lies the rule's values stay."""
    least, last = 0, tiles.ranges[-1][0]
    for limit, rule in tiles.ranges:
        trials = _Trials(op, tiles, rule, device)
        for case in calls:
            trials.time(case, least, limit, measure)
        chosen, ratio = trials.fastest()
        least = limit
        yield Sweep(
            op=op,
            size=None if limit == last else limit,
            calls=tuple(trials.names),
            rule=dict(zip(tiles.names, rule, strict=True)),
            chosen=dict(zip(tiles.names, chosen, strict=True)),
            ratio=round(ratio, 4),
            tried=len(trials.us) + len(trials.rejected),
            rejected={str(values): reason for values, reason in trials.rejected.items()},
        )


class _Trials:
    """The values tried for the calls of one range: their times by call, and why some are rejected."""

    def __init__(self, op: str, tiles: Tiles, rule: Values, device: str) -> None:
        self.op, self.tiles, self.rule, self.device = op, tiles, rule, device
        self.function = registry().get("triton").load(op).function
        self.names: list[str] = []
        self.us: dict[Values, list[float]] = {}
        self.rejected: dict[Values, str] = {}

    def time(self, case: Case, least: int, limit: int, measure: Measure) -> None:
        """Time all values on a call, if the sizes of all its launches are above `least` and up to `limit`."""
        call = partial(self.function, **place(make_inputs(OPS[self.op], case), "torch", self.device))
        sizes: list[int] = []

        def noted(size: int) -> Values:
            sizes.append(size)
            return next(values for up_to, values in self.tiles.ranges if size <= up_to)

        with torch.no_grad(), self.tiles.using(noted):
            want = _outputs(call())
        if not sizes or min(sizes) <= least or max(sizes) > limit:
            return
        self.names.append(case.name)
        for values in dict.fromkeys((self.rule, *product(*self.tiles.choices))):
            if values in self.rejected:
                continue
            with torch.no_grad(), self.tiles.using(_always(values)):
                try:
                    same = all(map(_same_bits, _outputs(call()), want))
                    us = measure(call) if same else 0.0
                except Exception as error:  # what a compiler or a driver says of too large a tile
                    self._reject(values, f"{type(error).__name__}: {error}".splitlines()[0])
                    continue
            if same:
                self.us.setdefault(values, []).append(us)
            else:
                self._reject(values, f"other bits in {case.name}")

    def fastest(self) -> tuple[Values, float]:
        """The fastest values that pass the op's core cases, and the geometric mean of their times over the rule's."""
        before = self.us.get(self.rule, [])
        ratios = {
            values: prod(a / b for a, b in zip(us, before, strict=True)) ** (1 / len(before))
            for values, us in self.us.items()
        }
        for values in sorted(ratios, key=ratios.__getitem__):
            if values == self.rule or ratios[values] >= GAIN:
                break
            with self.tiles.using(_always(values)):  # whatever the size of a core case is
                problem = _fails(self.op, self.device)
            if problem is None:
                return values, ratios[values]
            self._reject(values, problem)
        return self.rule, 1.0

    def _reject(self, values: Values, reason: str) -> None:
        self.rejected[values] = reason
        self.us.pop(values, None)


def _always(values: Values) -> Callable[[int], Values]:
    return lambda size: values


def _outputs(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """NaN equals itself, and a sign of zero counts."""
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (got, want)))


def _fails(op: str, device: str) -> str | None:
    """What of the op's core cases is outside of the oracle's bounds, or None."""
    spec, function = OPS[op], registry().get("triton").load(op).function
    for case in (case for case in cases(op) if case.name in spec.core):
        trial = Trial(op, case, seed=0)
        values, call = trial.inputs()
        arrays = place(values, "torch", device, case.stacked)
        with torch.no_grad():
            results = _outputs(function(**{**arrays, **call.attrs, **call.host}))
        problem = trial.check((*results, *(arrays[updated.name] for updated in call.updated)), call)
        if problem is not None:
            return f"{case.name}: {problem}"
    return None
