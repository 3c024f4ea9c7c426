"""`triton_attention` against masked attention in float64."""

import os
import subprocess
import sys
from math import isnan
from pathlib import Path

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from polyfuse.runtime import triton_attention as module
from polyfuse.runtime.encoder.segments import masked_attention
from polyfuse.runtime.triton_attention import Launch, supported, triton_attention
from polyfuse.spec import SpecError

# The interpreter computes with NumPy, which reports every NaN of the unused rows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

INTERPRETED = module.INTERPRETED.value
DEVICE = "cpu" if INTERPRETED else "cuda"
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
# Scores reach 32, where the unit of fp32 is 2**-18. In half precision, weights and result are rounded as well: half a
# unit each of values up to 1, or in the interpreter, which truncates, a unit of the result alone.
BOUND = {torch.float32: 2**-16, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def inputs(rows: int, heads: int, head_dim: int, dtype: torch.dtype, lengths: list[int]):
    """Contiguous query and key, value inside a fused tensor, all NaN past the segments; and the boundaries."""
    generator = torch.Generator().manual_seed(rows + head_dim)
    make = lambda *shape: (torch.rand(*shape, generator=generator) * 2 - 1).to(DEVICE, dtype)  # noqa: E731
    query, key, value = make(rows, heads, head_dim) * 4, make(rows, heads, head_dim) * 4, make(rows, 3, heads, head_dim)
    for tensor in (query, key, value):
        tensor[sum(lengths) :] = float("nan")
    return query, key, value[:, 2], boundaries_of(lengths)


def boundaries_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def worst(got: torch.Tensor, query, key, value, boundaries) -> float:
    """Largest error in the used rows."""
    want = masked_attention(query.double(), key.double(), value.double(), boundaries, query.shape[-1] ** -0.5)
    used = int(boundaries[-1])
    return (got[:used].double() - want[:used]).abs().max().item()


@pytest.fixture(params=[(64, 64), (64, 32)], ids="{0[0]}x{0[1]}".format)
def block_keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "LAUNCHES", (Launch(2**31, *request.param, 4, 2),))
    return request.param[1]


@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_values(head_dim: int, dtype: torch.dtype) -> None:
    tensors = inputs(150, 2, head_dim, dtype, [64, 1, 80, 0, 0])
    got = triton_attention(*tensors, head_dim**-0.5)
    assert got.dtype == dtype
    assert got.shape == tensors[0].shape
    assert got.is_contiguous()
    assert worst(got, *tensors) <= BOUND[dtype]


@pytest.mark.parametrize(
    "lengths",
    [
        [63, 64, 65, 1, 127, 128, 129, 31, 32, 33],
        [1] * 37 + [0] * 27,
        [0, 0, 5, 0, 70, 0],
        [200],
    ],
    ids=["around the blocks", "single rows", "empty between", "one"],
)
def test_segments(lengths: list[int], block_keys: int) -> None:
    tensors = inputs(sum(lengths) + 9, 1, 24, torch.float32, lengths)
    assert worst(triton_attention(*tensors, 24**-0.5), *tensors) <= BOUND[torch.float32]


def test_every_block_has_its_program() -> None:
    """Segments that begin and end anywhere in a block of queries, and fill the batch."""
    lengths = [(37 * i) % 130 for i in range(1, 12)]
    tensors = inputs(sum(lengths), 1, 16, torch.float32, lengths)
    assert worst(triton_attention(*tensors, 0.25), *tensors) <= BOUND[torch.float32]


def test_large_scores_do_not_overflow() -> None:
    query, key, value, boundaries = inputs(70, 1, 16, torch.float32, [70])
    got = triton_attention(query * 100, key * 100, value, boundaries, 0.25)
    assert worst(got, query * 100, key * 100, value, boundaries) <= 1e-6  # the largest takes all
    assert not got.isnan().any()


@pytest.mark.parametrize("change", ["last stride", "odd row stride", "odd start"])
def test_any_strides(change: str) -> None:
    query, key, value, boundaries = inputs(20, 2, 16, torch.float16, [20])
    if change == "last stride":
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
    elif change == "odd row stride":
        key = torch.nn.functional.pad(key.flatten(1), (0, 3))[:, :32].unflatten(1, (2, 16))
    else:
        key = torch.nn.functional.pad(key.flatten(), (1, 0))[1:].view(20, 2, 16)
    assert (
        worst(triton_attention(query, key, value, boundaries, 0.25), query, key, value, boundaries)
        <= BOUND[torch.float16]
    )


