"""`kernel_mapping` with a stand-in for the `kernels` package that applies its rules for layers."""

import copy
import enum
import inspect
import pickle
import sys
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from polyfuse.integrations.transformers import kernel_mapping, restore
from polyfuse.integrations.transformers._gated_delta_net import is_fused

# The names that a class carries once `kernels` is installed; Qwen3-Next's has to be given.
NAMES = {
    Qwen3_5GatedDeltaNet: "Qwen3_5GatedDeltaNet",
    Qwen3_5MoeGatedDeltaNet: "Qwen3_5GatedDeltaNet",
    Qwen3NextGatedDeltaNet: "Qwen3NextGatedDeltaNet",
}
CONFIGS = dict(
    zip(
        NAMES,
        (transformers.Qwen3_5TextConfig, transformers.Qwen3_5MoeTextConfig, transformers.Qwen3NextConfig),
        strict=True,
    )
)


class Mode(enum.Flag):
    FALLBACK = 0
    INFERENCE = 1
    TRAINING = 2
    TORCH_COMPILE = 4


@pytest.fixture
def mapping(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(Mode=Mode))
    return kernel_mapping()


def check_layer(layer: type[nn.Module], replaced: type[nn.Module]) -> None:
    """What `kernels` asks of a layer: no state, no further members, and the replaced forward's kinds of parameters."""
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    added = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert added <= {"can_torch_compile", "has_backward"}
    ours, theirs = (
        [parameter.kind for parameter in inspect.signature(cls.forward).parameters.values()]
        for cls in (layer, replaced)
    )
    assert ours == theirs


@pytest.mark.parametrize("cls", NAMES)
def test_layer_keeps_the_rules_of_kernels(cls: type[nn.Module], mapping: dict[str, Any]) -> None:
    for repositories in mapping[NAMES[cls]].values():
        ((mode, repository),) = repositories.items()
        assert mode == Mode.INFERENCE | Mode.TORCH_COMPILE
        layer = repository.load()
        check_layer(layer, cls)
        assert layer.can_torch_compile
        assert repository.layer_name == NAMES[cls]


def test_repositories_are_values(mapping: dict[str, Any]) -> None:
    assert set(mapping) == set(NAMES.values())
    for name, devices in mapping.items():
        assert set(devices) == {"cpu", "cuda", "mps", "rocm", "xpu"}
        found = [repository for modes in devices.values() for repository in modes.values()]
        copies = [
            make(repository)
            for repository in found
            for make in (copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r)))
        ]
        assert len({*found, *copies}) == 1
        assert name in str(found[0])


@pytest.mark.parametrize("cls", NAMES)
def test_forward_of_a_kernelized_layer(cls: type[nn.Module], mapping: dict[str, Any]) -> None:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    dims = {"hidden_size": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    config = CONFIGS[cls](**heads, **dims, layer_types=["linear_attention"], num_hidden_layers=1)
    torch.manual_seed(0)
    layer: Any = cls(config, 0).eval()
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        before = layer(x)
        (repository,) = mapping[NAMES[cls]]["cpu"].values()
        layer.forward = MethodType(repository.load().forward, layer)
        assert is_fused(layer)
        after = layer(x)
        assert 0 < float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
        assert torch.equal(before, restore(layer)(x))
    assert not list(layer.buffers())


@pytest.mark.parametrize("cls", NAMES)
def test_transformers_asks_for_these_names(cls: type[nn.Module]) -> None:
    asks = f'@use_kernel_forward_from_hub("{NAMES[cls]}")' in inspect.getsource(cls)
    assert asks == (cls is not Qwen3NextGatedDeltaNet)


def test_without_the_kernels_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="kernels"):
        kernel_mapping()
