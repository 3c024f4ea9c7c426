"""Which modules are FP8 MLPs: told by what their `forward` computes, not by their names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaMLP

from polyfuse.integrations.transformers._fp8_mlp import fp8_mlps
from tests.integrations.transformers.fp8_mlp_models import build, hooked, in_float32, kernelized, patched


class Clamped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class TwoInputs(LlamaMLP):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(y))


class Swapped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Branching(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) if x.sum() > 0 else x


class OtherOrder(LlamaMLP):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


def gelu() -> Any:
    mlp = build()
    mlp.act_fn = nn.GELU()
    return mlp


def changed(change: Callable[[Any], None]) -> Any:
    mlp = build()
    change(mlp)
    return mlp


def test_every_mlp_of_a_model_is_found() -> None:
    inner, outer = build(), build(OtherOrder)
    model = nn.ModuleDict({"a": inner, "b": nn.Sequential(outer, nn.Linear(2, 2)), "c": gelu()})
    assert list(fp8_mlps(model).values()) == [inner, outer]
    patched(inner)
    assert list(fp8_mlps(model).values()) == [inner, outer]


@pytest.mark.parametrize(
    "make",
    [
        *(lambda cls=cls: build(cls) for cls in (Clamped, TwoInputs, Swapped, Branching)),
        gelu,
        lambda: build(has_bias=True),
        lambda: build(activation_scheme="static"),
        lambda: build(block_size=(64, 128)),
        lambda: build(scale_fmt="ue8m0"),
        lambda: changed(hooked),
        lambda: changed(kernelized),
        lambda: changed(in_float32),
        lambda: nn.Sequential(nn.Linear(4, 4)),
    ],
)
def test_what_is_not_found(make: Callable[[], Any]) -> None:
    assert not fp8_mlps(make())
