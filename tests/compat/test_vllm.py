"""vLLM's functions against plain float64 PyTorch, over the sizes of vLLM's own tests, and what they refuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from polyfuse.compat import vllm
from polyfuse.runtime import register_stream_module
from polyfuse.spec import SpecError
from tests.compat import engines

HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative, of one rounding


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor, *, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


# Sizes of vLLM's tests/kernels/test_fused_gdn_post_conv.py.
POST_CONV = [
    pytest.param(rows, *sizes, marks=[pytest.mark.slow] if rows > 128 else [])
    for sizes in ((16, 32, 128, 128), (16, 64, 128, 128), (4, 8, 64, 64))
    for rows in (0, 1, 16, 128, 512, 2048)
]


@pytest.mark.parametrize("output_g_exp", [True, False])
@pytest.mark.parametrize("apply_l2norm", [True, False])
@pytest.mark.parametrize(("rows", "heads", "value_heads", "key_dim", "value_dim"), POST_CONV)
def test_post_conv(rows, heads, value_heads, key_dim, value_dim, apply_l2norm, output_g_exp) -> None:
    bf16 = torch.bfloat16
    conv_output = normal(rows, 2 * heads * key_dim + value_heads * value_dim, dtype=bf16)
    a, b = normal(rows, value_heads, dtype=bf16, seed=1), normal(rows, value_heads, dtype=bf16, seed=2)
    A_log, dt_bias = normal(value_heads, seed=3) - 2, normal(value_heads, seed=4) / 10
    sizes = (heads, key_dim, value_dim, apply_l2norm, output_g_exp)
    got = vllm.fused_post_conv_prep(conv_output, a, b, A_log, dt_bias, *sizes)
    want = engines.post_conv(conv_output, a, b, A_log, dt_bias, *sizes)
    assert [part.dtype for part in got] == [bf16, bf16, bf16, torch.float32, torch.float32]
    assert all(part.is_contiguous() for part in got)
    for part, expected in zip(got[:3], want[:3], strict=True):
        assert_near(part, expected, rtol=1.001 * HALF_STEP[bf16])
    for part, expected in zip(got[3:], want[3:], strict=True):
        # Below 10 float32 roundings, each times 1 and the size of an exponent, which is below 12 here.
        assert_near(part, expected, rtol=2.0**-17, atol=2.0**-17 if output_g_exp else 0)


def test_post_conv_keeps_a_small_decay() -> None:
    """log(1 + exp(-20)) is 0 in float32; the decay is -2e-9."""
    a = torch.full((1, 1), -20.0)
    _, _, _, g, _ = vllm.fused_post_conv_prep(torch.zeros(1, 3), a, a, torch.zeros(1), torch.zeros(1), 1, 1, 1)
    assert g.item() == pytest.approx(-2.0611536e-9, rel=1e-6)


# Sizes of vLLM's tests/kernels/core/test_fused_silu_mul_block_quant.py whose groups are whole.
SILU_MUL: list[Any] = [
    (1, 64),
    (1, 1024),
    (1, 2048),
    (1, 5120),
    (16, 64),
    (16, 1024),
    (16, 5120),
    (128, 64),
    (128, 1024),
    (512, 64),
]
SILU_MUL += [pytest.param(512, 5120, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", ["floor", "real"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), SILU_MUL)
def test_silu_mul_block_quant(rows, width, dtype, group_size, transposed, size) -> None:
    """Inputs as small as vLLM's, whose scales are the least one, and inputs with real scales."""
    if width % group_size:
        with pytest.raises(SpecError, match="divisible by 2\\*group_size=256, got 128"):
            vllm.silu_and_mul_per_block_quant(normal(rows, 2 * width), group_size, torch.float8_e4m3fn)
        return
    x = normal(rows, 2 * width, dtype=dtype) * (1 / width if size == "floor" else 4)
    q, scale = vllm.silu_and_mul_per_block_quant(x, group_size, torch.float8_e4m3fn, None, transposed)
    want, want_scale = engines.block_quant(engines.silu_and_mul(x), group_size, 448, 1 / (448 * 512))
    assert (q.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert q.is_contiguous()
    assert (scale.mT if transposed else scale).is_contiguous()
    assert (want_scale == 1 / (448 * 512)).all() == (size == "floor")
    # 12 float32 roundings, each times 1 and the gate, above -24.
    assert_near(scale, want_scale, rtol=12 * 25 * 2.0**-24)
    # One rounding to three bits of fraction, or to a multiple of 2^-9.
    assert_near(q, want, rtol=1.001 * 2.0**-4, atol=1.001 * 2.0**-10)


def test_silu_mul_block_quant_to_int8() -> None:
    x = normal(16, 2 * 256, dtype=torch.bfloat16) * 4
    q, scale = vllm.silu_and_mul_per_block_quant(x, 128, torch.int8)
    want, want_scale = engines.block_quant(engines.silu_and_mul(x), 128, 127, 2.0**-23)
    assert_near(scale, want_scale, rtol=12 * 25 * 2.0**-24)
    assert q.dtype == torch.int8
    assert_near(q, want, rtol=0, atol=0.5 + 127 * 24 * 25 * 2.0**-24)


def test_silu_mul_block_quant_keeps_nan() -> None:
    x = torch.ones(1, 4 * 128)
    x[0, 3] = torch.nan
    q, scale = vllm.silu_and_mul_per_block_quant(x, 128, torch.float8_e4m3fn)
    assert scale.isnan().tolist() == [[True, False]]
    assert q.float().isnan().sum() == 128


# Grids of vLLM's test of the Triton kernel against its PyTorch form, with its table and merge size.
GRIDS = [
    (1, 4, 4),
    (1, 16, 16),
    (1, 32, 32),
    (1, 48, 48),
    (1, 8, 16),
    (1, 14, 20),
    (1, 32, 48),
    (1, 60, 80),
    (3, 16, 16),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pos_embed(grid: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = normal(48 * 48, 1152, dtype=dtype) / 4
    got = vllm.triton_pos_embed_interpolate(weight, *grid, 48, 2, dtype)
    assert got.dtype == dtype
    assert got.is_contiguous()
    # 12 float32 roundings of sums below 2, and one to dtype.
    assert_near(got, engines.pos_embed(weight, *grid, 48, 2), rtol=HALF_STEP[dtype], atol=12 * 2.0**-23)


def rule_arguments(
    batch: int, rows: int, heads: int, value_heads: int, key_dim: int, value_dim: int, dtype
) -> dict[str, Any]:
    shape = (batch, rows, heads, key_dim)
    q, k = (engines.l2norm(normal(*shape, seed=seed)).to(dtype) for seed in (0, 1))
    v = normal(batch, rows, value_heads, value_dim, dtype=dtype, seed=2)
    g = -torch.rand(batch, rows, value_heads, generator=torch.Generator().manual_seed(3))
    beta = normal(batch, rows, value_heads, seed=4).sigmoid()
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta}


# A wrong layout errs by 0.1 and more. float32 sums of 128 products of size 1 err by 2^-20, over up to 130 rows; 16-bit
# operands by 2^-9 each.
RULE = {torch.float32: 2.0**-15, torch.bfloat16: 2.0**-5}


@pytest.mark.parametrize("dtype", RULE)
@pytest.mark.parametrize("heads", [(2, 4), (4, 4)])
@pytest.mark.parametrize("lengths", [[100], [1, 64, 130, 7], [5, 0, 3]])
def test_delta_rule_of_packed_sequences(lengths, heads, dtype) -> None:
    boundaries = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    arrays = rule_arguments(1, boundaries[-1], *heads, 32, 16, dtype)
    states = normal(len(lengths), heads[1], 16, 32, seed=5)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    o, final = vllm.chunk_gated_delta_rule(
        *arrays.values(), None, states, True, cu_seqlens, torch.zeros(3, 2), torch.zeros(2)
    )
    want, want_final = engines.delta_rule(*(x[0] for x in arrays.values()), boundaries, states)
    assert (o.shape, o.dtype) == (arrays["v"].shape, dtype)
    assert (final.shape, final.dtype, final.is_contiguous()) == (states.shape, torch.float32, True)
    assert_near(o[0], want, rtol=HALF_STEP[dtype], atol=RULE[dtype])
    assert_near(final, want_final, rtol=0, atol=RULE[dtype])


def test_delta_rule_of_a_batch() -> None:
    """Each row of the batch is a sequence; the scale is the caller's; states of 16 bits are read exactly."""
    arrays = rule_arguments(3, 10, 2, 4, 8, 6, torch.float32)
    states = normal(3, 4, 6, 8, dtype=torch.bfloat16, seed=5)
    o, final = vllm.chunk_gated_delta_rule(**arrays, scale=0.5, initial_state=states, output_final_state=True)
    flat = [x.flatten(0, 1) for x in arrays.values()]
    want, want_final = engines.delta_rule(*flat, [0, 10, 20, 30], states, 0.5)
    assert_near(o.flatten(0, 1), want, rtol=0, atol=RULE[torch.float32])
    assert_near(final, want_final, rtol=0, atol=RULE[torch.float32])
    without, none = vllm.chunk_gated_delta_rule(**arrays, scale=0.5)
    assert none is None
    assert_near(
        without.flatten(0, 1), engines.delta_rule(*flat, [0, 10, 20, 30], 0 * states, 0.5)[0], rtol=0, atol=2e-5
    )


def test_delta_rule_into_a_buffer() -> None:
    arrays = rule_arguments(1, 10, 2, 4, 8, 6, torch.bfloat16)
    buffer = torch.full((12, 4, 6), 7.0, dtype=torch.bfloat16)
    o, _ = vllm.chunk_gated_delta_rule(**arrays, core_attn_out=buffer)
    assert o.data_ptr() == buffer.data_ptr()
    assert torch.equal(o, vllm.chunk_gated_delta_rule(**arrays)[0])
    assert torch.equal(buffer[:10], o[0])
    assert (buffer[10:] == 7).all()


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm(dtype: torch.dtype, activation: str) -> None:
    x, z, weight = normal(16, 4, 128, dtype=dtype), normal(16, 4, 128, dtype=dtype, seed=1), normal(128, seed=2)
    got = vllm.rmsnorm_fn(x, weight, None, z, 1e-5, 128, True, activation)
    assert got.dtype == dtype
    want = engines.gated_rms_norm(x, z, weight, 1e-5, activation)
    assert_near(got, want, rtol=HALF_STEP[dtype] + 32 * 2.0**-24)


def test_functions_run_in_order_without_a_stream() -> None:
    log: list[str] = []

    def called(name: str) -> str:
        log.append(name)
        return name

    assert vllm.maybe_execute_in_parallel(lambda: called("a"), lambda: called("b"), None, None) == ("a", "b")
    assert log == ["a", "b"]


def test_functions_run_side_by_side_with_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second function runs on a stream that waits for the first one's, which waits for it in turn."""
    log: list[str] = []

    class Recorder:
        device = torch.device("cpu")

        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            return self.name

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    class Streams:
        current = Recorder("main")

        def current_stream(self, device: torch.device) -> Recorder:
            return self.current

        def Stream(self, device: torch.device) -> Recorder:  # noqa: N802
            return Recorder("side")

        @contextmanager
        def stream(self, stream: Recorder) -> Iterator[None]:
            before, self.current = self.current, stream
            yield
            self.current = before

    module = Streams()
    monkeypatch.setattr("polyfuse._torch.streams._MODULES", {})
    monkeypatch.setattr("polyfuse._torch.streams._pool.streams", {})
    register_stream_module("cpu", module)
    names = (lambda: module.current.name, lambda: module.current.name)
    assert vllm.maybe_execute_in_parallel(*names, None, None, Recorder("theirs")) == ("main", "side")
    assert log == ["side waits for main", "main waits for side"]
