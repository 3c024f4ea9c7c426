"""Time of a text model with Gated DeltaNet layers, untouched and accelerated: what `polyfuse bench model` measures.

The layers have a real model's sizes and random weights; there are few of them, a small vocabulary and no head. The time
of a model is wall time of a call with the device idle before and after it, or, in a graph, device time. The time of a
layer and of its parts is device time: that of a CUDA-graph replay, or wall time without graphs. The delta rule is left
out of them, as Transformers' PyTorch version of it, which runs where no kernel is installed, takes most of the time.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.nn.functional import conv1d, silu

import polyfuse
from polyfuse.bench.ops import write_json
from polyfuse.bench.text_models import RULES, VARIANTS, TextModel
from polyfuse.conformance.report import versions
from polyfuse.conformance.runner import device_name
from polyfuse.dispatch import registry
from polyfuse.integrations.transformers import stacked_weights
from polyfuse.runtime import choose_projection_strategy
from polyfuse.spec.gdn_in_proj import STRATEGIES

PREFILL = 2048, 8192, 32768
DECODE = 1, 16, 64
STRATEGY_ROWS = 1, 16, 64, 256, 2048, 8192
TINY_PREFILL, TINY_DECODE, TINY_ROWS = (16, 64), (1, 2), (1, 16)


@dataclass(frozen=True)
class StrategyRow:
    """`gdn_in_proj` on rows of the layer's sizes: what `auto` chose, and microseconds per call of every strategy.

    Device time in a graph if `captured`, else wall time of calls in a row. Weights are stacked, as in the layer.
    """

    rows: int
    captured: bool
    chosen: str
    us: Mapping[str, float]


@dataclass(frozen=True)
class ConvRow:
    """From [q | k | v] before the conv to normalised q, k and v: device time of one way, and as a multiple of one pass.

    The separate conv is PyTorch's, with SiLU, as in Transformers, followed by `gdn_post_conv`.
    """

    tokens: int
    variant: str
    us: float
    ratio: float


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


@dataclass(frozen=True)
class ModelRow:
    """All layers: `tokens` new ones a call, over all rows of the batch, after `context` cached ones in each.

    `mode`: `eager`, or `graph` for the device time of a captured step with a cache of fixed size.
    """

    phase: str
    batch: int
    context: int
    tokens: int
    mode: str
    variant: str
    ms: float
    tokens_per_s: float


@dataclass
class ModelBench:
    """All that was measured, with what it was measured on; `delta_rule` names the functions that ran."""

    device: str
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
    versions: Mapping[str, str] = field(default_factory=versions)

    @classmethod
    def of(cls, subject: TextModel) -> "ModelBench":
        """Nothing measured yet."""
        rules = {phase: subject.delta_rule_name(phase) for phase in RULES}
        dtype = str(subject.dtype).removeprefix("torch.")
        return cls(device_name(subject.device), subject.name, subject.sizes, dtype, subject.layers, subject.fp8, rules)

    def write(self, folder: Path) -> Path:
        """Write what there is into a JSON file named after the model and the device; returns its path."""
        prefix = f"model_{self.model}_fp8_" if self.fp8 else f"model_{self.model}_"
        return write_json(folder, prefix, self.device, asdict(self))

    def tables(self) -> Iterator[Table]:
        """One for each part that was measured."""
        title = f"{self.sizes}, {self.layers} layers, {self.dtype}{', FP8 MLPs' if self.fp8 else ''}, on {self.device}"
        if self.strategies:
            table = Table("rows", "", "auto", *STRATEGIES[1:], title=f"gdn_in_proj, us a call: {title}")
            for s in self.strategies:
                times = (f"{s.us[name]:.1f}" if name in s.us else "-" for name in STRATEGIES[1:])
                table.add_row(f"{s.rows}", "captured" if s.captured else "eager", s.chosen, *times)
            yield table
        if self.conv:
            table = Table("tokens", "", "us", "of one pass", title=f"Conv to delta rule: {title}")
            for c in self.conv:
                table.add_row(f"{c.tokens}", c.variant, f"{c.us:.1f}", f"{c.ratio:.2f}x")
            yield table
        if self.layer:
            columns = "", "batch", "tokens", "part", "untouched us", "accelerated us", "saved", "share"
            table = Table(*columns, title=f"One layer without its delta rule: {title}")
            for r in self.layer:
                whole = Part("all", r.untouched_us, r.accelerated_us, r.untouched_us - r.accelerated_us, 1.0)
                for p in (whole, *r.parts):
                    numbers = (f"{us:.1f}" for us in (p.untouched_us, p.accelerated_us, p.saved_us))
                    table.add_row(r.phase, f"{r.batch}", f"{r.tokens}", p.part, *numbers, f"{p.share:.0%}")
                table.add_row(r.phase, f"{r.batch}", f"{r.tokens}", "delta rule (wall)", f"{r.delta_rule_us:.1f}")
            yield table
        if self.rows:
            ran = ", ".join(f"{phase} by {name}" for phase, name in self.delta_rule.items())
            columns = "", "batch", "context", "mode", "tokens", "variant", "ms", "tokens/s", "speed-up"
            table = Table(*columns, title=f"Whole model: {title}", caption=f"delta rule: {ran}")
            before = 0.0
            for m in self.rows:
                before = m.ms if m.variant == VARIANTS[0] else before
                counts = m.phase, f"{m.batch}", f"{m.context}", m.mode, f"{m.tokens}", m.variant
                table.add_row(*counts, f"{m.ms:.2f}", f"{m.tokens_per_s:.0f}", f"{before / m.ms:.2f}x")
            yield table


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
        measured.append((result.rows, _noting_errors(measure_decode_graphs(subject, decode), result.notes)))
    with torch.no_grad(), subject.fp8_linear():
        for rows, source in measured:
            for row in source:
                rows.append(row)
                if on_row:
                    on_row(result)
    return result


def measure_strategies(subject: TextModel, counts: Sequence[int]) -> Iterator[StrategyRow]:
    """Every strategy that the chosen backend has, for each number of rows."""
    layer = subject.layer
    with subject.variant("accelerated"):
        weights = stacked_weights(layer)
    for rows in counts:
        x = subject.hidden(1, rows)[0]
        backend = registry().get(str(polyfuse.explain("gdn_in_proj", x, *weights).winner))
        claimed = backend.load("gdn_in_proj").capability.attrs.get("strategy", STRATEGIES)
        names = tuple(name for name in STRATEGIES[1:] if name in claimed)
        calls = {name: partial(polyfuse.gdn_in_proj, x, *weights, strategy=name) for name in names}
        walls = {name: round(subject.queued_us(call), 3) for name, call in calls.items()}
        yield StrategyRow(rows, False, choose_projection_strategy(x, *weights, names), walls)
        if subject.captures:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                chosen = choose_projection_strategy(x, *weights, names)
                x.clone()  # an empty graph is warned of
            replays = {name: round(subject.device_us(call), 3) for name, call in calls.items()}
            yield StrategyRow(rows, True, chosen, replays)


def measure_conv(subject: TextModel, lengths: Sequence[int], compiled: bool) -> Iterator[ConvRow]:
    """`gdn_conv_prep` against a conv of its own before `gdn_post_conv`, for one sequence of each length."""
    layer = subject.layer
    weight = layer.conv1d.weight.squeeze(1)
    heads = {name: getattr(layer, name) for name in ("num_k_heads", "head_k_dim", "head_v_dim")}
    torch._dynamo.reset()
    convs: dict[str, Callable[..., torch.Tensor]] = {"separate": _conv}
    if compiled:
        convs["separate, compiled"] = torch.compile(_conv, dynamic=False)
    for tokens in lengths:
        x = subject.random(tokens, layer.conv_dim)
        gates = *(subject.random(tokens, layer.num_v_heads) for _ in range(2)), layer.A_log, layer.dt_bias
        one_pass = subject.device_us(partial(polyfuse.gdn_conv_prep, x, weight, *gates, **heads))
        yield ConvRow(tokens, "one pass", round(one_pass, 3), 1.0)
        for name, conv in convs.items():

            def separate(conv: Callable[..., torch.Tensor] = conv, x: torch.Tensor = x, gates: Any = gates) -> Any:
                return polyfuse.gdn_post_conv(conv(x, weight), *gates, **heads)

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Dynamo's advice on code that is compiled for comparison only
                us = subject.device_us(separate)
            yield ConvRow(tokens, name, round(us, 3), round(us / one_pass, 4))


def measure_layer(subject: TextModel, phase: str, batch: int, tokens: int) -> LayerRow:
    """The first layer, and its parts, on `tokens` of each of `batch` sequences, in a `phase`: prefill or decode."""
    layer, x = subject.layer, subject.hidden(batch, tokens)
    call = partial(layer, x, subject.cache(batch) if phase == "decode" else None)
    times: dict[str, dict[str, float]] = {}
    rule_us = 0.0
    for variant in VARIANTS:
        with subject.variant(variant):
            with subject.no_delta_rule() as seen:
                us = {"all": subject.device_us(call)}
            us["gdn_in_proj"] = subject.device_us(partial(subject.projected, x, variant))
            with subject.no_projections(x, variant), subject.no_delta_rule(normalises=False):
                us["gdn_conv_prep"] = subject.device_us(call)
            if variant == "untouched":
                ((arguments, options),) = seen
                us["l2norm"] = subject.device_us(partial(subject.l2norm, *arguments[:2]))
                rule_us = 1e3 * subject.wall_ms(partial(subject.delta_rule(phase), *arguments, **options))
            if subject.fp8:
                us["silu_mul_block_quant"] = subject.device_us(partial(subject.mlp, x))
                us["all"] += us["silu_mul_block_quant"]
        times[variant] = us
    return layer_row(phase, batch, tokens, times["untouched"], times["accelerated"], rule_us)


def layer_row(
    phase: str, batch: int, tokens: int, before: Mapping[str, float], after: Mapping[str, float], rule_us: float
) -> LayerRow:
    """A row from microseconds by part, among them `all`; what a variant lacks takes no time in it."""
    names = [name for name in before if name != "all"]
    times = {name: (before[name], after.get(name, 0.0)) for name in names}
    rest = [whole["all"] - sum(pair[i] for pair in times.values()) for i, whole in enumerate((before, after))]
    total = before["all"] - after["all"]
    parts = [
        Part(name, round(old, 3), round(new, 3), round(old - new, 3), (old - new) / total)
        for name, (old, new) in (*times.items(), ("rest", (rest[0], rest[1])))
    ]
    return LayerRow(phase, batch, tokens, round(before["all"], 3), round(after["all"], 3), round(rule_us, 1), parts)


def measure_prefill(subject: TextModel, lengths: Sequence[int]) -> Iterator[ModelRow]:
    """A new sequence of each length, with a cache that grows."""
    for tokens in lengths:
        ids = subject.ids(1, tokens)
        for variant in VARIANTS:
            with subject.variant(variant):
                ms = subject.wall_ms(partial(subject.model, ids, use_cache=True))
            yield _model_row("prefill", 1, 0, tokens, "eager", variant, ms)


def measure_decode(subject: TextModel, batches: Sequence[int]) -> Iterator[ModelRow]:
    """Steps of one token for each sequence, after the context."""
    for batch in batches:
        for variant in VARIANTS:
            with subject.variant(variant):
                ms = subject.wall_ms(subject.step(batch), calls=20)
            yield _model_row("decode", batch, subject.context, batch, "eager", variant, ms)


def measure_decode_graphs(subject: TextModel, batches: Sequence[int]) -> Iterator[ModelRow]:
    """The same steps, captured."""
    for batch in batches:
        for variant in VARIANTS:
            with subject.variant(variant):
                ms = subject.device_us(subject.step(batch)) / 1e3
            yield _model_row("decode", batch, subject.context, batch, "graph", variant, ms)


def _model_row(phase: str, batch: int, context: int, tokens: int, mode: str, variant: str, ms: float) -> ModelRow:
    ms = round(ms, 4)
    return ModelRow(phase, batch, context, tokens, mode, variant, ms, round(tokens / ms * 1e3, 2))


def _noting_errors(rows: Iterator[ModelRow], notes: list[str]) -> Iterator[ModelRow]:
    """The rows until one cannot be captured, and then a note of why."""
    try:
        yield from rows
    except RuntimeError as error:
        notes.append(f"decode in a graph: {str(error).splitlines()[0]}")


def _conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Causal depthwise conv and SiLU of rows [tokens, channels], as Transformers computes them."""
    channels, width = weight.shape
    padded = conv1d(x.t()[None], weight[:, None], padding=width - 1, groups=channels)
    return silu(padded[0, :, : len(x)]).t()
