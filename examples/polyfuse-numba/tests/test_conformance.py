"""Every op against the oracle: what is claimed is right, and what is skipped is skipped for a declared reason."""

import pytest
import torch

import polyfuse
from polyfuse.conformance import run
from polyfuse.spec import OPS, Unsupported

DECLARED = ("unsupported: strategy=", "more output elements than")


@pytest.mark.parametrize("op", OPS)
def test_op_conforms(op):
    report = run([op], ["numba"], level="standard")
    assert report.ok, [(r.case, r.detail) for r in report.results if r.status == "failed"]
    skipped = [r.detail for r in report.results if r.status == "skipped"]
    assert all(detail.startswith(DECLARED) for detail in skipped), skipped


@pytest.mark.parametrize("strategy", ["parallel", "merged", "fused"])
def test_what_is_not_claimed_is_refused(strategy):
    x = torch.ones(2, 8)
    with pytest.raises(Unsupported, match=f"numba: strategy='{strategy}': supports 'auto', 'sequential'"):
        polyfuse.gdn_in_proj(x, x, x, strategy=strategy, backend="numba")


def test_gradients_are_refused():
    x = torch.ones(2, 256, requires_grad=True)
    with pytest.raises(Unsupported, match="numba: an input requires grad: no backward"):
        polyfuse.silu_mul_block_quant(x, backend="numba")


def test_rows_do_not_depend_on_the_batch():
    x = torch.randn(67, 512, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    many = polyfuse.silu_mul_block_quant(x, backend="numba")
    for row in (0, 33, 66):
        one = polyfuse.silu_mul_block_quant(x[row : row + 1], backend="numba")
        assert torch.equal(one[0].view(torch.uint8), many[0][row : row + 1].view(torch.uint8))
        assert torch.equal(one[1], many[1][row : row + 1])


def test_an_infinite_up_of_a_far_negative_gate_is_infinite():
    x = torch.ones(1, 64)
    x[0, 0], x[0, 32] = -200.0, torch.inf
    q, scale = polyfuse.silu_mul_block_quant(x, group_size=32, backend="numba")
    assert scale.item() == torch.inf
    assert q.float().isnan().tolist() == [[True] + [False] * 31]


def test_a_gate_of_one_head_may_have_any_stride():
    wide = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    conv_out, a, one = torch.ones(1, 12), wide[:, ::2], torch.ones(1)  # strides (2, 2), and contiguous
    sizes = {"num_k_heads": 1, "head_k_dim": 4, "head_v_dim": 4}
    strided = polyfuse.gdn_post_conv(conv_out, a, a, one, one, **sizes, backend="numba")
    plain = polyfuse.gdn_post_conv(conv_out, a.clone(), a.clone(), one, one, **sizes, backend="numba")
    assert all(torch.equal(x, y) for x, y in zip(strided, plain, strict=True))
