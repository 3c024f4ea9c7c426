"""`accelerate` and `restore` on tiny towers and models of every supported family."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

import polyfuse
from polyfuse.conformance import compare
from polyfuse.integrations.transformers import accelerate, restore
from polyfuse.reference import pos_embed_interpolate as oracle

TINY = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 32}
GRIDS = torch.tensor([[1, 4, 6], [3, 2, 8], [1, 10, 14]])
EXACT_GRIDS = torch.tensor([[1, 9, 5], [2, 3, 17], [1, 5, 2]])  # a table of 5 x 5: coordinates are k / 4
FAMILIES = ("Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")

# Of an output's norm: a few roundings of Transformers' float32 coordinates; fewer than one rounding per element
# to bfloat16, because only now and then an element's turns out the other way.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


def build_tower(family: str = "Qwen3VL", dtype: torch.dtype = torch.float32, side: int = 9, merge: int = 2) -> Any:
    """A tower whose table outweighs its patch embeddings, so that a wrong row shows in the output."""
    cls = getattr(transformers, f"{family}VisionModel")
    deepstack = {"deepstack_visual_indexes": [0]} if "VL" in family else {}
    config = cls.config_class(**TINY, **deepstack, num_position_embeddings=side**2, spatial_merge_size=merge)
    torch.manual_seed(0)
    tower = cls._from_config(config, dtype=dtype).eval()
    nn.init.normal_(tower.pos_embed.weight)
    return tower


def make_pixels(grid: torch.Tensor) -> torch.Tensor:
    return torch.randn(int(grid.prod(-1).sum()), 1536, generator=torch.Generator().manual_seed(1))


def encode(tower: Any, grid: torch.Tensor = GRIDS, **kwargs: Any) -> list[torch.Tensor]:
    """Every tensor that the tower returns."""
    device = next(tower.parameters()).device
    with torch.no_grad():
        output = tower(make_pixels(grid).to(device), grid.to(device), **kwargs)
    return [output.last_hidden_state, output.pooler_output, *output.get("deepstack_features", ())]


def change(old: list[torch.Tensor], new: list[torch.Tensor]) -> float:
    """The largest relative change in norm of any of the outputs."""
    assert len(old) == len(new)
    return max(float((b.double() - a.double()).norm() / a.double().norm()) for a, b in zip(old, new, strict=True))


def same(old: list[torch.Tensor], new: list[torch.Tensor]) -> bool:
    return len(old) == len(new) and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of the op."""
    seen: list[dict[str, Any]] = []
    op = polyfuse.pos_embed_interpolate

    def spy(table: torch.Tensor, grid: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs | {"table": table, "grid": grid})
        return op(table, grid, **kwargs)

    monkeypatch.setattr(polyfuse, "pos_embed_interpolate", spy)
    return seen


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_transformers_within_rounding(family: str, dtype: torch.dtype, calls: list[dict[str, Any]]) -> None:
    tower = build_tower(family, dtype)
    before = encode(tower)
    assert accelerate(tower) is tower
    after = encode(tower)
    assert [x.dtype for x in after] == [x.dtype for x in before] == [dtype] * len(before)
    assert change(before, after) <= BOUND[dtype]
    assert len(calls) == 1
    assert calls[0]["table"].data_ptr() == tower.pos_embed.weight.data_ptr()
    assert (calls[0]["out_dtype"], calls[0]["out_rows"]) == (dtype, len(before[0]))
    tower.interpolation_align_corners = False
    assert change(before, encode(tower)) > 20 * BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bitwise_equal_where_float_coordinates_are_exact(family: str, dtype: torch.dtype) -> None:
    tower = build_tower(family, dtype, side=5, merge=1)
    with torch.no_grad():
        tower.pos_embed.weight.copy_(torch.randint(-64, 65, tower.pos_embed.weight.shape) / 16)
    before = encode(tower, EXACT_GRIDS)
    assert same(before, encode(accelerate(tower), EXACT_GRIDS))


