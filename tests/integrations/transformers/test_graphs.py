"""Accelerated models through the graph manager, on the CPU: its buffers, padding and packing, without graphs."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import polyfuse
from polyfuse.integrations.transformers import accelerate, encoder_manager, make_encoder, report, restore
from tests.integrations.transformers.test_vision_tower import (
    BOUND,
    FAMILIES,
    GRIDS,
    TINY,
    build_tower,
    change,
    encode,
    make_pixels,
)

SETTINGS = {"budgets": [16, 48], "policy": "greedy", "max_frames": 4}


def vision_models() -> dict[str, Any]:
    """A tiny model of every other family, and its arguments for three items."""
    config = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig
    qwen = config(**TINY, fullatt_block_indexes=[1], window_size=56)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    images = {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    grid = {"hidden_states": torch.randn(212, 1176, generator=torch.Generator().manual_seed(1)), "grid_thw": GRIDS}
    siglip = transformers.SiglipVisionConfig(**small, image_size=32, patch_size=16)
    clip = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16)
    tower = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel
    return {
        "qwen2_5_vl": (tower, qwen, grid, [16, 48]),
        "siglip": (transformers.SiglipVisionModel, siglip, images, [4, 8]),
        "clip": (transformers.CLIPVisionModel, clip, images, [5, 10]),
    }


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_towers_in_several_replays(family: str, dtype: torch.dtype) -> None:
    tower = build_tower(family, dtype)
    before = encode(tower)
    after = encode(accelerate(tower, SETTINGS))
    assert [x.dtype for x in after] == [dtype] * len(before)
    assert change(before, after) <= BOUND[dtype]
    stats = encoder_manager(tower).stats
    assert (stats.items, stats.tokens + stats.padding, stats.eager_items) == (3, 96, 0)
    assert stats.replays == {48: 2}  # 6 and 12 tokens, then 35


@pytest.mark.parametrize("family", ["qwen2_5_vl", "siglip", "clip"])
def test_other_families(family: str) -> None:
    cls, config, given, budgets = vision_models()[family]
    torch.manual_seed(0)
    model = cls._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(**given)
        after = accelerate(model, {"budgets": budgets, "policy": "greedy"})(**given)
        assert encoder_manager(model).stats.replays.total() == 2
        restored = restore(model)(**given)
    assert type(after) is type(before)
    for name in ("last_hidden_state", "pooler_output"):
        assert change([before[name]], [after[name]]) <= BOUND[torch.float32]
        assert torch.equal(restored[name], before[name])


def test_padding_may_hold_nan() -> None:
    tower = accelerate(build_tower(), SETTINGS)
    before = encode(tower)
    encoder_manager(tower)._inputs["pixels"].fill_(float("nan"))
    after = encode(tower)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("graphs", [None, False])
def test_a_cpu_does_not_pad_unless_asked_to(graphs: bool | None) -> None:
    tower = accelerate(build_tower(), graphs)
    encode(tower)
    with pytest.raises(
        polyfuse.SpecError, match="one accelerated vision model that uses graphs, got Qwen3VLVisionModel"
    ):
        encoder_manager(tower)


def flat(features: Any) -> list[torch.Tensor]:
    """The features of all items; those of a video may be split by its frames."""
    return [features] if isinstance(features, torch.Tensor) else [part for item in features for part in flat(item)]


def test_the_language_model_takes_image_features_from_graphs() -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 64, "head_dim": 16}
    vision = TINY | {"num_position_embeddings": 81, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLConfig(vision_config=vision, text_config=text)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    pixels = make_pixels(GRIDS)
    with torch.no_grad():
        before = model.get_image_features(pixels, GRIDS)
        after = accelerate(model, SETTINGS).get_image_features(pixels, GRIDS)
        video = model.get_video_features(pixels, GRIDS)
    assert [len(x) for x in after.pooler_output] == [6, 12, 35]
    assert change(flat(before.pooler_output), flat(after.pooler_output)) <= BOUND[torch.float32]
    assert change(flat(before.deepstack_features), flat(after.deepstack_features)) <= BOUND[torch.float32]
    assert torch.equal(torch.cat(flat(after.pooler_output)), torch.cat(flat(video.pooler_output)))
    assert encoder_manager(model).stats.requests == 2


@pytest.mark.parametrize("kwargs", [{"output_hidden_states": True}, {"return_dict": False}, {"position_ids": None}])
def test_what_the_adapters_do_not_compute_runs_as_before(kwargs: dict[str, Any]) -> None:
    tower = build_tower()
    with torch.no_grad():
        before = tower(make_pixels(GRIDS), GRIDS, **kwargs)
        after = accelerate(tower, SETTINGS)(make_pixels(GRIDS), GRIDS, **kwargs)
    assert type(after) is type(before)
    assert encoder_manager(tower).stats.requests == (kwargs == {"position_ids": None})


def test_gradients_and_training_run_as_before() -> None:
    tower = accelerate(build_tower(), SETTINGS)
    tower(make_pixels(GRIDS), GRIDS).pooler_output.sum().backward()
    assert tower.patch_embed.proj.weight.grad is not None
    encode(tower.train())
    assert encoder_manager(tower).stats.requests == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_a_copy_has_a_manager_of_its_own(duplicate: Any) -> None:
    tower = accelerate(build_tower(), SETTINGS)
    before = encode(tower)
    twin = duplicate(tower)
    torch.nn.init.zeros_(tower.merger.linear_fc2.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, encode(twin), strict=True))
    assert encoder_manager(twin) is not encoder_manager(tower)
    assert encoder_manager(twin).encoder.tower is twin


def test_other_weights_get_other_graphs() -> None:
    tower = accelerate(build_tower(), SETTINGS)
    encode(tower)
    first = encoder_manager(tower)
    tower.to(torch.bfloat16)
    after = encode(tower)
    assert {x.dtype for x in after} == {torch.bfloat16}
    assert encoder_manager(tower) is not first
    assert first.stats.buffer_bytes == 0
    tower.load_state_dict({name: 2 * value for name, value in tower.state_dict().items()}, assign=True)
    restored = encode(tower)
    assert change(encode(restore(tower)), restored) <= BOUND[torch.bfloat16]
    accelerate(tower, SETTINGS)
    tower.merger.linear_fc2.weight.data.mul_(2)  # in place: the graphs read it
    assert change(encode(restore(tower)), encode(accelerate(tower, SETTINGS))) <= BOUND[torch.bfloat16]


def test_restore_drops_the_graphs() -> None:
    tower = accelerate(build_tower(), SETTINGS)
    encode(tower)
    manager = encoder_manager(tower)
    assert manager.stats.buffer_bytes > 0
    restore(tower)
    assert manager.stats.buffer_bytes == 0


PIXELS = torch.zeros(24, 1536)
BAD: dict[str, tuple[Any, Any, str]] = {
    "no items": (PIXELS[:0], GRIDS[:0], "grid_thw: expected at least one item, got none"),
    "patches": (PIXELS[:20], GRIDS[:1], "pixels: expected 24 rows, as grid_thw says, got 20"),
    "width": (PIXELS[:, :9], GRIDS[:1], "pixels: expected a tensor [patches, 1536], got torch.float32 [24, 9]"),
    "dtype": (PIXELS.int(), GRIDS[:1], "pixels: expected floating point on cpu, got torch.int32 on cpu"),
    "device": (PIXELS.to("meta"), GRIDS[:1], "pixels: expected floating point on cpu, got torch.float32 on meta"),
    "grid": (PIXELS, [[1, 4, 6]], "grid_thw: expected an integer tensor [items, 3], got list"),
    "grid dtype": (PIXELS, GRIDS[:1].float(), "expected an integer tensor [items, 3], got torch.float32 [1, 3]"),
    "sides": (PIXELS, torch.tensor([[1, 3, 8]]), "patch sides that are positive multiples of 2, got [1, 3, 8]"),
    "frames": (torch.zeros(20, 1536), torch.tensor([[5, 2, 2]]), "at most max_frames=4 in an item, got 5"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_raises_and_changes_nothing(kind: str) -> None:
    pixels, grid, message = BAD[kind]
    tower = accelerate(build_tower(), SETTINGS)
    encode(tower)
    manager = encoder_manager(tower)
    before = {name: buffer.clone() for name, buffer in manager._inputs.items()}
    with pytest.raises(polyfuse.SpecError, match=re.escape(message)), torch.no_grad():
        tower(pixels, grid)
    assert manager.stats.requests == 1
    assert all(torch.equal(before[name], buffer) for name, buffer in manager._inputs.items())


def test_pixels_may_be_on_the_host() -> None:
    """A tower without memory stands for one on an accelerator, and a third device is refused."""
    encoder = make_encoder(build_tower().to("meta"))
    assert encoder.request(PIXELS, GRIDS[:1]).tensors["pixels"] is PIXELS
    there = PIXELS.to("meta")
    assert encoder.request(there, GRIDS[:1]).tensors["pixels"] is there
    with FakeTensorMode():
        elsewhere = torch.empty(24, 1536, device="xpu")
    with pytest.raises(polyfuse.SpecError, match=r"pixels: expected floating point on meta or cpu, got .* on xpu:0"):
        encoder.request(elsewhere, GRIDS[:1])


def test_errors_of_settings_and_models() -> None:
    with pytest.raises(polyfuse.SpecError, match="encoder: budget: unknown key; did you mean budgets"):
        accelerate(build_tower(), {"budget": 3})
    with pytest.raises(
        polyfuse.SpecError, match=r"make_encoder: model: expected one of Qwen3VLVisionModel, .* got Linear"
    ):
        make_encoder(torch.nn.Linear(2, 2))


def test_a_language_model_that_asks_for_hidden_states_is_told_that_it_gets_no_graphs(caplog: Any) -> None:
    """LLaVA reads a layer before the last, which no adapter computes."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16),
        text_config=transformers.LlamaConfig(**small, vocab_size=64),
        image_token_index=63,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.get_image_features(pixels).pooler_output
        accelerate(model, {"budgets": [10]}, parts=["vision"])
        with caplog.at_level("INFO", logger="polyfuse"):
            after = model.get_image_features(pixels).pooler_output
            model.get_image_features(pixels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (part,) = report(model).parts
    assert (part.fused_calls, part.unfused_calls) == (0, {"the call has output_hidden_states": 2})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == f"{part.name}: not fused: the call has output_hidden_states"


@pytest.mark.parametrize("graphs", [None, SETTINGS])
def test_float64_runs_as_before(graphs: Any) -> None:
    tower = build_tower(dtype=torch.float64)
    pixels = make_pixels(GRIDS).double()
    with torch.no_grad():
        before = tower(pixels, GRIDS).pooler_output
        assert torch.equal(before, accelerate(tower, graphs)(pixels, GRIDS).pooler_output)
    reason = "no graphs on cpu" if graphs is None else "the ops take no float64"
    assert report(tower).parts[0].unfused_calls == {reason: 1}


def test_a_part_that_is_named_must_be_there() -> None:
    with pytest.raises(polyfuse.SpecError, match=r"expected a Gated DeltaNet layer in it, got Qwen3VLVisionModel of "):
        accelerate(build_tower(), parts=["vision", "gated_delta_net"])
    with pytest.raises(
        polyfuse.SpecError,
        match=r"parts: expected a list of vision, gated_delta_net, fp8_mlp, fp8_experts, torchao_mlp, got",
    ):
        accelerate(build_tower(), parts=["visoin"])
    with pytest.raises(polyfuse.SpecError, match=r"graphs: expected a mapping of settings"):
        accelerate(build_tower(), 3)
