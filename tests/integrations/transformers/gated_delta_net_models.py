"""Tiny models and layers of Qwen3-Next, Qwen3.5 and Qwen3.5-MoE, their inputs, and what their results differ by."""

from typing import Any

import torch
import transformers
from torch import nn

from polyfuse.integrations.transformers._gated_delta_net import gated_delta_nets

MODELING = "transformers.models.qwen3_5.modeling_qwen3_5"
FAMILIES = {"Qwen3Next": "", "Qwen3_5": "Text", "Qwen3_5Moe": "Text"}
KINDS = ["linear_attention", "full_attention", "linear_attention"]
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"vocab_size": 97, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
TINY |= {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4}
# Every expert is used: a router that picks some turns a rounding into a jump.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS |= {"shared_expert_intermediate_size": 32}

# The ops of one call of a layer, in order.
PREFILL = ["gdn_in_proj", "gdn_conv_prep", "gated_delta_rule", "gated_rms_norm"]
DECODE = ["gdn_in_proj", "gdn_decode"]

# Of the largest logit: sums of 64 to 96 terms in another order, 90 roundings at worst, in each of two layers.
BOUND = 1e-5


def build(family: str = "Qwen3_5", dtype: torch.dtype = torch.float32, kinds: list[str] = KINDS, seed: int = 0) -> Any:
    """A tiny model, with conv weights that make its layers matter."""
    config = getattr(transformers, f"{family}{FAMILIES[family]}Config")
    experts = {} if family == "Qwen3_5" else EXPERTS
    torch.manual_seed(seed)
    settings = config(**TINY, **experts, layer_types=kinds, num_hidden_layers=len(kinds))
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(settings, dtype=dtype).eval()
    for layer in gated_delta_nets(model).values():
        nn.init.normal_(layer.conv1d.weight, std=0.5)
        nn.init.normal_(layer.out_proj.weight, std=0.5)
    return model


def build_layer(family: str = "Qwen3_5", dtype: torch.dtype = torch.float32) -> Any:
    (layer,) = gated_delta_nets(build(family, dtype, KINDS[:1])).values()
    return layer


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def hidden(rows: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(ids, **kwargs).logits


def in_parts(model: Any, ids: torch.Tensor, lengths: list[int], cache: Any = None) -> torch.Tensor:
    """The logits of tokens that are given in parts of these lengths, with a cache between them."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    return torch.cat([logits(model, part, past_key_values=cache) for part in ids.split(lengths, dim=1)], dim=1)


def change(old: torch.Tensor, new: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((new.double() - old.double()).abs().max() / old.double().abs().max())


def states(cache: Any) -> list[torch.Tensor]:
    layers = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
    return [state for layer in layers for state in (layer.conv_states[0], layer.recurrent_states[0])]


def spy(seen: list[Any], name: str, function: Any) -> Any:
    """The function, noting each call under a name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return function(*args, **kwargs)

    return call


def write(layer: Any) -> None:
    with torch.no_grad():
        layer.in_proj_z.weight.mul_(2)
