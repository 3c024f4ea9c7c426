"""What a `Watch` notices of a model, and what it lets pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from polyfuse.runtime.encoder.watch import Watch


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.arange(4.0))
        self.indices, self.note = [1, 2], {"a": 1}


def call(model: Any) -> None:
    model.layer(torch.ones(1, 3))


def write(model: Any) -> None:
    with torch.no_grad():
        model.layer.weight.mul_(2)
        model.gain.data.mul_(3)
        model.table.add_(1)


@pytest.mark.parametrize("alter", [call, write, lambda model: model.zero_grad(), lambda model: model.state_dict()])
def test_what_a_graph_sees_by_itself_is_no_change(alter: Callable[[Any], Any]) -> None:
    model = Model()
    watch = Watch(model)
    alter(model)
    assert watch.change() == ""


def transposed(model: Any) -> None:
    model.layer.weight.data = model.layer.weight.data.t()


def equal_gain(model: Any) -> None:
    """Of one element and the same value, so that both compare as equal."""
    model.gain = nn.Parameter(torch.ones(1))


CHANGES = {
    "hooks were added or removed": [
        lambda model: model.layer.register_forward_hook(lambda *_: None),
        lambda model: model.register_forward_pre_hook(lambda *_: None),
    ],
    "modules were replaced": [
        lambda model: setattr(model, "layer", nn.Linear(3, 3)),
        lambda model: model.add_module("more", nn.ReLU()),
    ],
    "modules or weights were added, or classes changed": [
        lambda model: setattr(model.norm, "__class__", type("Other", (nn.LayerNorm,), {})),
        lambda model: model.layer.add_module("child", nn.ReLU()),
        lambda model: model.layer.register_buffer("extra", torch.ones(1)),
    ],
    "weights were moved or replaced": [
        transposed,
        equal_gain,
        lambda model: setattr(model.layer.weight, "data", model.layer.weight.data.clone()),
        lambda model: setattr(model.layer.weight, "data", model.layer.weight.data[:2]),
        lambda model: model.double(),
        lambda model: setattr(model, "table", torch.arange(4.0)),
    ],
    "settings were changed": [
        lambda model: setattr(model.norm, "eps", 1.0),
        lambda model: model.indices.append(3),
        lambda model: model.note.update(b=2),
        lambda model: setattr(model.layer, "forward", lambda x: x),
        lambda model: model.norm.eval(),
    ],
}


@pytest.mark.parametrize(("change", "alter"), [(change, alter) for change in CHANGES for alter in CHANGES[change]])
def test_a_change_is_named_until_the_watch_is_renewed(change: str, alter: Callable[[Any], Any]) -> None:
    model = Model()
    watch = Watch(model)
    alter(model)
    assert watch.change() == change
    assert watch.change() == change
    watch.renew()
    assert watch.change() == ""


def test_storages_stay_alive() -> None:
    model = Model()
    address = model.layer.weight.data_ptr()
    watch = Watch(model)
    model.layer.weight.data = torch.zeros(3, 3)
    assert address in {storage.data_ptr() for storage in watch._storages}


def test_the_oddity_is_asked_for_when_the_watch_is_renewed() -> None:
    answers = iter(["odd", ""])
    watch = Watch(Model(), lambda: next(answers))
    assert watch.oddity == "odd"
    watch.renew()
    assert watch.oddity == ""