@pytest.mark.parametrize(
    ("mode", "align_corners", "merge"), [("bicubic", True, 2), ("bicubic", False, 1), ("bilinear", False, 2)]
)
def test_interpolation_is_read_from_the_tower(
    mode: str, align_corners: bool, merge: int, calls: list[dict[str, Any]]
) -> None:
    tower = build_tower(merge=merge)
    tower.interpolation_mode, tower.interpolation_align_corners = mode, align_corners
    before = encode(tower)
    assert change(before, encode(accelerate(tower))) <= BOUND[torch.float32]
    assert (calls[0]["mode"], calls[0]["align_corners"], calls[0]["merge_size"]) == (mode, align_corners, merge)


def test_table_larger_than_its_square() -> None:
    tower = build_tower()
    table = tower.pos_embed.weight.detach()
    tower.pos_embed = nn.Embedding.from_pretrained(torch.cat((table, table[:3])))
    before = encode(tower)
    assert change(before, encode(accelerate(tower))) <= BOUND[torch.float32]


@pytest.mark.parametrize(("table", "rest"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_table_of_another_dtype(table: torch.dtype, rest: torch.dtype) -> None:
    tower = build_tower(dtype=rest)
    tower.pos_embed.to(table)
    before = encode(tower)
    after = encode(accelerate(tower))
    assert [x.dtype for x in after] == [rest] * len(before)
    assert change(before, after) <= BOUND[rest]


@pytest.mark.parametrize("given", [("interp_indices", "interp_weights"), ("interp_indices",), ("interp_weights",)])
def test_precomputed_interpolation_is_left_alone(given: tuple[str, ...], calls: list[dict[str, Any]]) -> None:
    tower = build_tower()
    rows = int(GRIDS.prod(-1).sum())
    generator = torch.Generator().manual_seed(2)
    interpolation = {
        "interp_indices": torch.randint(0, 81, (rows, 3), generator=generator),
        "interp_weights": torch.rand(rows, 3, generator=generator),
    }
    own = {name: interpolation[name] for name in given}
    before = encode(tower, **own)
    accelerate(tower)
    assert same(before, encode(tower, **own))
    assert not calls
    assert not same(before, encode(tower))


def test_keyword_arguments() -> None:
    tower = accelerate(build_tower())
    with torch.no_grad():
        output = tower(hidden_states=make_pixels(GRIDS), grid_thw=GRIDS)
    assert torch.equal(output.pooler_output, encode(tower)[1])


def test_restore_undoes_everything() -> None:
    tower = build_tower()
    module, weight, keys = tower.pos_embed, tower.pos_embed.weight, list(tower.state_dict())
    before = encode(tower)
    accelerate(tower)
    encode(tower)
    assert tower.pos_embed is module
    assert tower.pos_embed.weight is weight
    assert "forward" in vars(module)
    assert list(tower.state_dict()) == keys
    assert dict(tower.named_parameters())["pos_embed.weight"] is weight
    assert restore(tower) is tower
    assert module.weight is weight
    assert "forward" not in vars(module)
    assert list(tower.state_dict()) == keys
    assert "forward" not in vars(tower)
    assert same(before, encode(tower))


def test_accelerate_twice_is_once(calls: list[dict[str, Any]]) -> None:
    tower = build_tower()
    forward = accelerate(tower).forward
    assert accelerate(tower).forward is forward
    encode(tower)
    assert len(calls) == 1
    encode(restore(tower))
    assert len(calls) == 1


def test_changes_made_while_patched_survive_restore() -> None:
    tower = accelerate(build_tower())
    tower.to(torch.bfloat16).train()
    state = {name: value.clone() for name, value in tower.state_dict().items()}
    state["pos_embed.weight"].mul_(2)
    tower.load_state_dict(state, assign=True)
    weight = tower.pos_embed.weight
    assert change(encode(restore(tower)), encode(accelerate(tower))) <= BOUND[torch.bfloat16]
    restore(tower)
    assert tower.pos_embed.weight is weight
    assert torch.equal(weight, state["pos_embed.weight"])
    assert tower.pos_embed.training


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_a_copy_is_independent(duplicate: Any) -> None:
    tower = accelerate(build_tower())
    before = encode(tower)
    twin = duplicate(tower)
    assert twin.pos_embed.weight is not tower.pos_embed.weight
    nn.init.zeros_(tower.pos_embed.weight)
    assert same(before, encode(twin))
    restore(twin)
    assert type(twin.pos_embed) is nn.Embedding
    assert not same(before, encode(twin))
    assert change(before, encode(twin)) <= BOUND[torch.float32]
    assert "forward" not in vars(twin)
    assert "forward" in vars(tower)


def test_compiled_tower() -> None:
    tower = accelerate(build_tower())
    eager = encode(tower)
    torch._dynamo.reset()
    assert same(eager, encode(torch.compile(tower, backend="eager")))


def test_gradients_reach_the_table() -> None:
    tower = build_tower()
    weight = tower.pos_embed.weight
    before = torch.autograd.grad(tower(make_pixels(GRIDS), GRIDS).pooler_output.square().sum(), weight)
    after = torch.autograd.grad(accelerate(tower)(make_pixels(GRIDS), GRIDS).pooler_output.square().sum(), weight)
    assert change(list(before), list(after)) <= 5 * BOUND[torch.float32]


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_language_model(family: str, calls: list[dict[str, Any]]) -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 64, "head_dim": 16}
    experts = {"num_experts": 2, "num_experts_per_tok": 1} if family.endswith("Moe") else {}
    deepstack = {"deepstack_visual_indexes": [0]} if "VL" in family else {}
    config = getattr(transformers, f"{family}Config")(
        vision_config=TINY | deepstack | {"num_position_embeddings": 81}, text_config=text | experts
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    keys = list(model.state_dict())
    pixels = make_pixels(GRIDS)
    with torch.no_grad():
        before = model.get_image_features(pixels, GRIDS).pooler_output
        assert accelerate(model) is model
        after = model.get_image_features(pixels, GRIDS).pooler_output
        assert len(calls) == 1
        assert list(model.state_dict()) == keys
        restored = restore(model).get_image_features(pixels, GRIDS).pooler_output
    assert [len(x) for x in after] == [6, 12, 35]
    assert 0 < change(list(before), list(after)) <= BOUND[torch.float32]
    assert same(list(before), list(restored))
    assert len(calls) == 1


def test_restore_of_an_unpatched_model() -> None:
    tower = build_tower()
    with pytest.raises(polyfuse.SpecError) as error:
        restore(tower)
    assert str(error.value) == (
        "restore: model: expected a model patched by accelerate, got an unpatched Qwen3VLVisionModel"
    )


def test_the_difference_to_transformers_is_its_rounded_coordinates() -> None:
    """Its own formula on exact coordinates keeps the op's error bound; on its float32 ones it does not."""
    grid = [[1, 32, 32], [1, 24, 38]]
    table = torch.randn(48 * 48, 64, generator=torch.Generator().manual_seed(0))
    indices, weights = [], []
    for _, h, w in grid:
        row, column = oracle.merge_order(h, w, 2)
        y, y_weights = oracle.axis_taps(row, h, 48, "bilinear", True)
        x, x_weights = oracle.axis_taps(column, w, 48, "bilinear", True)
        indices.append((y[:, :, None] * 48 + x[:, None, :]).reshape(h * w, 4))
        pairs = y_weights.astype("f4")[:, :, None] * x_weights.astype("f4")[:, None, :]
        weights.append(pairs.reshape(h * w, 4))
    taps, share = torch.from_numpy(np.concatenate(indices)), torch.from_numpy(np.concatenate(weights))
    exact = oracle.pos_embed_interpolate.intervals(table.numpy(), grid)["out"]
    assert compare("exact coordinates", (table[taps] * share[:, :, None]).sum(1).numpy(), exact, "float32") is None
    assert compare("ours", polyfuse.pos_embed_interpolate(table, grid).numpy(), exact, "float32") is None

    taps, share = get_vision_interpolation_indices_and_weights(
        torch.tensor(grid), 48, align_corners=True, spatial_merge_size=2
    )
    assert compare("float32 coordinates", (table[taps] * share[:, :, None]).sum(1).numpy(), exact, "float32")
