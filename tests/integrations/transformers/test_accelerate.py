"""`accelerate` and `restore` on models with several parts, and on models with none."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import polyfuse
from polyfuse.integrations.transformers import accelerate, encoder_manager, restore
from polyfuse.integrations.transformers._gated_delta_net import gated_delta_nets, is_fused
from polyfuse.integrations.transformers._graphs import ENCODERS, AcceleratedForward

VISION = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TEXT |= {"vocab_size": 97, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
TEXT |= {"linear_value_head_dim": 16, "num_hidden_layers": 2}
KINDS = ["linear_attention", "full_attention"]
GRID = torch.tensor([[1, 4, 6]])
GRAPHS = {"budgets": [8]}


def build() -> Any:
    """A Qwen3.5 with a tower and a Gated DeltaNet layer."""
    config = transformers.Qwen3_5Config(
        vision_config=VISION | {"num_position_embeddings": 81},
        text_config=TEXT | {"layer_types": KINDS},
        image_token_id=96,
        vision_start_token_id=95,
        vision_end_token_id=94,
    )
    torch.manual_seed(0)
    return transformers.Qwen3_5ForConditionalGeneration(config).eval()


@pytest.fixture
def model() -> Any:
    return build()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 2, *[96] * 6, 3, 4]])
    pixels = torch.randn(24, 1536, generator=torch.Generator().manual_seed(1))
    kinds = (ids == 96).int()
    return model(input_ids=ids, pixel_values=pixels, image_grid_thw=GRID, mm_token_type_ids=kinds).logits


def test_a_whole_model_gets_its_tower_and_its_layers(model: Any) -> None:
    tower, (layer,) = model.model.visual, gated_delta_nets(model).values()
    keys, before = list(model.state_dict()), logits(model)
    assert accelerate(model, graphs=GRAPHS) is model
    assert isinstance(tower.forward, AcceleratedForward)
    assert is_fused(layer)
    assert list(model.state_dict()) == keys
    after = logits(model)
    assert 0 < float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
    assert encoder_manager(model).stats.requests == 1
    assert restore(model) is model
    assert not [module for module in model.modules() if "forward" in vars(module)]
    assert torch.equal(before, logits(model))


def test_accelerate_twice_is_once(model: Any) -> None:
    accelerate(model, graphs=GRAPHS)
    manager, before = encoder_manager(model), logits(model)
    accelerate(model, graphs=False)
    assert encoder_manager(model) is manager
    assert torch.equal(before, logits(model))
    restore(model)
    with pytest.raises(polyfuse.SpecError):
        restore(model)


def test_bad_settings_change_nothing(model: Any) -> None:
    with pytest.raises(polyfuse.SpecError, match="budgets"):
        accelerate(model, graphs={"budgets": "many"})
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_model_with_nothing_to_patch() -> None:
    with pytest.raises(polyfuse.SpecError) as error:
        accelerate(nn.Linear(2, 2))
    assert str(error.value) == (
        f"accelerate: model: expected a vision model ({', '.join(ENCODERS)}), a Gated DeltaNet layer, an FP8 MLP, "
        "FP8 experts or an MLP that torchao has quantised to MXFP8, MXFP4 or NVFP4 in it, got Linear"
    )


def test_restore_of_a_model_with_nothing_to_patch() -> None:
    with pytest.raises(polyfuse.SpecError) as error:
        restore(nn.Linear(2, 2))
    assert str(error.value) == "restore: model: expected a model patched by accelerate, got an unpatched Linear"


def test_manager_of_a_model_without_a_tower() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(polyfuse.SpecError) as error:
        encoder_manager(layer)
    assert str(error.value) == (
        "encoder_manager: model: expected one accelerated vision model that uses graphs, got Linear"
    )
