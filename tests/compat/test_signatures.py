"""The parameters of every function are those of the engine's, in its order and with its defaults."""

import inspect
from types import ModuleType
from typing import Any

import pytest

from polyfuse.compat import sglang, vllm

# Of each function its parameters and their defaults; "" is none.
Signatures = dict[str, dict[str, Any]]
VLLM: Signatures = {
    "fused_post_conv_prep": {
        **dict.fromkeys(("conv_output", "a", "b", "A_log", "dt_bias", "num_k_heads", "head_k_dim", "head_v_dim"), ""),
        "apply_l2norm": True,
        "output_g_exp": False,
    },
    "silu_and_mul_per_block_quant": {
        **dict.fromkeys(("input", "group_size", "quant_dtype"), ""),
        "scale_ub": None,
        "is_scale_transposed": False,
    },
    "triton_pos_embed_interpolate": dict.fromkeys(
        ("embed_weight", "t", "h", "w", "num_grid_per_side", "m_size", "dtype"), ""
    ),
    "chunk_gated_delta_rule": {
        **dict.fromkeys(("q", "k", "v", "g", "beta"), ""),
        "scale": None,
        "initial_state": None,
        "output_final_state": False,
        "cu_seqlens": None,
        "chunk_indices": None,
        "chunk_offsets": None,
        "use_qk_l2norm_in_kernel": False,
        "core_attn_out": None,
    },
    "rmsnorm_fn": {
        **dict.fromkeys(("x", "weight", "bias"), ""),
        "z": None,
        "eps": 1e-6,
        "group_size": None,
        "norm_before_gate": True,
        "activation": "swish",
    },
    "maybe_execute_in_parallel": {**dict.fromkeys(("fn0", "fn1", "event0", "event1"), ""), "aux_stream": None},
}
SGLANG: Signatures = {
    "silu_and_mul_masked_post_quant_fwd": {
        **dict.fromkeys(("input", "output", "output_scale", "quant_group_size", "masked_m"), ""),
        "scale_ue8m0": False,
        "gemm1_alpha": 0.0,
        "gemm1_clamp_limit": 0.0,
    },
    "chunk_gated_delta_rule": {
        **dict.fromkeys(("q", "k", "v", "g", "beta"), ""),
        "scale": None,
        "initial_state": None,
        "initial_state_indices": None,
        "cu_seqlens": None,
        "head_first": False,
        "use_qk_l2norm_in_kernel": False,
        "inplace_update": True,
    },
}
FUNCTIONS = [(vllm, name, given) for name, given in VLLM.items()]
FUNCTIONS += [(sglang, name, given) for name, given in SGLANG.items()]


@pytest.mark.parametrize(("module", "name", "given"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", None))
def test_the_signature_is_that_of_the_engine(module: ModuleType, name: str, given: dict[str, Any]) -> None:
    found = inspect.signature(getattr(module, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)
    assert [(p.name, "" if p.default is p.empty else p.default) for p in found] == list(given.items())


def test_every_function_is_listed() -> None:
    assert sorted(VLLM) == sorted(vllm.__all__)
    assert sorted(SGLANG) == sorted(sglang.__all__)
