"""One Gated DeltaNet layer by its parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from polyfuse.bench.subjects.base import VARIANTS
from polyfuse.bench.subjects.text import TextModel


@dataclass(frozen=True)
class Part:
    """Device time of a part of a layer, before and after, and its share of what the layer saves."""

    part: str
    untouched_us: float
    accelerated_us: float
    saved_us: float
    share: float


@dataclass(frozen=True)
class LayerRow:
    """One Gated DeltaNet layer without its delta rule, and, with FP8 weights, the MLP after it.

    The parts are timed alone: the input projections (`gdn_in_proj`); what is between them and the delta rule
    (`gdn_conv_prep`), of which `l2norm` is that of q and k, in their dtype, which the delta rule does in the untouched
    model; the MLP. `rest` is what is left, so shares sum to 1. `delta_rule_us` is wall time of the delta rule.
    """

    phase: str
    batch: int
    tokens: int
    untouched_us: float
    accelerated_us: float
    delta_rule_us: float
    parts: Sequence[Part]


def measure_layer(subject: TextModel, phase: str, batch: int, tokens: int) -> LayerRow:
    """Measure the first layer and its parts on `tokens` of each of `batch` sequences; `phase` is prefill or decode."""
    parts, clock, x = subject.parts, subject.clock, subject.hidden(batch, tokens)
    call = partial(subject.layer, x, subject.cache(batch) if phase == "decode" else None)
    times: dict[str, dict[str, float]] = {}
    rule_us = 0.0
    for variant in VARIANTS:
        with subject.variant(variant):
            with parts.no_delta_rule() as seen:
                us = {"all": clock.device_us(call)}
            us["gdn_in_proj"] = clock.device_us(partial(parts.projected, x, variant))
            with parts.no_projections(x, variant), parts.no_delta_rule(normalises=False):
                us["gdn_conv_prep"] = clock.device_us(call)
            if variant == "untouched":
                ((arguments, options),) = seen
                us["l2norm"] = clock.device_us(partial(parts.l2norm, *arguments[:2]))
                rule_us = 1e3 * clock.latency_ms(partial(parts.delta_rule(phase), *arguments, **options))
            if subject.fp8:
                us["silu_mul_block_quant"] = clock.device_us(partial(subject.mlp, x))
                us["all"] += us["silu_mul_block_quant"]
        times[variant] = us
    return layer_row(phase, batch, tokens, times["untouched"], times["accelerated"], rule_us)


def layer_row(
    phase: str, batch: int, tokens: int, before: Mapping[str, float], after: Mapping[str, float], rule_us: float
) -> LayerRow:
    """A row from microseconds by part, among them `all`; what a variant lacks takes no time in it."""
    times = {name: (us, after.get(name, 0.0)) for name, us in before.items() if name != "all"}
    rest_before = before["all"] - sum(old for old, _ in times.values())
    rest_after = after["all"] - sum(new for _, new in times.values())
    times["rest"] = rest_before, rest_after
    saved = before["all"] - after["all"]
    parts = []
    for name, (old, new) in times.items():
        parts.append(Part(name, round(old, 3), round(new, 3), round(old - new, 3), (old - new) / saved))
    return LayerRow(phase, batch, tokens, round(before["all"], 3), round(after["all"], 3), round(rule_us, 1), parts)
