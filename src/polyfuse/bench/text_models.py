"""Text models with Gated DeltaNet layers and random weights, and the parts of a layer: what `bench model` runs."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import getclosurevars
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch.nn.functional import pad

from polyfuse.bench.ops import _graph_replay, _quiet_stream, _wall
from polyfuse.integrations.transformers import _gated_delta_net, accelerate, restore
from polyfuse.integrations.transformers._fp8_mlp import ALIGNED, BLOCK, block_scaled_mm
from polyfuse.runtime.encoder.capture import graph_runtime
from polyfuse.unfused import block_quant

# Configuration, model, and whose sizes the configuration has by default.
MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextModel", "Qwen3-Next-80B-A3B"),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5TextModel", "Qwen3.5-9B"),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeTextModel", "Qwen3.5-35B-A3B"),
}
VOCABULARY = 1024
CONTEXT, TINY_CONTEXT = 2048, 32  # cached tokens before a decode step
RULES = {"prefill": "torch_chunk_gated_delta_rule", "decode": "torch_recurrent_gated_delta_rule"}
VARIANTS = "untouched", "accelerated"
WARM_UP = 2
SLOW_CALLS = 3  # on a CPU
MLP = "gate_proj", "up_proj", "down_proj"

_TINY = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_TINY |= {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
_TINY |= {"linear_value_head_dim": 16}
_TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_TINY_EXPERTS |= {"shared_expert_intermediate_size": 128}


class TextModel:
    """A text model without a head, with seeded random weights, that is accelerated and restored again.

    `name` is one of `MODELS`; every fourth of its `layers` is full attention, the others are Gated DeltaNet layers.
    bfloat16 on an accelerator, float32 on a CPU. `fp8` quantises the weights of its dense MLPs and shared experts to
    float8_e4m3fn in blocks of 128 x 128, as Transformers keeps them.
    """

    def __init__(self, name: str, device: str, tiny: bool = False, layers: int = 4, fp8: bool = False) -> None:
        config_name, class_name, sizes = MODELS[name]
        self.name, self.device, self.tiny, self.layers, self.fp8 = name, device, tiny, layers, fp8
        self.sizes = "tiny" if tiny else sizes
        self.context = TINY_CONTEXT if tiny else CONTEXT
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.captures = graph_runtime(torch.device(device)).captures
        settings: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": layers}
        if tiny:
            settings |= _TINY if name == "qwen3_5" else _TINY | _TINY_EXPERTS
        self.config: Any = getattr(transformers, config_name)(**settings)
        torch.manual_seed(0)
        with torch.device(device):
            self.model: Any = getattr(transformers, class_name)._from_config(self.config, dtype=self.dtype).eval()
            if fp8:
                _quantise_mlps(self.model)
        self.layer: Any = self.model.layers[0].linear_attn
        mlp = self.model.layers[0].mlp
        self.mlp: Any = getattr(mlp, "shared_expert", mlp)

    @contextmanager
    def variant(self, name: str) -> Iterator[None]:
        """The model as one of `VARIANTS`, then untouched again."""
        if name == "accelerated":
            accelerate(self.model)
        try:
            yield
        finally:
            if name == "accelerated":
                restore(self.model)

    def fp8_linear(self) -> AbstractContextManager[Any]:
        """With `fp8`, an FP8 linear function for Transformers, which takes its own from the hub.

        The activation is quantised by `polyfuse.unfused.block_quant`, under torch.compile on an accelerator, and
        multiplied by the GEMM that the accelerated model has. Untouched and accelerated models both call it.
        """
        if not self.fp8:
            return nullcontext()
        from transformers.integrations import finegrained_fp8

        quantise = block_quant if self.device == "cpu" else torch.compile(block_quant, dynamic=True)
        return patch.object(finegrained_fp8, "fp8_linear", _linear_of(quantise))

    def wait(self) -> None:
        """For the device."""
        if self.device != "cpu":
            torch.accelerator.synchronize(self.device)

    def wall_ms(self, function: Callable[[], Any], calls: int = 5) -> float:
        """Median milliseconds of a call, with the device idle before and after it."""
        for _ in range(WARM_UP):
            function()
        times = []
        for _ in range(SLOW_CALLS if self.device == "cpu" else calls):
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - started)
        return median(times) * 1e3

    def queued_us(self, function: Callable[[], Any]) -> float:
        """Wall microseconds per call of calls in a row."""
        for _ in range(WARM_UP):
            function()
        return _wall(function, self.wait, calls=SLOW_CALLS if self.device == "cpu" else 20, rounds=5)

    def device_us(self, function: Callable[[], Any]) -> float:
        """Device microseconds per call of a captured run of calls; wall time where there are no graphs."""
        if not self.captures:
            return 1e3 * self.wall_ms(function)
        for _ in range(WARM_UP):
            function()
        with _quiet_stream():
            return _graph_replay(function, rounds=7)

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers in the model's dtype."""
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

    def hidden(self, batch: int, tokens: int) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden]."""
        return self.random(batch, tokens, self.config.hidden_size)

    def ids(self, batch: int, tokens: int) -> torch.Tensor:
        """Token ids [batch, tokens]."""
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randint(VOCABULARY, (batch, tokens), device=self.device, generator=generator)

    def cache(self, batch: int, fixed: bool = False) -> Any:
        """The cache after `context` tokens, the same for each sequence; `fixed` has room for one more and no more."""
        cache: Any = transformers.DynamicCache(config=self.config)
        if fixed:
            cache = transformers.StaticCache(config=self.config, max_cache_len=self.context + 1)
        self.model(self.ids(1, self.context), past_key_values=cache)
        cache.reorder_cache(torch.zeros(batch, dtype=torch.long, device=self.device))
        return cache

    def step(self, batch: int) -> Callable[[], None]:
        """A decode step with a fixed cache, which forgets its token again: each call is as the first."""
        cache, ids = self.cache(batch, fixed=True), self.ids(batch, 1)
        lengths = [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]

        def call() -> None:
            self.model(ids, past_key_values=cache)
            for length in lengths:
                length.fill_(self.context)

        return call

    def delta_rule(self, phase: str) -> Callable[..., Any]:
        """What Transformers calls for a phase, `prefill` or `decode`."""
        return getattr(self._names(), RULES[phase])

    def delta_rule_name(self, phase: str) -> str:
        """The function that runs for a phase, with its module: a kernel's, or that of Transformers in PyTorch."""
        rule: Any = self.delta_rule(phase)
        if isinstance(rule, nn.Module):  # what the kernels package makes of a function
            rule = getclosurevars(type(rule).forward).nonlocals["func"]
        found = getclosurevars(rule).nonlocals["implementation"]
        return f"{found.__module__}.{found.__qualname__}"

    @contextmanager
    def no_delta_rule(self, normalises: bool = True) -> Iterator[list[tuple[Any, Any]]]:
        """In place of the delta rule, memory for its result; yields a list that its arguments are noted in.

        With `normalises` it computes the l2norm of q and k where it is asked to.
        """
        seen: list[tuple[Any, Any]] = []

        def rule(query: Any, key: Any, value: Any, **options: Any) -> tuple[Any, Any]:
            seen[:] = [((query, key, value), options)]
            if normalises and options["use_qk_l2norm_in_kernel"]:
                self.l2norm(query, key)
            return torch.empty_like(value, memory_format=torch.contiguous_format), options["initial_state"]

        rules: Any = dict.fromkeys(RULES.values(), rule)
        with patch.multiple(self._names(), **rules):
            yield seen

    def l2norm(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both normalised by Transformers' own function, in their dtype."""
        norm = self._names().l2norm
        return norm(query), norm(key)

    def projected(self, x: torch.Tensor, variant: str) -> list[torch.Tensor]:
        """What the first layer's input projections give in a variant."""
        if variant == "accelerated":
            return list(_gated_delta_net._project(self.layer, x.flatten(0, 1)))
        return [projection(x) for projection in _gated_delta_net._projections(self.layer)]

    @contextmanager
    def no_projections(self, x: torch.Tensor, variant: str) -> Iterator[None]:
        """The first layer with its input projections done, and without its gated norm and output projection."""
        outputs = self.projected(x, variant)
        with ExitStack() as stack:
            if variant == "accelerated":
                stack.enter_context(patch.object(_gated_delta_net, "_project", lambda *_: outputs))
            else:
                for module, output in zip(_gated_delta_net._projections(self.layer), outputs, strict=True):
                    stack.enter_context(patch.object(module, "forward", lambda _, output=output: output))
            stack.enter_context(patch.object(self.layer.norm, "forward", lambda hidden, gate: hidden))
            stack.enter_context(patch.object(self.layer.out_proj, "forward", lambda hidden: hidden))
            yield

    def _names(self) -> Any:
        """The Python module of the model's classes, whose functions its layers call by name."""
        return sys.modules[type(self.layer).__module__]


def _quantise_mlps(model: nn.Module) -> None:
    """Put FP8 weights into every MLP of a model."""
    for module in list(model.modules()):
        children = module._modules
        if all(name in children for name in MLP):
            for name in MLP:
                setattr(module, name, _quantised(children[name]))


def _quantised(linear: Any) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    fp8: Any = FP8Linear(linear.in_features, linear.out_features, block_size=(BLOCK, BLOCK)).requires_grad_(False)
    blocks = linear.weight.detach().float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / 448  # [N / 128, K / 128]
    fp8.weight.copy_((blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn))
    fp8.weight_scale_inv.copy_(scale)
    return fp8.eval()


def _linear_of(quantise: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., torch.Tensor]:
    def fp8_linear(input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, **options: Any) -> torch.Tensor:
        rows = input.flatten(0, -2)
        q, row_scale = quantise(
            pad(rows, (0, 0, 0, -len(rows) % ALIGNED)), group_size=BLOCK, scale_layout="col_major", scale_min=0.0
        )
        out = block_scaled_mm(q, row_scale, weight, scale, input.dtype)[: len(rows)]
        return out.view(*input.shape[:-1], len(weight))

    return fp8_linear
