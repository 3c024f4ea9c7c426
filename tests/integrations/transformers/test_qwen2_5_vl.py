"""`WindowedQwenEncoder` on a tiny tower: the tower's own outputs, whatever the buffers and replays."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import polyfuse
from polyfuse.integrations.transformers import accelerate, restore
from polyfuse.integrations.transformers._qwen2_5_vl import WindowedQwenEncoder
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.protocol import Capacity

CHANNELS = 3 * 2 * 4 * 4
# Windows of 4 x 4 tokens: smaller than one, cut at one edge and at both, several frames, exactly one, a strip.
GRIDS = [[1, 4, 6], [3, 10, 8], [1, 18, 14], [2, 8, 8], [1, 2, 22]]

# Of an output's norm: matrix products of another number of rows may add in another order. That is a few roundings
# in float32; in bfloat16 only now and then an element's rounding turns out the other way.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


def build_tower(dtype: torch.dtype = torch.float32) -> Any:
    """A tower whose patch embedding is exact in any order of its sums."""
    config = Qwen2_5_VLVisionConfig(
        depth=3,
        hidden_size=64,
        num_heads=4,
        intermediate_size=128,
        out_hidden_size=32,
        patch_size=4,
        window_size=32,
        fullatt_block_indexes=[1],
        initializer_range=0.2,  # attention far from uniform
    )
    torch.manual_seed(0)
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        weight = tower.patch_embed.proj.weight
        weight.copy_(torch.randint(-16, 17, weight.shape) / 64)
    return tower


def make_call(grids: list[list[int]] = GRIDS) -> tuple[torch.Tensor, torch.Tensor]:
    rows = sum(t * h * w for t, h, w in grids)
    pixels = torch.randint(-16, 17, (rows, CHANNELS), generator=torch.Generator().manual_seed(1)) / 16
    return pixels, torch.tensor(grids)


def exact(grids: list[list[int]]) -> Capacity:
    return Capacity(sum(t * h * w for t, h, w in grids) // 4, len(grids), sum(t for t, _, _ in grids))


def encode(tower: Any, grids: list[list[int]] = GRIDS) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(tower(*make_call(grids)))


def forward(encoder: WindowedQwenEncoder, grids: list[list[int]], capacity: Capacity) -> dict[str, torch.Tensor]:
    """The used rows, from buffers with NaN in every unused row of pixels."""
    spec = encoder.inputs["pixels"]
    inputs = {
        "pixels": torch.full((spec.rows.of(capacity.tokens), *spec.shape), torch.nan, dtype=spec.dtype),
        "grid": torch.zeros(capacity.items, 3, dtype=torch.int64),
    }
    pixels, grid = make_call(grids)
    inputs["pixels"][: len(pixels)] = pixels
    inputs["grid"][: len(grid)] = grid
    with torch.no_grad():
        outputs = encoder.forward(inputs, capacity)
    for name, spec in encoder.outputs.items():
        assert outputs[name].dtype == spec.dtype
        assert outputs[name].shape == (spec.rows.of(capacity.tokens, capacity.items), *spec.shape)
    used = exact(grids).tokens
    return {name: outputs[name][: spec.rows.of(used)] for name, spec in encoder.outputs.items()}


def change(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> float:
    """The largest relative change in norm of any of the outputs."""
    assert {name: x.shape for name, x in old.items()} == {name: x.shape for name, x in new.items()}
    changes = [(new[name].double() - x.double()).norm() / x.double().norm() for name, x in old.items()]
    return float(torch.stack(changes).max())  # NaN if one is


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_exact_buffers_give_the_towers_outputs_bitwise(dtype: torch.dtype) -> None:
    tower = build_tower(dtype)
    assert change(encode(tower), forward(WindowedQwenEncoder(tower), GRIDS, exact(GRIDS))) == 0


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("capacity", [(180, 5, 8), (173, 9, 8), (173, 5, 31), (256, 16, 16)])
def test_unused_rows_reach_nothing(dtype: torch.dtype, capacity: tuple[int, int, int]) -> None:
    tower = build_tower(dtype)
    assert change(encode(tower), forward(WindowedQwenEncoder(tower), GRIDS, Capacity(*capacity))) <= BOUND[dtype]


@pytest.mark.parametrize("wrong", [{"window_size": 24}, {"fullatt_block_indexes": []}, {"fullatt_block_indexes": [2]}])
def test_windows_and_full_blocks_are_the_towers(wrong: dict[str, Any]) -> None:
    tower = build_tower()
    before = encode(tower)
    for name, value in wrong.items():
        setattr(tower, name, value)
    after = forward(WindowedQwenEncoder(tower), GRIDS, exact(GRIDS))
    assert change(before, after) > 1000 * BOUND[torch.float32]
    assert change(encode(tower), after) <= BOUND[torch.float32]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_a_batch_in_several_replays(dtype: torch.dtype) -> None:
    tower = build_tower(dtype)
    manager = EncoderGraphManager(WindowedQwenEncoder(tower), budgets=[24, 72], max_frames=5, policy="greedy")
    output = manager.execute(*make_call())
    assert isinstance(output, BaseModelOutputWithPooling)
    assert change(encode(tower), dict(output)) <= BOUND[dtype]
    assert (manager.stats.replays.total(), manager.stats.eager_items) == (3, 0)


def test_a_request_names_its_items() -> None:
    pixels, grid = make_call()
    request = WindowedQwenEncoder(build_tower()).request(pixels, grid_thw=grid)
    assert [tuple(size) for size in request.sizes] == [(6, 1), (60, 3), (63, 1), (32, 2), (11, 1)]
    assert request.tensors == {"pixels": pixels, "grid": grid}


@pytest.mark.parametrize("tokens", [1, 255, 256, 600])
def test_an_example_has_its_tokens(tokens: int) -> None:
    request = WindowedQwenEncoder(build_tower()).example(tokens)
    assert sum(size.tokens for size in request.sizes) == tokens
    assert request.tensors["pixels"].shape == (4 * tokens, CHANNELS)
    assert int(request.tensors["grid"].prod(-1).sum()) == 4 * tokens


PIXELS, GRID = make_call([[1, 4, 6]])
BAD = [
    (PIXELS[0], GRID, "pixels: expected a tensor [patches, 96], got torch.float32 [96]"),
    (PIXELS[:, 1:], GRID, "pixels: expected a tensor [patches, 96], got torch.float32 [24, 95]"),
    (PIXELS.tolist(), GRID, "pixels: expected a tensor [patches, 96], got list"),
    (PIXELS.int(), GRID, "pixels: expected floating point on cpu, got torch.int32 on cpu"),
    (PIXELS.to("meta"), GRID, "pixels: expected floating point on cpu, got torch.float32 on meta"),
    (PIXELS, [[1, 4, 6]], "grid_thw: expected an integer tensor [items, 3], got list"),
    (PIXELS, GRID.float(), "grid_thw: expected an integer tensor [items, 3], got torch.float32 [1, 3]"),
    (PIXELS, GRID[:0], "grid_thw: expected at least one item, got none"),
    (
        PIXELS,
        torch.tensor([[1, 3, 8]]),
        "grid_thw: expected frames >= 1 and patch sides that are positive multiples of 2, got [1, 3, 8]",
    ),
    (PIXELS[1:], GRID, "pixels: expected 24 rows, as grid_thw says, got 23"),
]


@pytest.mark.parametrize(("pixels", "grid", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(pixels: Any, grid: Any, message: str) -> None:
    with pytest.raises(polyfuse.SpecError) as error:
        WindowedQwenEncoder(build_tower()).request(pixels, grid)
    assert str(error.value) == f"Qwen2_5_VisionTransformerPretrainedModel: {message}"


def test_one_compilation_serves_all_blocks_and_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter, compile_with = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options: compile_with(f, backend=counter, dynamic=dynamic))
    tower = build_tower()
    encoder, before = WindowedQwenEncoder(tower, compile_blocks=True), encode(tower)
    for capacity in ((173, 5, 8), (200, 6, 9), (256, 16, 16), (172, 5, 8)):
        assert change(before, forward(encoder, GRIDS, Capacity(*capacity))) <= BOUND[torch.float32]
    fewer = GRIDS[:2]
    assert change(encode(tower, fewer), forward(encoder, fewer, exact(fewer))) <= BOUND[torch.float32]
    assert counter.frame_count == 3  # the tables, a block, the merger


def test_a_tower_in_float64_takes_its_own_path() -> None:
    """`segment_attention` has no float64."""
    tower = build_tower(torch.float64)
    before = encode(tower)
    accelerate(tower, {"budgets": [256]})
    try:
        assert tower.forward.manager() is None
        assert change(before, encode(tower)) == 0
        tower.float()
        assert tower.forward.manager() is not None
    finally:
        restore(tower)
