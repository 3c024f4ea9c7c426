"""The Triton backend of `segment_attention`: every case against the oracle, the tiling, and what it compiles to."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import polyfuse
from polyfuse.conformance import Case, Trial, cases, model_cases
from polyfuse.dispatch import Device, registry
from polyfuse.dispatch._select import resolve
from polyfuse.spec import bind
from polyfuse.spec.segment_attention import NAME, SPEC
from polyfuse.triton_impl import segment_attention as module
from polyfuse.triton_impl._common import INTERPRETED
from polyfuse.triton_impl.segment_attention import Tiling, segment_attention

CASES = [*cases(NAME), *model_cases(NAME)]
QUICK = [pytest.param(case, marks=[pytest.mark.slow] if n % 4 else []) for n, case in enumerate(CASES)]

# The interpreter computes with NumPy, which reports every NaN of the rows past the last segment.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DEVICE = "cpu" if INTERPRETED.value else "cuda"
gpu = pytest.mark.skipif(INTERPRETED.value, reason="needs a GPU")


def is_claimed(case: Case) -> bool:
    return case.dims["dim"] % 8 == 0 and 16 <= case.dims["dim"] <= 128


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    status, detail = Trial(NAME, case, 0).on(registry().get("triton"), DEVICE)
    if is_claimed(case):
        assert (status, detail) == ("passed", "")
    else:
        assert status == "skipped"
        assert f"unsupported: dim={case.dims['dim']}: must be" in detail


def tensors(lengths: list[int], dim: int = 24, dtype: torch.dtype = torch.float32, heads: int = 1) -> list[Any]:
    """q, k, v with 5 rows past the segments, all NaN, and the boundaries."""
    generator = torch.Generator().manual_seed(dim)
    arrays = torch.randn(3, sum(lengths) + 5, heads, dim, generator=generator)
    arrays[:, sum(lengths) :] = torch.nan
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return [*arrays.to(DEVICE, dtype), ends.to(DEVICE)]


def by_segment(q: Any, k: Any, v: Any, ends: Any) -> torch.Tensor:
    """The rows of all segments, in float64."""
    parts = []
    for start, end in pairwise(ends.tolist()):
        one, other, values = (x[start:end].double().transpose(0, 1) for x in (q, k, v))
        weights = (one @ other.mT * q.shape[-1] ** -0.5).softmax(-1)
        parts.append((weights @ values).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(params=[(64, 64), (64, 32), (32, 128)], ids="{0[0]}x{0[1]}".format)
def tiles(request: pytest.FixtureRequest, forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILINGS", (Tiling(2**31, *request.param, 4, 2),))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "lengths",
    [
        [63, 64, 65, 1, 127, 128, 129, 31, 32, 33],
        [(37 * i) % 130 for i in range(1, 12)],
        [0, 0, 5, 0, 70, 0],
        [200],
    ],
    ids=["around_the_tiles", "ends_anywhere_in_a_tile", "empty_between", "one"],
)
def test_every_tile_has_its_program(lengths: list[int]) -> None:
    given = tensors(lengths)
    got = segment_attention(*given)
    torch.testing.assert_close(got[: sum(lengths)].double(), by_segment(*given), atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("change", ["last_stride", "odd_row_stride", "odd_start", "boundaries"])
def test_any_strides(change: str) -> None:
    q, k, v, ends = tensors([6, 14], dim=16, dtype=torch.float16, heads=2)
    want = segment_attention(q, k, v, ends)[:20]
    if change == "last_stride":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    elif change == "odd_row_stride":
        k = torch.nn.functional.pad(k.flatten(1), (0, 3))[:, :32].unflatten(1, (2, 16))
    elif change == "odd_start":
        k = torch.nn.functional.pad(k.flatten(), (1, 0))[1:].view(k.shape)
    else:
        ends = torch.stack([ends, -ends], 1).to(torch.int64)[:, 0]
    assert torch.equal(segment_attention(q, k, v, ends)[:20], want)


def test_nothing_to_do_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernel", None)
    q, k, v, ends = tensors([4])
    assert segment_attention(q, k, v, ends[:1]).shape == q.shape
    assert segment_attention(q[:0], k[:0], v[:0], ends * 0).shape == (0, 1, 24)
    assert segment_attention(q[:, :0], k[:, :0], v[:, :0], ends).shape == (9, 0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_on_cuda(dtype: torch.dtype) -> None:
    """PyTorch's kernel for head dims that it does not pad, this one for the others."""
    winners = {}
    for dim in (8, 16, 32, 40, 48, 64, 72, 80, 88, 96, 104, 120, 128, 136, 160):
        arrays = {name: torch.empty(4, 2, dim, dtype=dtype) for name in "qkv"}
        ends = torch.zeros(2, dtype=torch.int32)
        call = bind(SPEC, {**arrays, "cu_seqlens": ends, "scale": None, "max_seqlen": None})
        winners[dim] = resolve(NAME, call, "torch", Device("cuda", (9, 0)), None)[0][0]
    first = {dim for dim, name in winners.items() if name == "triton"}
    assert first == {16, 40, 48, 72, 80, 88, 104, 120}
    assert set(winners.values()) == {"triton", "torch"}