def test_nothing_to_do() -> None:
    tensors = inputs(0, 2, 16, torch.float16, [0, 0])
    assert triton_attention(*tensors, 0.25).shape == (0, 2, 16)
    tensors = inputs(5, 2, 16, torch.float16, [0, 0])
    assert triton_attention(*tensors, 0.25).shape == (5, 2, 16)


def test_supported() -> None:
    taken = [d for d in range(200) if supported(d, torch.bfloat16)]
    assert taken == list(range(16, 129, 8))
    assert not supported(64, torch.float64)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"query": torch.zeros(4, 2, 20)},
            r"query: expected \[rows, heads, 16 to 128 in steps of 8\] in float16, bfloat16 or float32, "
            r"got \[4, 2, 20\] torch.float32",
        ),
        ({"query": torch.zeros(4, 2, 16, dtype=torch.float64)}, r"query: expected .*, got \[4, 2, 16\] torch.float64"),
        ({"query": torch.zeros(4, 32)}, r"query: expected .*, got \[4, 32\]"),
        ({"key": torch.zeros(4, 1, 16)}, r"key: expected \[4, 2, 16\] torch.float32, as query, got \[4, 1, 16\]"),
        ({"value": torch.zeros(4, 2, 16).half()}, r"value: expected .*, as query, got \[4, 2, 16\] torch.float16"),
        ({"boundaries": torch.tensor([0, 4])}, r"boundaries: expected \[segments \+ 1\] int32, got \[2\] torch.int64"),
        ({"scale": 0.0}, "scale: expected a number above 0, got 0.0"),
        ({"scale": float("nan")}, "scale: expected a number above 0, got nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, object], text: str) -> None:
    arguments = {name: torch.zeros(4, 2, 16) for name in ("query", "key", "value")}
    arguments |= {"boundaries": torch.tensor([0, 4], dtype=torch.int32), "scale": 0.25} | change
    with pytest.raises(SpecError, match=f"^triton_attention: {text}"):
        triton_attention(**arguments)


COMPILE = """
import re, subprocess, sys
import triton  # before polyfuse, which chooses the interpreter where there is no GPU
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from polyfuse.runtime.triton_attention import LAUNCHES, _kernel, _split

position = _kernel.arg_names.index
pointers = dict.fromkeys(["q_ptr", "k_ptr", "v_ptr", "out_ptr"], "*bf16")
strides = dict.fromkeys(["q_row", "q_head", "k_row", "k_head", "v_row", "v_head"], "i32")
for launch in LAUNCHES:
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


def test_compiles_for_hopper_without_spilling(tmp_path: Path) -> None:
    """At least two programs share a multiprocessor, so that one's softmax overlaps another's products."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path / "cubin")],
        env=inherited | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        programs, *rest = line.split()
        assert int(programs) >= 2
        assert rest == ["True", "False", "True", "True"]
    assert len(done.stdout.splitlines()) == len(module.LAUNCHES)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_like_flash_attention(dtype: torch.dtype) -> None:
    lengths = [1000, 17, 2048, 300, 0, 0]
    query, key, value, boundaries = inputs(sum(lengths), 16, 72, dtype, lengths)
    got = triton_attention(query, key, value, boundaries, 72**-0.5)
    want = varlen_attn(query, key, value, boundaries, boundaries, 2048, 2048, scale=72**-0.5)
    assert (got - want).abs().max().item() <= 2 * BOUND[dtype]


@gpu
def test_capture_and_replay_with_other_boundaries() -> None:
    lengths = [[600, 0, 0, 0], [100, 500, 0, 0], [1, 63, 65, 400], [0, 0, 0, 0]]
    query, key, value, boundaries = inputs(600, 16, 72, torch.bfloat16, lengths[0])
    triton_attention(query, key, value, boundaries, 72**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = triton_attention(query, key, value, boundaries, 72**-0.5)
    for each in lengths:
        boundaries.copy_(boundaries_of(each))
        graph.replay()
        used = sum(each)
        assert torch.equal(got[:used], triton_attention(query, key, value, boundaries, 72**-0.5)[:used])
        if used:
            error = worst(got, query, key, value, boundaries)
            assert not isnan(error)
            assert error <= BOUND[torch.bfloat16]
