from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

import polyfuse
from polyfuse.conformance import Case, cases
from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.inputs import make_inputs
from polyfuse.dispatch import from_numpy, to_numpy
from polyfuse.reference import oracle
from polyfuse.spec import OPS, Unsupported, bind
from polyfuse.triton_impl import _common, _launch
from polyfuse.triton_impl import pos_embed_interpolate as module
from polyfuse.triton_impl.pos_embed_interpolate import pos_embed_interpolate
from tests._torch.cases import UNUSABLE_IMAGES
from tests.triton_impl.helpers import CompilingKernel

exact = oracle("pos_embed_interpolate").intervals

SPEC = OPS["pos_embed_interpolate"]
INTERPRETED = _common.INTERPRETED.value
DEVICE = "cpu" if INTERPRETED else "cuda"
MIXED = ((2, 4, 4), (1, 8, 6), (1, 2, 20))  # 120 rows
PHOTOS = Case(
    "photos",
    {"N": 48, "D": 1152},
    dtypes={"table": "bfloat16", "base": "bfloat16"},
    host={"grid_thw": ((1, 32, 32), (1, 24, 38))},
    present=("base",),
)
CASES = [*(case for case in cases(SPEC.name) if case.repeat == 1), PHOTOS]
QUICK = [pytest.param(case, marks=[pytest.mark.slow] if n % 2 else []) for n, case in enumerate(CASES)]


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """What the dispatcher passes: tensors, canonical attributes, and a host grid as tuples."""
    call = bind(SPEC, values)
    arrays = {k: from_numpy(v, "torch", DEVICE) for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**values, **arrays, **call.attrs, **call.host}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_equals_the_oracle_in_a_launch_for_16_images(
    case: Case, launches: list[tuple[int, ...]], poisoned_memory: None
) -> None:
    values = make_inputs(SPEC, case)
    args = arguments(values)
    before = {k: to_numpy(v).tobytes() for k, v in args.items() if isinstance(v, torch.Tensor)}
    got = pos_embed_interpolate(**args)
    assert compare("out", to_numpy(got), exact(**values)["out"], bind(SPEC, values).outputs[0].dtype) is None
    assert {k: to_numpy(args[k]).tobytes() for k in before} == before
    images = 1 if isinstance(args["grid_thw"], torch.Tensor) else sum(t > 0 for t, _, _ in args["grid_thw"])
    assert len(launches) == (max(1, -(-images // 16)) if got.numel() else 0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_an_images_rows_do_not_depend_on_the_batch(mode: str) -> None:
    table = normal(36, 24)
    batch = pos_embed_interpolate(table, MIXED, mode=mode)
    alone = torch.cat([pos_embed_interpolate(table, (image,), mode=mode) for image in MIXED])
    padded = pos_embed_interpolate(table, torch.tensor(MIXED, device=DEVICE), mode=mode, out_rows=150)
    assert batch.count_nonzero() == batch.numel()
    assert torch.equal(batch, alone)
    assert torch.equal(padded, torch.nn.functional.pad(alone, (0, 0, 0, 30)))


@pytest.fixture(params=[(16, 1), (32, 2), (32, 6)], ids=str)
def other_tile(
    request: pytest.FixtureRequest, forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The tiles of a GPU, also where the kernel is interpreted."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 128)
    with module.TILES.using(lambda rows: request.param):
        yield


@pytest.mark.parametrize(("grid", "width"), [(MIXED, 40), (((1, 4, 6),), 192)], ids=["tail_columns", "whole_blocks"])
def test_tiles_do_not_change_bits(grid: Any, width: int, other_tile: None, poisoned_memory: None) -> None:
    case = Case("tile", {"N": 6, "D": width}, host={"grid_thw": grid}, present=("base",))
    values = make_inputs(SPEC, case)
    got = pos_embed_interpolate(**arguments(values))
    assert compare("out", to_numpy(got), exact(**values)["out"], "float32") is None
    with pytest.MonkeyPatch.context() as patch, module.TILES.using(lambda rows: (64, 1)):
        patch.setattr(module, "BLOCK_BYTES", 1024)
        assert torch.equal(pos_embed_interpolate(**arguments(values)), got)


@pytest.mark.parametrize("form", ["one_image", "host_grid", "device_grid"])
def test_wide_row_numbers(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, grid = normal(36, 24), MIXED[:1] if form == "one_image" else MIXED
    rows = sum(t * h * w for t, h, w in grid)
    thw = torch.tensor(grid, device=DEVICE) if form == "device_grid" else grid
    want = pos_embed_interpolate(table, grid, align_corners=False)
    monkeypatch.setattr(module, "WIDE_ROWS", 0)
    assert torch.equal(pos_embed_interpolate(table, thw, align_corners=False, out_rows=rows), want)


def test_the_grid_may_be_strided_and_of_either_int_type() -> None:
    table = normal(36, 8)
    wide = torch.tensor([[7, 1, 4, 6], [7, 2, 2, 2]], device=DEVICE)
    want = pos_embed_interpolate(table, ((1, 4, 6), (2, 2, 2)))
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(pos_embed_interpolate(table, wide.to(dtype)[:, 1:], out_rows=32), want)


def test_a_table_on_its_side() -> None:
    """Transposed tables on transposed images, also of a grid on the device: the same values, in another order."""
    table, image = normal(3 * 5, 8), (1, 4, 6)
    want = pos_embed_interpolate(table, (image,), merge_size=1, table_height=3, align_corners=False)
    turned = table.view(3, 5, 8).transpose(0, 1).reshape(15, 8)
    grid = torch.tensor([(1, 6, 4)], device=DEVICE)
    for thw in (((1, 6, 4),), grid):
        got = pos_embed_interpolate(turned, thw, merge_size=1, table_height=5, align_corners=False, out_rows=24)
        torch.testing.assert_close(got.view(6, 4, 8).transpose(0, 1).reshape(24, 8), want)


def test_a_height_of_a_square_table_changes_nothing() -> None:
    table = normal(36, 8)
    assert torch.equal(pos_embed_interpolate(table, MIXED, table_height=6), pos_embed_interpolate(table, MIXED))


def test_no_images_are_all_padding() -> None:
    grid = torch.zeros((0, 3), dtype=torch.int64, device=DEVICE)
    assert torch.equal(pos_embed_interpolate(normal(36, 8), grid, out_rows=4).cpu(), torch.zeros(4, 8))


@pytest.mark.parametrize("image", UNUSABLE_IMAGES)
def test_an_unusable_image_poisons_the_result(image: tuple[int, int, int]) -> None:
    grid = torch.tensor([(1, 2, 2), image], device=DEVICE)
    assert pos_embed_interpolate(normal(36, 8), grid, out_rows=16).isnan().all()
    assert pos_embed_interpolate(normal(36, 8), grid, base=normal(16, 8), out_rows=16).isnan().all()


FRAMES = tuple((1 + i % 3, 2 + 2 * (i % 4), 2 + 2 * (i % 5)) for i in range(40))


@pytest.mark.parametrize("count", [2, 15, 16, 17, 33, 40])
@pytest.mark.parametrize("padding", [0, 7])
def test_images_of_the_host_are_arguments_of_a_launch_for_each_16(
    count: int, padding: int, launches: list[tuple[int, ...]], poisoned_memory: None
) -> None:
    """They give what a grid on the device gives; (0, 0, 0) is no image, and parts of the result begin anywhere."""
    images = FRAMES[:count]
    rows = sum(t * h * w for t, h, w in images)
    table, base = normal(36, 5), normal(rows + padding, 5, seed=1)
    device = torch.tensor(images, device=DEVICE)
    want = pos_embed_interpolate(table, device, base=base, out_rows=rows + padding, align_corners=False)
    del launches[:]
    scattered = (images[0], (0, 0, 0), *images[1:], (0, 0, 0)) if padding else images
    out_rows = rows + padding if padding else None
    got = pos_embed_interpolate(table, scattered, base=base, out_rows=out_rows, align_corners=False)
    assert torch.equal(got, want)
    assert got[:rows].isfinite().all()
    assert len(launches) == -(-count // 16)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (((1, 4, 2**15), (1, 2, 2)), [(0, 2**17), (2**17, 4)]),  # too wide for an argument
        (((1, 2, 2), (1, 2**15, 2), (1, 2, 2)), [(0, 4), (4, 2**16), (4 + 2**16, 4)]),
        (((1, 4, 2**15 - 1), (1, 2, 2)), [(0, 2**17)]),
        (((2**20, 64, 64), (1, 2, 2)), [(0, 2**32), (2**32, 4)]),  # too many rows
        (((1, 2, 2), (2**20 - 1, 64, 64), (1, 32, 32)), [(0, 2**32 - 3068)]),
    ],
    ids=str,
)
def test_images_that_fit_in_no_argument_have_a_launch_of_their_own(images: Any, expected: Any) -> None:
    assert [(piece.first, piece.rows) for piece in module._pieces(images, None)] == expected


def test_only_padding() -> None:
    for grid in ((), ((0, 0, 0), (0, 0, 0))):
        assert torch.equal(pos_embed_interpolate(normal(36, 8), grid, out_rows=4).cpu(), torch.zeros(4, 8))


@pytest.mark.usefixtures("remembers", "forget_plans")
def test_every_image_is_an_argument_of_one_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the images are: an argument of 64 bits each, so that no batch is compiled for itself."""
    launcher = module._launch
    monkeypatch.setattr(module, "_launch", _launch.Launcher(launcher.op, kernel := CompilingKernel(launcher.kernel)))
    for images in (MIXED, MIXED[:2], FRAMES[:16], ((1, 2, 2), (1, 2, 4))):
        pos_embed_interpolate(normal(36, 8), images)
    assert kernel.how == ["jit", "compiled", "compiled", "compiled"]
    packed = kernel.launches[-1][2][11:27]
    assert all(2**62 <= image < 2**63 for image in packed)
    assert len(set(packed)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38, 1.00390625, 1.01171875, -0.0])
def test_rounding_to_bfloat16(value: float) -> None:
    """A zero table adds nothing: the result is base rounded once; 1.0039 and 1.0117 are ties."""
    base = torch.full((4, 8), value, device=DEVICE)
    got = pos_embed_interpolate(torch.zeros(4, 8, device=DEVICE), ((1, 2, 2),), base=base, out_dtype="bfloat16")
    assert torch.equal(got.nan_to_num(nan=7.0), base.to(torch.bfloat16).nan_to_num(nan=7.0))


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "INTERPRETED", tl.constexpr(False))
    with pytest.raises(Unsupported, match=r"^pos_embed_interpolate: .* CPU tensors .*; set TRITON_INTERPRET=1$"):
        pos_embed_interpolate(torch.zeros(4, 8), ((1, 2, 2),))


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_its_grid() -> None:
    table, grid = normal(36, 24), torch.tensor([(1, 8, 6), (2, 4, 4)], device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    pos_embed_interpolate(table, grid, out_rows=100)
    with torch.cuda.graph(graph):
        out = pos_embed_interpolate(table, grid, out_rows=100)
    for images in (((1, 2, 2), (0, 0, 0)), ((1, 10, 6), (4, 2, 4))):
        grid.copy_(torch.tensor(images))
        graph.replay()
        assert torch.equal(out, pos_embed_interpolate(table, images, out_rows=100))


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("count", [1, 2, 16, 40])
def test_a_captured_graph_holds_the_images_of_the_host(count: int) -> None:
    """It is replayed after other images were computed, and after all that the capture made on the host is gone."""
    table, images = normal(36, 24), FRAMES[:count]
    want = pos_embed_interpolate(table, images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = polyfuse.pos_embed_interpolate(table, [list(image) for image in images], backend="triton")
    module._pieces.cache_clear()
    for _ in range(2):
        out.fill_(float("nan"))
        pos_embed_interpolate(table, FRAMES[::-1])
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.skipif(INTERPRETED, reason="the host waits for no interpreter")
def test_the_host_waits_for_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises where something would synchronise, as a copy of the images would."""
    table = normal(36, 24)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for count in (2, 3, 39):
            pos_embed_interpolate(table, FRAMES[:count])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_under_torch_compile() -> None:
    table = normal(36, 24)
    compiled = torch.compile(lambda x: polyfuse.pos_embed_interpolate(x, MIXED), fullgraph=True, backend="aot_eager")
    with polyfuse.use_backend("triton"):
        assert torch.equal(compiled(table), pos_embed_interpolate(table, MIXED))


@pytest.mark.skipif(not INTERPRETED, reason="about a machine without a GPU")
@pytest.mark.parametrize(
    "first",
    [
        "",
        pytest.param("import triton, triton.language\n", marks=pytest.mark.slow),
        "import transformers.modeling_utils\n",
    ],
)
def test_kernels_are_interpreted_whoever_imports_triton_first(first: str, run_afresh: Callable[..., list[str]]) -> None:
    """Library functions of Triton are needed for it: `tl.sum` and `x.to`, which a kernel of gated_rms_norm calls."""
    code = """
import torch, polyfuse
torch.manual_seed(0)
x, gate, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
ran, want = (polyfuse.gated_rms_norm(x, gate, weight, backend=name) for name in ("triton", "torch"))
print((ran - want).abs().max().item() < 1e-5, polyfuse.call_counts()["gated_rms_norm", "triton"])
"""
    assert run_afresh(first + code)[-1] == "True 1"


COMPILE = """
import re
from tests.triton_impl.hopper import compile_for_hopper
from polyfuse.triton_impl.pos_embed_interpolate import _kernel

aligned = ["table_ptr", "base_ptr", "out_ptr", "table_stride", "base_stride"]
for grid, bicubic in (("*i64", False), (None, True)):
    types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in _kernel.arg_names} | {"grid_ptr": grid}
    constants = dict(D=1152, NH=48, N=48, MERGE=2, BICUBIC=bicubic, ALIGN_CORNERS=True, WIDE=False)
    constants |= dict(BLOCK_ROWS=32, BLOCK_D=64, BLOCKS=2, IMAGES=32) | ({} if grid else {"grid_ptr": None})
    images = [name for name in _kernel.arg_names if name.startswith("image_") and name != "image_stride"]
    types |= dict.fromkeys(images, "i64")
    constants |= dict.fromkeys(images) if grid else {}
    code, spilled = compile_for_hopper(_kernel, types, constants, aligned, warps=8 if bicubic else 4)
    accesses = re.findall(r"(ld|st)\\.global\\S*?\\.(v4\\.b32|b16|b32|v2\\.b32)", code)
    print(*(accesses.count((kind, "v4.b32")) for kind in ("ld", "st")), len(set(accesses)), spilled)
"""


@pytest.mark.slow
def test_compiles_for_hopper_with_16_byte_accesses(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """16-byte loads and stores, kinds of access to elements, and what spills; no GPU is needed."""
    assert run_uninterpreted(COMPILE) == [
        "20 4 2 []",  # 2 blocks x 2 rows a thread x (4 taps + base)
        "34 2 2 []",  # 2 blocks x 1 row a thread x (16 taps + base)
    ]
