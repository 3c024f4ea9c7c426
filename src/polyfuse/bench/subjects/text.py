"""Text models with Gated DeltaNet layers, their inputs and caches: what `bench model` runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers

from polyfuse.bench.baseline import untouched
from polyfuse.bench.subjects.base import Architecture, Subject
from polyfuse.bench.subjects.fp8 import fp8_linear, quantise
from polyfuse.bench.subjects.gated_delta_net import LayerParts
from polyfuse.bench.subjects.variants import ACCELERATED, UNTOUCHED, choose_variants, rules_of
from polyfuse.dispatch import device_of

VOCABULARY = 1024
LOOP = "untouched experts run Transformers' loop over experts: its grouped kernel comes from the hub"
CONTEXT, TINY_CONTEXT = 2048, 32  # cached tokens before a decode step

_TINY = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_TINY_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
# The defaults of each configuration are the sizes of a released model.
MODELS: Mapping[str, Architecture] = {
    "qwen3_next": Architecture("Qwen3NextModel", _TINY | _TINY_EXPERTS, sizes="Qwen3-Next-80B-A3B"),
    "qwen3_5": Architecture("Qwen3_5TextModel", _TINY, sizes="Qwen3.5-9B"),
    "qwen3_5_moe": Architecture("Qwen3_5MoeTextModel", _TINY | _TINY_EXPERTS, sizes="Qwen3.5-35B-A3B"),
}


class TextModel(Subject):
    """A text model without a head, and the inputs and caches of its calls.

    `name` is one of `MODELS`; every fourth of its `depth` layers is full attention, the others are Gated DeltaNet
    layers. `fp8` quantises the weights of its MLPs, shared experts and experts. `layer` is the first layer's Gated
    DeltaNet, `parts` takes it apart, `mlp` is the MLP or shared expert after it, and `experts` are those beside that,
    or None. `variants` are those that the machine has, and `notes` say why it lacks others.
    """

    def __init__(self, name: str, device: str, tiny: bool = False, depth: int = 4, fp8: bool = False) -> None:
        settings = {"vocab_size": VOCABULARY, "num_hidden_layers": depth}
        super().__init__(name, device, tiny, MODELS[name], settings)
        self.depth, self.fp8 = depth, fp8
        self.context = TINY_CONTEXT if tiny else CONTEXT
        if fp8:
            quantise(self.model)
        self.layer: Any = self.model.layers[0].linear_attn
        self.parts = LayerParts(self.layer)
        mlp = self.model.layers[0].mlp
        self.mlp: Any = getattr(mlp, "shared_expert", mlp)
        self.experts: Any = getattr(mlp, "experts", None)
        self.variants, self.notes = choose_variants(self.parts.names)
        if fp8 and self.experts is not None:
            self.kinds = ["gated_delta_net", "fp8_mlp", "fp8_experts"]
            self.notes = [*self.notes, LOOP]

    @contextmanager
    def variant(self, name: str) -> Iterator[None]:
        """The model as one of `variants`, then untouched again."""
        kind = device_of(self.layer.A_log, "torch").kind
        way = UNTOUCHED if untouched(name) else ACCELERATED
        with rules_of(name, self.parts.names, kind), super().variant(way):
            yield

    def fp8_linear(self) -> AbstractContextManager[Any]:
        """A block in which a model with `fp8` runs; for any other it does nothing."""
        return fp8_linear(self.device) if self.fp8 else nullcontext()

    def hidden(self, batch: int, tokens: int) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden]."""
        return self.random(batch, tokens, self.config.hidden_size)

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the first layer calls its experts with, for hidden states x."""
        seen: list[tuple[torch.Tensor, ...]] = []
        hook = self.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
        try:
            self.model.layers[0].mlp(x)
        finally:
            hook.remove()
        return seen[0]

    def ids(self, batch: int, tokens: int) -> torch.Tensor:
        """Token ids [batch, tokens]."""
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randint(VOCABULARY, (batch, tokens), device=self.device, generator=generator)

    def cache(self, batch: int, fixed: bool = False) -> Any:
        """The cache after `context` tokens, the same for each sequence; a `fixed` one has room for one more token."""
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
