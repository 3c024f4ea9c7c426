"""What all models under measurement have in common."""

import pytest
import torch

pytest.importorskip("transformers")

from polyfuse.bench.subjects import text, vision
from polyfuse.bench.subjects.text import TextModel
from polyfuse.bench.subjects.vision import VisionModel

KINDS = [(VisionModel, name) for name in vision.MODELS] + [(TextModel, name) for name in text.MODELS]


@pytest.fixture(scope="module", params=KINDS, ids=[f"{kind.__name__}-{name}" for kind, name in KINDS])
def subject(request):
    kind, name = request.param
    return kind(name, "cpu", tiny=True)


def patched(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_weights_are_random_and_the_same_each_time(subject):
    again = type(subject)(subject.name, "cpu", tiny=True)
    weights = dict(again.model.named_parameters())
    for name, weight in subject.model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.dtype == subject.dtype == torch.float32
    assert len({float(weight.detach().std()) for weight in weights.values() if weight.ndim == 2}) > 10
    assert not subject.model.training


def test_what_it_says_of_itself(subject):
    depth = {VisionModel: 2, TextModel: 4}[type(subject)]
    assert (subject.device, subject.tiny, subject.sizes, subject.dtype_name) == ("cpu", True, "tiny", "float32")
    assert (subject.depth, subject.captures) == (depth, False)


def test_a_variant_is_undone_at_its_end(subject):
    assert patched(subject.model) == []
    with subject.variant("untouched"):
        assert patched(subject.model) == []
    with subject.variant("accelerated"):
        assert len(patched(subject.model)) == (1 if isinstance(subject, VisionModel) else 3)
    assert patched(subject.model) == []
    with pytest.raises(ZeroDivisionError), subject.variant("accelerated"):
        1 / 0  # noqa: B018
    assert patched(subject.model) == []


def test_random_numbers_depend_on_the_shape_alone(subject):
    numbers = subject.random(50, 40)
    assert torch.equal(numbers, subject.random(50, 40))
    assert (numbers.dtype, tuple(numbers.shape)) == (subject.dtype, (50, 40))
    assert 0.9 < float(numbers.std()) < 1.1


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", vision.MODELS)
def test_a_vision_model_has_the_layers_asked_for(name, depth):
    subject = VisionModel(name, "cpu", tiny=True, depth=depth)
    layers = subject.model.encoder.layers if subject.fixed else subject.model.blocks
    assert len(layers) == subject.depth == depth
