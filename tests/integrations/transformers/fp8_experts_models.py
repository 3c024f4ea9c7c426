"""Tiny models whose experts have FP8 weights, and what experts compute, written out token by token."""

from typing import Any

import torch
from torch.nn.functional import silu
from transformers import FineGrainedFP8Config, Qwen3_5MoeTextConfig, Qwen3NextConfig
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM

from polyfuse.integrations.transformers import accelerate
from tests.integrations.transformers.fp8_mlp_models import FP8, emulated_linear

HIDDEN, INTERMEDIATE, EXPERTS, CHOSEN = 256, 128, 6, 2
FAMILIES = {
    "qwen3_5_moe": (Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig),
    "qwen3_next": (Qwen3NextForCausalLM, Qwen3NextConfig),
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": INTERMEDIATE,
    "shared_expert_intermediate_size": 128,
}
OWN_FUNCTIONS = FP8Experts.__init__, FP8Experts.forward
# Modules that keep their weights, as patterns of names.
OTHERS = [
    "lm_head",
    ".*linear_attn",
    ".*self_attn",
    ".*shared_expert",
    ".*shared_expert_gate",
]


def build(family: str = "qwen3_5_moe", implementation: str = "eager", **quantisation: Any) -> Any:
    """A model with FP8 experts, as Transformers makes one of a checkpoint's config."""
    cls, config_class = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = cls._from_config(
        config_class(**SIZES), dtype=torch.bfloat16, experts_implementation=implementation
    ).eval()
    # Transformers wraps the class's functions once more for each model.
    FP8Experts.__init__, FP8Experts.forward = OWN_FUNCTIONS  # type: ignore[method-assign]
    replace_with_fp8_linear(model, OTHERS, FineGrainedFP8Config(**quantisation))
    for module in model.modules():
        if isinstance(module, FP8Experts):
            fill(module)
    return model.eval()


def fill(experts: Any) -> None:
    """Give experts, which Transformers builds without data, random weights and scales."""
    generator = torch.Generator().manual_seed(0)
    experts.to_empty(device="cpu")
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dtype == FP8:
            # Past 464 PyTorch 2.11 gives NaN.
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 100).clamp(-448, 448).to(FP8))
        else:
            size = 1.0 if "activation" in name else 1e-3
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * size).to(parameter.dtype))


def experts_of(model: Any) -> Any:
    """The experts of the first layer."""
    return model.model.layers[0].mlp.experts


def patched(model: Any) -> Any:
    """The model with its experts fused, and nothing else."""
    return accelerate(model, parts=["fp8_experts"])


def sample(tokens: int, chosen: int = CHOSEN, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any, Any]:
    """Hidden states [tokens, HIDDEN], the experts of each token, and their weights, in the model's dtype."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, experts = scores.topk(chosen, dim=-1)
    return x, experts, (weights / weights.sum(-1, keepdim=True)).to(dtype)


def written_out(experts: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts' result, one token and one expert after the other: all roundings are those of Transformers' loop.

    Sums are in float32, in the order of the experts' ranks.
    """
    block = (128, 128)
    results = []
    for row, ids, factors in zip(x, chosen.tolist(), weights, strict=True):
        total = torch.zeros(x.shape[1])
        for expert, factor in zip(ids, factors, strict=True):
            if expert >= experts.num_experts:
                continue
            first = emulated_linear(
                row[None], experts.gate_up_proj[expert], experts.gate_up_proj_scale_inv[expert], block
            )
            gate, up = first.chunk(2, dim=-1)
            second = emulated_linear(
                silu(gate) * up, experts.down_proj[expert], experts.down_proj_scale_inv[expert], block
            )
            total += (second * factor.to(second.dtype))[0].float()
        results.append(total.to(x.dtype))
    return torch.stack(results)


def run(experts: Any, *args: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = experts(*args)
    return out
