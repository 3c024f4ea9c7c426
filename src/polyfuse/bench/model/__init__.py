"""Time of a text model with Gated DeltaNet layers, untouched and accelerated: what `polyfuse bench model` measures.

The layers have a real model's sizes and random weights; there are few of them, a small vocabulary and no head. The time
of a model is wall time of a call with the device idle before and after it, or, in a graph, device time. The time of a
layer and of its parts is device time: that of a CUDA-graph replay, or wall time without graphs.

Each variant that the machine has is measured, untouched ones first: what a user had before is the fastest of these.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from polyfuse.bench.model.conv import ConvRow, measure_conv
from polyfuse.bench.model.layer import LayerRow, measure_layer
from polyfuse.bench.model.rules import Size, delta_rules, first_line
from polyfuse.bench.model.strategies import StrategyRow, measure_strategies
from polyfuse.bench.model.whole import ModelRow, measure_decode, measure_prefill
from polyfuse.bench.results import Results, device_name
from polyfuse.bench.subjects.text import TextModel

PREFILL = 2048, 8192, 32768
DECODE = 1, 16, 64
STRATEGY_ROWS = 1, 16, 64, 256, 2048, 8192
TINY_PREFILL, TINY_DECODE, TINY_ROWS = (16, 64), (1, 2), (1, 16)
PARTS = "rows", "layer", "strategies", "conv"  # of the results, in the order in which they are measured

Job = tuple[str, Callable[[], Iterable[Any]]]  # what it is, in words, and what measures rows of it


@dataclass
class ModelBench(Results):
    """All that was measured of a text model.

    `delta_rule` names, by variant and phase, the delta rule that ran; its keys are the variants that were measured.
    """

    model: str
    sizes: str
    dtype: str
    layers: int
    fp8: bool
    delta_rule: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rows: list[ModelRow] = field(default_factory=list)
    layer: list[LayerRow] = field(default_factory=list)
    strategies: list[StrategyRow] = field(default_factory=list)
    conv: list[ConvRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, subject: TextModel) -> "ModelBench":
        """The results of a model of which nothing has been measured yet."""
        device = device_name(subject.device)
        described = subject.name, subject.sizes, subject.dtype_name, subject.depth, subject.fp8
        return cls(device, *described, notes=list(subject.notes))

    @property
    def kind(self) -> str:
        return f"model_{self.model}_fp8_" if self.fp8 else f"model_{self.model}_"


def run_model_bench(
    subject: TextModel,
    prefill: Sequence[int] = (),
    decode: Sequence[int] = (),
    compiled: bool = True,
    parts: Sequence[str] = PARTS,
    on_row: Callable[[ModelBench, Any], None] | None = None,
    on_start: Callable[[str], None] = lambda name: None,
) -> ModelBench:
    """Measure `parts` of the results; `on_row` is called with what there is after each row, and with the row.

    `on_start` is called with what is measured next, in words.

    `prefill` are numbers of tokens of one sequence, `decode` numbers of sequences that get one token each; they default
    to `PREFILL` and `DECODE`, or small ones for a tiny model. `compiled` measures a conv under torch.compile too. What
    cannot be measured, such as a call that cannot be captured, is told in `notes`.
    """
    prefill = prefill or (TINY_PREFILL if subject.tiny else PREFILL)
    decode = decode or (TINY_DECODE if subject.tiny else DECODE)
    sizes = [("prefill", 1, tokens) for tokens in prefill] + [("decode", batch, 1) for batch in decode]
    counts = TINY_ROWS if subject.tiny else STRATEGY_ROWS
    result = ModelBench.of(subject)
    with torch.no_grad(), subject.fp8_linear():
        on_start("first calls, which compile")
        result.delta_rule = delta_rules(subject, sizes, result.notes)
        jobs: Mapping[str, Iterable[Job]] = {
            "rows": _model_jobs(subject, prefill, decode, list(result.delta_rule)),
            "layer": _layer_jobs(subject, sizes, list(result.delta_rule)),
            "strategies": [("gdn_in_proj", partial(measure_strategies, subject, counts))],
            "conv": [("conv", partial(measure_conv, subject, prefill, compiled))],
        }
        for part in PARTS:
            for name, measure in jobs[part] if part in parts else ():
                on_start(name)
                for row in _noting_errors(name, measure, result.notes):
                    getattr(result, part).append(row)
                    if on_row:
                        on_row(result, row)
    return result


def _model_jobs(
    subject: TextModel, prefill: Sequence[int], decode: Sequence[int], variants: Sequence[str]
) -> Iterator[Job]:
    """A job for each call of the whole model in each variant."""
    for tokens in prefill:
        for variant in variants:
            yield f"prefill of {tokens}, {variant}", partial(_one, measure_prefill, subject, tokens, variant)
    for mode in ("eager", "graph") if subject.captures else ("eager",):
        for batch in decode:
            for variant in variants:
                name = f"decode of {batch}, {mode}, {variant}"
                yield name, partial(_one, measure_decode, subject, batch, mode, variant)


def _layer_jobs(subject: TextModel, sizes: Sequence[Size], variants: Sequence[str]) -> Iterator[Job]:
    """A job for each call of a layer in each variant."""
    for phase, batch, tokens in sizes:
        for variant in variants:
            name = f"layer, {phase} of {batch} x {tokens}, {variant}"
            yield name, partial(_one, measure_layer, subject, phase, batch, tokens, variant)


def _one(measure: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """The row that a function measures."""
    yield measure(*args)


def _noting_errors(name: str, measure: Callable[[], Iterable[Any]], notes: list[str]) -> Iterator[Any]:
    """The rows of a job until PyTorch or the device cannot go on, and then a note of why."""
    try:
        yield from measure()
    except RuntimeError as error:
        notes.append(f"{name}: {first_line(error)}")
