"""SGLang's functions against plain float64 PyTorch, over the sizes of SGLang's own tests, and what they refuse."""

import pytest
import torch

from polyfuse.compat import sglang
from tests.compat import engines
from tests.compat.test_vllm import RULE, assert_near, normal, rule_arguments


@pytest.mark.parametrize("counts", [torch.int32, torch.int64])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("width", [2048, 4096, 7168])
def test_masked_silu_mul_block_quant(width: int, power_of_two: bool, counts: torch.dtype) -> None:
    """The experts and widths of SGLang's benchmark of this kernel; 16 rows an expert in place of thousands."""
    experts, rows, group = 6, 16, 128
    x = normal(experts, rows, width, dtype=torch.bfloat16) * 4
    x[0, 3:] = torch.nan  # past the last valid row
    masked_m = torch.tensor([3, 16, 0, 1, 15, 8], dtype=counts)
    valid = torch.arange(rows) < masked_m[:, None]
    output = torch.full((experts, rows, width // 2), 5.0).to(torch.float8_e4m3fn)
    scale = torch.full((experts, width // 2 // group, rows), 7.0).mT
    sglang.silu_and_mul_masked_post_quant_fwd(x, output, scale, group, masked_m, power_of_two)
    assert (output.float()[~valid] == 5).all()
    assert (scale[~valid] == 7).all()

    y = engines.rounded_silu_and_mul(x)
    want, want_scale = (part[valid] for part in engines.block_quant(y, group, 448, 1e-10 / 448, power_of_two))
    # A silu next to the middle of two numbers may be rounded to either: y then is one step of bfloat16 off.
    got = scale[valid].double()
    assert (got == want_scale.float()).float().mean() > 0.97
    assert_near(got, want_scale, rtol=1.0 if power_of_two else 2.0**-7)
    q = output[valid].float()
    same = (got == want_scale.float()).repeat_interleave(group, -1)
    assert_near(q[same], want[same], rtol=2.0**-4 + 2.0**-7, atol=1.001 * 2.0**-10)
    rounded = want.float().to(torch.float8_e4m3fn).float()
    assert (q == rounded)[same].float().mean() > 0.99


def test_a_group_of_zeros_has_the_least_scale() -> None:
    output, scale = torch.ones(1, 2, 4).to(torch.float8_e4m3fn), torch.ones(1, 2, 1)
    sglang.silu_and_mul_masked_post_quant_fwd(torch.zeros(1, 2, 8), output, scale, 4, torch.tensor([2]))
    assert (output.float() == 0).all()
    torch.testing.assert_close(scale, torch.full((1, 2, 1), 1e-10 / 448), rtol=2.0**-22, atol=0)


def test_nan_reaches_its_group() -> None:
    x = torch.ones(1, 2, 16)
    x[0, 1, 0] = torch.nan
    output, scale = torch.ones(1, 2, 8).to(torch.float8_e4m3fn), torch.ones(1, 2, 2)
    sglang.silu_and_mul_masked_post_quant_fwd(x, output, scale, 4, torch.tensor([2]))
    assert scale.isnan().tolist() == [[[False, False], [True, False]]]
    assert output.float().isnan().sum() == 4


@pytest.mark.parametrize("dtype", RULE)
@pytest.mark.parametrize(
    ("boundaries", "heads", "dims"),
    [
        ([0, 3, 3, 10], (2, 4), (8, 6)),
        # Sizes of SGLang's test/srt/cpu/test_mamba.py.
        pytest.param([0, 128, 256, 384, 512], (16, 32), (128, 128), marks=pytest.mark.slow),
    ],
)
def test_delta_rule_leaves_its_states_in_the_pool(boundaries, heads, dims, dtype) -> None:
    (key_dim, value_dim), sequences = dims, len(boundaries) - 1
    arrays = rule_arguments(1, boundaries[-1], *heads, key_dim, value_dim, dtype)
    pool = normal(sequences + 3, heads[1], value_dim, key_dim, seed=5)
    before, slots = pool.clone(), torch.tensor([*range(sequences, 0, -1)], dtype=torch.int32)
    o, final, chunks = sglang.chunk_gated_delta_rule(
        **arrays, initial_state=pool, initial_state_indices=slots, cu_seqlens=torch.tensor(boundaries)
    )
    want, last = engines.delta_rule(*(x[0] for x in arrays.values()), boundaries, before[slots.long()])
    assert (final, chunks, o.dtype) == (None, None, dtype)
    assert_near(o[0], want, rtol=2.0**-8, atol=RULE[dtype])
    assert_near(pool[slots.long()], last, rtol=0, atol=RULE[dtype])
    others = [slot for slot in range(len(pool)) if slot not in slots.tolist()]
    assert torch.equal(pool[others], before[others])


def test_delta_rule_without_indices_and_without_a_pool() -> None:
    arrays = rule_arguments(2, 4, 1, 2, 8, 6, torch.float32)
    flat = [x.flatten(0, 1) for x in arrays.values()]
    pool = normal(2, 2, 6, 8, seed=5)
    want, last = engines.delta_rule(*flat, [0, 4, 8], pool, 0.5)
    o, _, _ = sglang.chunk_gated_delta_rule(*arrays.values(), 0.5, pool)
    assert_near(o.flatten(0, 1), want, rtol=0, atol=RULE[torch.float32])
    assert_near(pool, last, rtol=0, atol=RULE[torch.float32])
    o, _, _ = sglang.chunk_gated_delta_rule(**arrays, scale=0.5)
    assert_near(o.flatten(0, 1), engines.delta_rule(*flat, [0, 4, 8], 0 * pool, 0.5)[0], rtol=0, atol=2.0**-15)


def test_an_index_of_minus_one_is_no_slot() -> None:
    arrays = rule_arguments(1, 4, 1, 2, 8, 6, torch.float32)
    pool = normal(1, 2, 6, 8)
    before = pool.clone()
    o, _, _ = sglang.chunk_gated_delta_rule(**arrays, initial_state=pool, initial_state_indices=torch.tensor([-1]))
    assert torch.equal(pool, before)
    assert_near(o[0], engines.delta_rule(*(x[0] for x in arrays.values()), [0, 4], 0 * pool)[0], rtol=0, atol=2.0**-15)
