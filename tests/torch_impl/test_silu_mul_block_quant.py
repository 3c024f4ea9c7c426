from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import from_numpy, registry, to_numpy
from polyfuse.reference._numerics import round_to, to_f64
from polyfuse.spec import FLOATS
from polyfuse.spec.block_quant import QMAX, SCALE_FORMATS, SCALE_LAYOUTS
from polyfuse.torch_impl.silu_mul_block_quant import silu_mul_block_quant
from tests._torch.cases import SILU_MUL_BLOCK_QUANT

NAME = "silu_mul_block_quant"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CASES = [*(case for case in cases(NAME) if case.repeat == 1), *SILU_MUL_BLOCK_QUANT]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers, so that NaN equals NaN."""
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int32)


def assert_same_bits(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(raw(one), raw(other))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_and_leaves_its_inputs(case: Case, device: str) -> None:
    trial = Trial(NAME, case, 0)
    values, call = trial.inputs()
    arrays = {k: from_numpy(v, "torch", device) for k, v in values.items() if isinstance(v, np.ndarray)}
    before = {k: to_numpy(v).tobytes() for k, v in arrays.items()}
    assert trial.check(silu_mul_block_quant(**arrays, **call.attrs), call) is None
    assert {k: to_numpy(arrays[k]).tobytes() for k in before} == before


@pytest.mark.parametrize("device", DEVICES)
def test_the_public_function_runs_it(device: str) -> None:
    assert Trial(NAME, SILU_MUL_BLOCK_QUANT[0], 0).on(registry().get("torch"), device) == ("passed", "")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_does_not_depend_on_the_batch(dtype: str, device: str) -> None:
    """With one element per group the scales show every bit of y."""
    x = (8 * normal(67, 2 * 21)).to(device, getattr(torch, dtype))
    q, scale = silu_mul_block_quant(x, group_size=1)
    for i in range(len(x)):
        assert_same_bits(silu_mul_block_quant(x[i : i + 1], group_size=1), (q[i : i + 1], scale[i : i + 1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_materialize_changes_no_bit_of_the_unfused_ops(dtype: str, device: str) -> None:
    gate, up = normal(2, 64, 128).to(device, getattr(torch, dtype)) * 4
    y = (silu(gate) * up).float()
    amax = y.abs().amax(-1, keepdim=True)
    for divisor, reciprocal in ((torch.full_like(amax, 448), False), (448.0, device == "cuda")):
        scale = (amax / divisor).clamp(min=1 / (448 * 512))
        q = (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        got = silu_mul_block_quant(torch.cat([gate, up], -1), materialize=True, reciprocal=reciprocal)
        assert_same_bits(got, (q, scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("materialize", [False, True])
def test_gate_and_up_as_two_tensors(materialize: bool, masked: bool, device: str) -> None:
    """Column slices of buffers of different widths, bit for bit as the two side by side."""
    gate = normal(2, 6, 200, dtype=torch.bfloat16).to(device)[..., 8:104]
    up = normal(2, 6, 150, dtype=torch.bfloat16).to(device)[..., 53:149]
    num_rows = torch.tensor([6, 6], dtype=torch.int32, device=device) if masked else None
    options: Any = {"num_rows": num_rows, "group_size": 48, "limit": 0.75, "materialize": materialize}
    want = silu_mul_block_quant(torch.cat([gate, up], -1), **options)
    assert_same_bits(silu_mul_block_quant(gate, up=up, **options), want)
    assert not torch.equal(raw(silu_mul_block_quant(up, up=gate, **options)[0]), raw(want[0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant_dtype", list(QMAX)[:3])
def test_the_casts_of_torch_round_to_nearest_even_and_keep_nan(quant_dtype: str, device: str) -> None:
    """What the op relies on, at every value and every midpoint of the format."""
    grid = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, quant_dtype)).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    values = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [np.nan, -np.nan]])
    cast = torch.from_numpy(values).float().to(device).to(getattr(torch, quant_dtype))
    np.testing.assert_array_equal(to_f64(to_numpy(cast)), to_f64(round_to(values, quant_dtype)))


@pytest.mark.parametrize("scale_layout", SCALE_LAYOUTS[:3])
@pytest.mark.parametrize("scale_format", SCALE_FORMATS[:3])
@pytest.mark.parametrize("masked", [False, True])
def test_traces_and_never_reads_num_rows(masked: bool, scale_format: str, scale_layout: str) -> None:
    """A fake tensor has no values: reading one back raises."""
    options: Any = {"group_size": 32, "scale_format": scale_format, "scale_layout": scale_layout}
    x = normal(2, 5, 2 * 160, dtype=torch.bfloat16)
    num_rows = torch.tensor([5, 5], dtype=torch.int32) if masked else None
    want = silu_mul_block_quant(x, num_rows=num_rows, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = None if num_rows is None else torch.empty_like(num_rows)
        got = silu_mul_block_quant(torch.empty_like(x), num_rows=fake, **options)
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("options", [{}, {"quant_dtype": "int8", "scale_format": "ue8m0_packed", "materialize": True}])
def test_compiles_as_one_graph(options: Any) -> None:
    x = normal(6, 2 * 256, dtype=torch.bfloat16)
    compiled = torch.compile(silu_mul_block_quant, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, scale_layout="col_major_tma", **options), silu_mul_block_quant(x, **options))


@pytest.mark.parametrize("with_up", [False, True])
def test_an_empty_width(with_up: bool) -> None:
    x = torch.zeros(3, 0)
    q, scale = silu_mul_block_quant(x, up=x if with_up else None, scale_format="ue8m0_packed")
    assert (q.shape, scale.shape) == ((3, 0), (3, 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_its_inputs() -> None:
    x, num_rows = normal(2, 6, 2 * 128).cuda(), torch.tensor([6, 6], dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    silu_mul_block_quant(x, num_rows=num_rows)
    with torch.cuda.graph(graph):
        q, scale = silu_mul_block_quant(x, num_rows=num_rows)
    x.copy_(x.flip(1))
    graph.replay()
    assert_same_bits((q, scale), silu_mul_block_quant(x, num_rows=num_rows))
