"""One Gated DeltaNet layer by its parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from polyfuse.bench.baseline import untouched
from polyfuse.bench.subjects.gated_delta_net import PARTS, Call
from polyfuse.bench.subjects.text import TextModel
from polyfuse.bench.timing import Clock


@dataclass(frozen=True)
class LayerRow:
    """Device time of one Gated DeltaNet layer in a variant, and, with FP8 weights, of the MLP and experts after it.

    `parts` are microseconds of each part timed alone, on the layer's own tensors: those that `PARTS` names, the MLP,
    the experts, and `rest`, what is left of the whole. It can be less than nothing, as a part alone may find its
    operands in a cache. Times are those of graph replays if `captured`, else between two events, or wall times without
    events: FLA may read the device in a call, which no graph can hold. Nor can one hold experts whose rows the host
    reads: their time is taken by events where that of the layer is a replay's. For decode, `host_us` is how long the
    host takes to queue an eager call of the layer, and `launches` how many kernels, copies and fills that call gives to
    a CUDA device.
    """

    phase: str
    batch: int
    tokens: int
    variant: str
    us: float
    parts: Mapping[str, float]
    captured: bool
    host_us: float | None = None
    launches: int | None = None

    def __str__(self) -> str:
        host = "" if self.host_us is None else f", host {self.host_us:.1f} us"
        return f"layer, {self.phase} of {self.batch} x {self.tokens}, {self.variant}: {self.us:.1f} us{host}"


def measure_layer(subject: TextModel, phase: str, batch: int, tokens: int, variant: str) -> LayerRow:
    """Measure the first layer and its parts on `tokens` of each of `batch` sequences; `phase` is prefill or decode."""
    parts, clock, x = subject.parts, subject.clock, subject.hidden(batch, tokens)
    host_us = counted = None
    with subject.variant(variant):
        call = partial(subject.layer, x, subject.cache(batch) if phase == "decode" else None)
        whole, captured, time = _timed(clock, call, subject.captures)
        times = {part: time(alone) for part, alone in parts.calls(phase, variant, call).items()}
        if untouched(variant):
            with parts.what_is_left(phase, variant, call):
                times[PARTS[phase][1]] = time(call)
        if phase == "decode":
            host_us = round(clock.queue_us(call, calls=clock.repeats(10), rounds=5), 3)
            counted = launches(call, subject.device)
        us = {part: times[part] for part in PARTS[phase] if part in times}
        if subject.fp8:
            us["MLP"] = time(partial(subject.mlp, x))
            whole += us["MLP"]
            if subject.experts is not None:
                call_of_experts = partial(subject.experts, *subject.routed(x))
                us["experts"], _, _ = _timed(clock, call_of_experts, subject.captures)
                whole += us["experts"]
    us["rest"] = whole - sum(us.values())
    rounded = {part: round(value, 3) for part, value in us.items()}
    return LayerRow(phase, batch, tokens, variant, round(whole, 3), rounded, captured, host_us, counted)


def _timed(clock: Clock, call: Call, captures: bool) -> tuple[float, bool, Callable[[Call], float]]:
    """Device time of a call, whether a graph could hold it, and what takes the time of its parts in the same way."""
    try:
        return clock.device_us(call), captures, clock.device_us
    except RuntimeError:
        if not captures:
            raise
    by_events = partial(clock.event_us, rounds=7)
    return by_events(call), False, by_events


def launches(call: Call, device: str) -> int | None:
    """How many kernels, copies and fills a call gives to a CUDA device; None for others, and without a profiler."""
    if not device.startswith("cuda"):
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type.name == "CUDA" for event in seen.events() or ()) or None
