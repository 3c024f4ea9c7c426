from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polyfuse.conformance import Case, cases
from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.inputs import make_inputs
from polyfuse.dispatch import from_numpy, to_numpy
from polyfuse.reference import oracle
from polyfuse.spec import OPS, bind
from polyfuse.torch_impl.pos_embed_interpolate import pos_embed_interpolate
from tests._torch.cases import UNUSABLE_IMAGES

exact = oracle("pos_embed_interpolate").intervals

SPEC = OPS["pos_embed_interpolate"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PHOTOS = Case(
    "photos",
    {"N": 48, "D": 1152},
    dtypes={"table": "bfloat16", "base": "bfloat16"},
    host={"grid_thw": ((1, 32, 32), (1, 24, 38))},
    present=("base",),
)
CASES = [*(case for case in cases(SPEC.name) if case.repeat == 1), PHOTOS]


def arguments(values: dict[str, Any], device: str) -> dict[str, Any]:
    """What the dispatcher passes: tensors, canonical attributes, and a host grid as tuples."""
    call = bind(SPEC, values)
    arrays = {k: from_numpy(v, "torch", device) for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**values, **arrays, **call.attrs, **call.host}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_and_leaves_its_inputs(case: Case, device: str) -> None:
    values = make_inputs(SPEC, case)
    args = arguments(values, device)
    before = {k: to_numpy(v).tobytes() for k, v in args.items() if isinstance(v, torch.Tensor)}
    got = pos_embed_interpolate(**args)
    assert compare("out", to_numpy(got), exact(**values)["out"], bind(SPEC, values).outputs[0].dtype) is None
    assert {k: to_numpy(args[k]).tobytes() for k in before} == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_an_images_rows_do_not_depend_on_the_batch(mode: str, device: str) -> None:
    table, grid = normal(36, 24).to(device), ((2, 4, 4), (1, 8, 6), (1, 2, 20))
    batch = pos_embed_interpolate(table, grid, mode=mode)
    alone = torch.cat([pos_embed_interpolate(table, (image,), mode=mode) for image in grid])
    padded = pos_embed_interpolate(table, torch.tensor(grid, device=device), mode=mode, out_rows=150)
    assert torch.equal(batch, alone)
    assert torch.equal(padded, torch.nn.functional.pad(alone, (0, 0, 0, 30)))


def test_the_grid_may_be_strided_and_of_either_int_type() -> None:
    table = normal(36, 8)
    wide = torch.tensor([[7, 1, 4, 6], [7, 2, 2, 2]])
    want = pos_embed_interpolate(table, ((1, 4, 6), (2, 2, 2)))
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(pos_embed_interpolate(table, wide.to(dtype)[:, 1:], out_rows=32), want)


def test_no_images_are_all_padding() -> None:
    out = pos_embed_interpolate(normal(36, 8), torch.zeros((0, 3), dtype=torch.int64), out_rows=4)
    assert torch.equal(out, torch.zeros(4, 8))


@pytest.mark.parametrize("image", UNUSABLE_IMAGES)
def test_an_unusable_image_poisons_the_result(image: tuple[int, int, int]) -> None:
    grid = torch.tensor([(1, 2, 2), image])
    assert pos_embed_interpolate(normal(36, 8), grid, out_rows=16).isnan().all()
    assert pos_embed_interpolate(normal(36, 8), grid, base=normal(16, 8), out_rows=16).isnan().all()


def test_a_device_grid_is_never_read() -> None:
    """A fake tensor has no values: reading one back raises."""
    with FakeTensorMode():
        table, base = torch.empty(36, 24, dtype=torch.bfloat16), torch.empty(150, 24)
        grid = torch.empty(5, 3, dtype=torch.int32)
        out = pos_embed_interpolate(table, grid, mode="bicubic", base=base, out_rows=150)
    assert (out.shape, out.dtype) == ((150, 24), torch.float32)


def test_compiles_as_one_graph() -> None:
    table, base, grid = normal(36, 24), normal(150, 24, seed=1), torch.tensor([(1, 8, 6), (2, 4, 4), (0, 0, 0)])
    compiled = torch.compile(pos_embed_interpolate, fullgraph=True, backend="aot_eager")
    want = pos_embed_interpolate(table, grid, base=base, out_rows=150)
    assert want[:80].count_nonzero() == 80 * 24
    assert torch.equal(compiled(table, grid, base=base, out_rows=150), want)


@pytest.mark.parametrize("table_height", [None, 4])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gradients(mode: str, table_height: int | None) -> None:
    """The op is linear in the table and in base, so a gradient is the op's transpose."""
    grid = ((1, 8, 6), (1, 4, 4))
    table, base = normal(36, 24).requires_grad_(), normal(64, 24, seed=1).requires_grad_()
    upstream, direction = normal(64, 24, seed=2), normal(36, 24, seed=3)
    options: Any = {"mode": mode, "table_height": table_height}
    pos_embed_interpolate(table, grid, base=base, **options).backward(upstream)
    assert table.grad is not None
    assert base.grad is not None
    change = pos_embed_interpolate(direction, grid, **options)
    torch.testing.assert_close((table.grad * direction).sum(), (upstream * change).sum())
    assert torch.equal(base.grad, upstream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_its_grid() -> None:
    table, grid = normal(36, 24).cuda(), torch.tensor([(1, 8, 6), (2, 4, 4)], device="cuda")
    graph = torch.cuda.CUDAGraph()
    pos_embed_interpolate(table, grid, out_rows=100)
    with torch.cuda.graph(graph):
        out = pos_embed_interpolate(table, grid, out_rows=100)
    for images in (((1, 2, 2), (0, 0, 0)), ((1, 10, 6), (4, 2, 4))):
        grid.copy_(torch.tensor(images))
        graph.replay()
        assert torch.equal(out, pos_embed_interpolate(table, images, out_rows=100))