COMPILE = """
import re, subprocess, sys
import triton  # before polyfuse.triton_impl, which chooses the interpreter where there is no GPU
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from polyfuse.triton_impl.segment_attention import TILINGS, _kernel, _split

position = _kernel.arg_names.index
pointers = dict.fromkeys(["q_ptr", "k_ptr", "v_ptr", "out_ptr"], "*bf16")
strides = dict.fromkeys(["q_row", "q_head", "k_row", "k_head", "v_row", "v_head"], "i32")
for launch in TILINGS:
    main, rest = _split(72)
    constants = dict(HEADS=16, D=72, MAIN=main, REST=rest, SEGMENTS=16)
    constants |= dict(BLOCK_M=launch.block_queries, BLOCK_N=launch.block_keys)
    types = pointers | strides | {"boundaries_ptr": "*i32", "segments": "i32", "scale": "fp32"}
    source = ASTSource(
        _kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(position(name),): value for name, value in constants.items()},
        attrs={(position(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with open(sys.argv[1], "wb") as file:
        file.write(made.asm["cubin"])
    usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", sys.argv[1]], text=True)
    registers = int(re.search(r"REG:(\\d+)", usage)[1])
    stack = int(re.search(r"STACK:(\\d+)", usage)[1])
    ptx = made.asm["ptx"]
    print(
        min(2**16 // (32 * launch.warps * -(-registers // 8 * 8)), 232448 // (made.metadata.shared + 1024)),
        "wgmma.mma_async" in ptx,
        "mma.sync" in ptx,
        "cp.async.cg" in ptx,
        stack <= 32,
    )
"""


@pytest.mark.slow
def test_compiles_for_hopper_without_spilling(tmp_path: Path) -> None:
    """At least two programs share a multiprocessor, so that one's softmax overlaps another's products."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path / "cubin")],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        programs, *rest = line.split()
        assert int(programs) >= 2
        assert rest == ["True", "False", "True", "True"]
    assert len(done.stdout.splitlines()) == len(module.TILINGS)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_like_flash_attention(dtype: torch.dtype) -> None:
    lengths = [1000, 17, 2048, 300, 0, 0]
    given = tensors(lengths, 72, dtype, 16)
    used = sum(lengths)
    got = polyfuse.segment_attention(*given, max_seqlen=2048, backend="triton")
    want = polyfuse.segment_attention(*given, max_seqlen=2048, backend="torch")
    unit = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    assert (got[:used] - want[:used]).abs().max().item() <= unit


@gpu
def test_capture_and_replay_with_other_boundaries() -> None:
    q, k, v, ends = tensors([600, 0, 0, 0], 72, torch.bfloat16, 16)
    segment_attention(q, k, v, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = polyfuse.segment_attention(q, k, v, ends, max_seqlen=600)
    for lengths in ([600, 0, 0, 0], [100, 500, 0, 0], [1, 63, 65, 400], [0, 0, 0, 0]):
        ends.copy_(torch.tensor([0, *lengths]).cumsum(0))
        graph.replay()
        used = sum(lengths)
        assert torch.equal(got[:used], segment_attention(q, k, v, ends)[:used])
        torch.testing.assert_close(got[:used].double(), by_segment(q, k, v, ends), atol=2.0**-8, rtol=2.0**-7)
