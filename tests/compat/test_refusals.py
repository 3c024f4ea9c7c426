"""What an op cannot do, and what is wrong, is refused in one line, before anything runs."""

from types import ModuleType
from typing import Any

import pytest
import torch

import polyfuse
from polyfuse.compat import sglang, vllm
from polyfuse.spec import SpecError
from tests.compat.test_vllm import rule_arguments

E4M3, F32, I32 = torch.float8_e4m3fn, torch.float32, torch.int32
Given = dict[str, Any]

TABLE = torch.zeros(9, 4)
QUANT: Given = {"input": TABLE, "group_size": 2, "quant_dtype": torch.int8}
EMBED: Given = {"embed_weight": TABLE, "t": 1, "h": 2, "w": 2, "num_grid_per_side": 3, "m_size": 2, "dtype": F32}
NORM: Given = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "bias": None, "z": torch.zeros(2, 8)}
RULE: Given = rule_arguments(2, 4, 1, 2, 8, 8, F32)
FP8 = torch.zeros(2, 3, 8).to(E4M3)
MASKED: Given = {
    "input": torch.zeros(2, 3, 16),
    "output": FP8,
    "output_scale": torch.zeros(2, 3, 2),
    "quant_group_size": 4,
    "masked_m": torch.zeros(2, dtype=I32),
}
ENDS = torch.tensor([0, 4, 8])

# Of each function a call that is right, and what is changed of it: (changes, the text of the error).
UNSUPPORTED: list[tuple[ModuleType, str, Given, list[tuple[Given, str]]]] = [
    (vllm, "silu_and_mul_per_block_quant", QUANT, [({"scale_ub": torch.ones(1)}, r"scale_ub=\[1\]")]),
    (vllm, "chunk_gated_delta_rule", RULE, [({"use_qk_l2norm_in_kernel": True}, "use_qk_l2norm_in_kernel=True")]),
    (
        vllm,
        "rmsnorm_fn",
        NORM,
        [
            ({"bias": torch.zeros(8)}, r"bias=\[8\]"),
            ({"z": None}, "z=None"),
            ({"group_size": 4}, "group_size=4"),
            ({"norm_before_gate": False}, "norm_before_gate=False"),
        ],
    ),
    (
        sglang,
        "chunk_gated_delta_rule",
        RULE,
        [
            ({"use_qk_l2norm_in_kernel": True}, "use_qk_l2norm_in_kernel=True"),
            ({"head_first": True}, "head_first=True"),
            ({"inplace_update": False}, "inplace_update=False"),
        ],
    ),
    (
        sglang,
        "silu_and_mul_masked_post_quant_fwd",
        MASKED,
        [({"gemm1_alpha": 1.702}, "gemm1_alpha=1.702"), ({"gemm1_clamp_limit": 7.0}, "gemm1_clamp_limit=7.0")],
    ),
]
SHARED: list[tuple[Given, str]] = [
    ({"cu_seqlens": ENDS}, "q: expected B=1 with cu_seqlens, got 2; try q.flatten"),
    ({"g": TABLE}, "g: expected .B, T, .... of 3 dimensions, got .9, 4."),
    ({"beta": RULE["beta"][:1]}, "beta: expected the B and T of q, .2, 4., got .1, 4."),
    ({"initial_state": torch.zeros(2, 2, 8, 7)}, "initial_state: expected .S, HV=2, V=8, K=8., got .2, 2, 8, 7."),
    ({"scale": -1.0}, "gated_delta_rule: scale"),
]
WRONG: list[tuple[ModuleType, str, Given, list[tuple[Given, str]]]] = [
    (
        vllm,
        "silu_and_mul_per_block_quant",
        QUANT,
        [
            ({"input": TABLE[None]}, "input: expected .tokens, 2.hidden., got .1, 9, 4."),
            ({"group_size": 3}, "divisible by 2.group_size=6, got 4"),
        ],
    ),
    (
        vllm,
        "triton_pos_embed_interpolate",
        EMBED,
        [
            ({"num_grid_per_side": 4}, "embed_weight: expected .16, D. with num_grid_per_side=4, got .9, 4."),
            ({"h": 3}, "merge_size"),
        ],
    ),
    (
        vllm,
        "chunk_gated_delta_rule",
        RULE,
        [
            *SHARED,
            ({"initial_state": torch.zeros(3, 2, 8, 8)}, "initial_state"),
            ({"chunk_indices": TABLE}, "chunk_indices: expected None without cu_seqlens"),
            ({"chunk_offsets": TABLE}, "chunk_offsets: expected None without cu_seqlens"),
            ({"core_attn_out": TABLE}, "core_attn_out: expected a contiguous buffer of at least 128 elements"),
            ({"core_attn_out": torch.zeros(9, 16).T}, "core_attn_out: expected a contiguous buffer"),
            ({"core_attn_out": torch.zeros(128).half()}, "core_attn_out: expected the dtype of q"),
        ],
    ),
    (vllm, "rmsnorm_fn", NORM, [({"activation": "relu"}, "activation: expected swish or silu or sigmoid, got relu")]),
    (
        sglang,
        "chunk_gated_delta_rule",
        RULE,
        [
            *SHARED,
            ({"initial_state": torch.zeros(1, 2, 8, 8)}, "state_pool"),
            ({"initial_state_indices": ENDS}, "initial_state_indices: expected None without initial_state"),
        ],
    ),
    (
        sglang,
        "silu_and_mul_masked_post_quant_fwd",
        MASKED,
        [
            ({"input": TABLE}, "input: expected .experts, tokens, 2.hidden., got .9, 4."),
            ({"quant_group_size": 6}, "input: expected a last dimension divisible by 2.quant_group_size=12, got 16"),
            ({"output": MASKED["input"]}, "output: expected .2, 3, 8. of torch.float8_e4m3fn"),
            ({"output": FP8.mT.contiguous().mT}, "output: expected a contiguous tensor"),
            ({"output_scale": MASKED["input"]}, "output_scale: expected .2, 3, 2. of torch.float32"),
            ({"masked_m": torch.zeros(2)}, "masked_m: expected .2. of int32 or int64"),
        ],
    ),
]


def calls(table: list[tuple[ModuleType, str, Given, list[tuple[Given, str]]]]) -> list[Any]:
    return [
        pytest.param(module, name, right | changed, text, id=f"{module.__name__}.{name}-{text}")
        for module, name, right, changes in table
        for changed, text in changes
    ]


@pytest.mark.parametrize(("module", "name", "right"), [row[:3] for row in (*UNSUPPORTED, *WRONG)])
def test_the_call_that_is_changed_is_right(module: ModuleType, name: str, right: Given) -> None:
    getattr(module, name)(**right)


@pytest.mark.parametrize(("module", "name", "given", "text"), calls(UNSUPPORTED))
def test_unsupported(module: ModuleType, name: str, given: Given, text: str) -> None:
    before = polyfuse.call_counts()
    with pytest.raises(NotImplementedError, match=f"^{name}: {text} is not supported; .+"):
        getattr(module, name)(**given)
    assert polyfuse.call_counts() == before


@pytest.mark.parametrize(("module", "name", "given", "text"), calls(WRONG))
def test_wrong(module: ModuleType, name: str, given: Given, text: str) -> None:
    before = polyfuse.call_counts()
    with pytest.raises(SpecError, match=text):
        getattr(module, name)(**given)
    assert polyfuse.call_counts() == before
