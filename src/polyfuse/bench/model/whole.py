"""All layers of the model: prefill, and decode steps, eager and captured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from polyfuse.bench.subjects.base import VARIANTS
from polyfuse.bench.subjects.text import TextModel


@dataclass(frozen=True)
class ModelRow:
    """A call of all layers with `tokens` new tokens, over all rows of the batch, after `context` cached ones in each.

    `mode` is `eager`, or `graph` for the device time of a captured step with a cache of fixed size.
    """

    phase: str
    batch: int
    context: int
    tokens: int
    mode: str
    variant: str
    ms: float
    tokens_per_s: float


def measure_prefill(subject: TextModel, lengths: Sequence[int]) -> Iterator[ModelRow]:
    """Measure a new sequence of each length, with a cache that grows."""
    for tokens in lengths:
        ids = subject.ids(1, tokens)
        for variant in VARIANTS:
            with subject.variant(variant):
                ms = subject.clock.latency_ms(partial(subject.model, ids, use_cache=True))
            yield _row("prefill", 1, 0, tokens, "eager", variant, ms)


def measure_decode(subject: TextModel, batches: Sequence[int]) -> Iterator[ModelRow]:
    """Measure steps of one token for each sequence, after the context."""
    for batch in batches:
        for variant in VARIANTS:
            with subject.variant(variant):
                ms = subject.clock.latency_ms(subject.step(batch), calls=20)
            yield _row("decode", batch, subject.context, batch, "eager", variant, ms)


def measure_decode_graphs(subject: TextModel, batches: Sequence[int]) -> Iterator[ModelRow]:
    """The same decode steps as `measure_decode`, captured in graphs."""
    for batch in batches:
        for variant in VARIANTS:
            with subject.variant(variant):
                ms = subject.clock.device_us(subject.step(batch)) / 1e3
            yield _row("decode", batch, subject.context, batch, "graph", variant, ms)


def _row(phase: str, batch: int, context: int, tokens: int, mode: str, variant: str, ms: float) -> ModelRow:
    ms = round(ms, 4)
    return ModelRow(phase, batch, context, tokens, mode, variant, ms, round(tokens / ms * 1e3, 2))
