"""Time of a text model with Gated DeltaNet layers, untouched and accelerated: what `polyfuse bench model` measures.

The layers have a real model's sizes and random weights; there are few of them, a small vocabulary and no head. The time
of a model is wall time of a call with the device idle before and after it, or, in a graph, device time. The time of a
layer and of its parts is device time: that of a CUDA-graph replay, or wall time without graphs. The delta rule is left
out of them, as Transformers' PyTorch version of it, which runs where no kernel is installed, takes most of the time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polyfuse.bench.model.conv import ConvRow, measure_conv
from polyfuse.bench.model.layer import LayerRow, measure_layer
from polyfuse.bench.model.strategies import StrategyRow, measure_strategies
from polyfuse.bench.model.whole import ModelRow, measure_decode, measure_decode_graphs, measure_prefill
from polyfuse.bench.results import Results, device_name
from polyfuse.bench.subjects.gated_delta_net import RULES
from polyfuse.bench.subjects.text import TextModel

PREFILL = 2048, 8192, 32768
DECODE = 1, 16, 64
STRATEGY_ROWS = 1, 16, 64, 256, 2048, 8192
TINY_PREFILL, TINY_DECODE, TINY_ROWS = (16, 64), (1, 2), (1, 16)


@dataclass
class ModelBench(Results):
    """All that was measured of a text model; `delta_rule` names the functions that ran."""

    model: str
    sizes: str
    dtype: str
    layers: int
    fp8: bool
    delta_rule: Mapping[str, str]
    strategies: list[StrategyRow] = field(default_factory=list)
    conv: list[ConvRow] = field(default_factory=list)
    layer: list[LayerRow] = field(default_factory=list)
    rows: list[ModelRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, subject: TextModel) -> "ModelBench":
        """The results of a model of which nothing has been measured yet."""
        rules = {phase: subject.parts.delta_rule_name(phase) for phase in RULES}
        return cls(
            device_name(subject.device),
            subject.name,
            subject.sizes,
            subject.dtype_name,
            subject.depth,
            subject.fp8,
            rules,
        )

    @property
    def kind(self) -> str:
        return f"model_{self.model}_fp8_" if self.fp8 else f"model_{self.model}_"


def run_model_bench(
    subject: TextModel,
    prefill: Sequence[int] = (),
    decode: Sequence[int] = (),
    compiled: bool = True,
    on_row: Callable[[ModelBench], None] | None = None,
) -> ModelBench:
    """Measure everything; `on_row` is called with what there is after each row.

    `prefill` are numbers of tokens of one sequence, `decode` numbers of sequences that get one token each; they default
    to `PREFILL` and `DECODE`, or small ones for a tiny model. `compiled` measures a conv under torch.compile too. A
    decode step that cannot be captured is told in `notes`.
    """
    prefill = prefill or (TINY_PREFILL if subject.tiny else PREFILL)
    decode = decode or (TINY_DECODE if subject.tiny else DECODE)
    sizes = [("prefill", 1, tokens) for tokens in prefill] + [("decode", batch, 1) for batch in decode]
    result = ModelBench.of(subject)
    measured: list[tuple[list[Any], Iterator[Any]]] = [
        (result.strategies, measure_strategies(subject, TINY_ROWS if subject.tiny else STRATEGY_ROWS)),
        (result.conv, measure_conv(subject, prefill, compiled)),
        (result.layer, (measure_layer(subject, *size) for size in sizes)),
        (result.rows, measure_prefill(subject, prefill)),
        (result.rows, measure_decode(subject, decode)),
    ]
    if subject.captures:
        measured.append((result.rows, noting_errors(measure_decode_graphs(subject, decode), result.notes)))
    with torch.no_grad(), subject.fp8_linear():
        for rows, source in measured:
            for row in source:
                rows.append(row)
                if on_row:
                    on_row(result)
    return result


def noting_errors(rows: Iterator[ModelRow], notes: list[str]) -> Iterator[ModelRow]:
    """The rows until one cannot be captured, and then a note of why."""
    try:
        yield from rows
    except RuntimeError as error:
        notes.append(f"decode in a graph: {str(error).splitlines()[0]}")
