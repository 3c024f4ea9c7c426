"""Tables of a packed batch and attention inside its segments, against Transformers' host versions and plain loops."""

import pytest
import torch

from polyfuse.runtime.encoder.segments import (
    _segment_attention,
    frame_boundaries,
    masked_attention,
    patch_positions,
    segment_attention,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GRIDS = [[[1, 4, 6]], [[3, 2, 8], [1, 10, 14], [2, 6, 2]], [[1, 2, 2]] * 5]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=len)
def test_tables_equal_transformers(grid: list[list[int]], unused: int, device: str) -> None:
    vision = pytest.importorskip("transformers.vision_utils")
    given = torch.tensor(grid)
    padded = torch.cat((given, given.new_zeros(unused, 3))).to(device)
    rows, frames = int(given.prod(-1).sum()), int(given[:, 0].sum())
    positions = patch_positions(padded, rows + 4 * unused, 2).cpu()
    assert torch.equal(positions[:rows], vision.get_vision_position_ids(given, 2))
    assert not positions[rows:].any()
    boundaries = frame_boundaries(padded, frames + unused).cpu()
    assert boundaries.dtype == torch.int32
    assert torch.equal(boundaries[: frames + 1], vision.get_vision_cu_seqlens(given))
    assert boundaries[frames:].eq(rows).all()


def test_an_empty_grid_has_empty_tables() -> None:
    grid = torch.zeros(2, 3, dtype=torch.int64)
    assert frame_boundaries(grid, 3).tolist() == [0, 0, 0, 0]
    assert not patch_positions(grid, 8, 2).any()


@pytest.mark.parametrize("implementation", [segment_attention, masked_attention])
def test_attention_stays_inside_its_segment(implementation: object) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, unused = [5, 1, 12], 4
    rows = sum(lengths)
    query, key, value = torch.randn(3, rows + unused, 2, 8, generator=generator, dtype=torch.float64)
    for tensor in (query, key, value):
        tensor[rows:] = float("nan")
    boundaries = torch.tensor([0, 5, 6, 18, 18, 18], dtype=torch.int32)
    arguments = (query, key, value, boundaries)
    got = masked_attention(*arguments) if implementation is masked_attention else segment_attention(*arguments, rows)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        scores = torch.einsum("qhd,khd->hqk", query[own], key[own]) * 8**-0.5
        want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[own])
        torch.testing.assert_close(got[own], want)
        start += length


def test_scale() -> None:
    query, key, value = torch.randn(3, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    boundaries = torch.tensor([0, 6], dtype=torch.int32)
    for scale in (0.1, 3.0):
        want = torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", query, key) * scale).softmax(-1), value)
        torch.testing.assert_close(segment_attention(query, key, value, boundaries, 6, scale), want)
        torch.testing.assert_close(masked_attention(query, key, value, boundaries, scale), want)


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_one_operation(device: str) -> None:
    query, key, value = torch.randn(3, 6, 2, 8, device=device)
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    arguments = (query, key, value, boundaries, 6, 0.3)
    torch.library.opcheck(_segment_attention, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(segment_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), segment_attention(*arguments))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_on_a_gpu(dtype: torch.dtype) -> None:
    """bf16 probabilities and outputs: a few roundings of 2^-8 of values below 1."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = torch.randn(3, 600, 4, 72, generator=generator, device="cuda").to(dtype)
    value[590:] = float("nan")
    boundaries = torch.tensor([0, 256, 257, 590, 590], dtype=torch.int32, device="cuda")
    got = segment_attention(query, key, value, boundaries, 600)[:590]
    want = masked_attention(query.double(), key.double(), value.double(), boundaries)[:590]
    torch.testing.assert_close(got.double(), want, atol=2e-5 if dtype == torch.float32 else 2.0**-6, rtol=0)
