"""All layers of the model: prefill, and decode steps, eager and captured."""

from dataclasses import dataclass
from functools import partial

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

    def __str__(self) -> str:
        size = f"{self.tokens} tokens" if self.phase == "prefill" else f"{self.batch} sequences, {self.mode}"
        return f"model, {self.phase} of {size}, {self.variant}: {self.ms:.3f} ms"


def measure_prefill(subject: TextModel, tokens: int, variant: str) -> ModelRow:
    """Measure a new sequence, with a cache that grows."""
    ids = subject.ids(1, tokens)
    with subject.variant(variant):
        ms = subject.clock.latency_ms(partial(subject.model, ids, use_cache=True))
    return _row("prefill", 1, 0, tokens, "eager", variant, ms)


def measure_decode(subject: TextModel, batch: int, mode: str, variant: str) -> ModelRow:
    """Measure steps of one token for each sequence, after the context; with `mode` graph they are captured."""
    with subject.variant(variant):
        step, clock = subject.step(batch), subject.clock
        ms = clock.device_us(step) / 1e3 if mode == "graph" else clock.latency_ms(step, calls=20)
    return _row("decode", batch, subject.context, batch, mode, variant, ms)


def _row(phase: str, batch: int, context: int, tokens: int, mode: str, variant: str, ms: float) -> ModelRow:
    ms = round(ms, 4)
    return ModelRow(phase, batch, context, tokens, mode, variant, ms, round(tokens / ms * 1e3, 2))
