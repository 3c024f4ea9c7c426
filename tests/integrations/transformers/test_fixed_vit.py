"""`FixedResolutionEncoder` on tiny SigLIP and CLIP models: their own outputs, whatever the buffers and replays."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.modeling_outputs import BaseModelOutputWithPooling

import polyfuse
from polyfuse.integrations.transformers._fixed_vit import FixedResolutionEncoder
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.protocol import Capacity, ItemSize

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = (3, 32, 32)
TOKENS = {"Siglip": 16, "SiglipWithoutHead": 16, "CLIP": 17}

# Of an output's norm: matrix products of another number of rows may add in another order. That is a few roundings
# in float32; in bfloat16 only now and then an element's rounding turns out the other way.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


def build_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    cls = getattr(transformers, f"{kind.removesuffix('WithoutHead')}VisionModel")
    head = {"vision_use_head": False} if kind.endswith("WithoutHead") else {}
    torch.manual_seed(0)
    return cls._from_config(cls.config_class(**TINY, image_size=32, patch_size=8, **head), dtype=dtype).eval()


def make_images(count: int) -> torch.Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(1))


def encode(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(model(images))


def forward(encoder: FixedResolutionEncoder, images: torch.Tensor, items: int) -> dict[str, torch.Tensor]:
    """The outputs of the images, from buffers of `items` with NaN in every unused one."""
    tokens = items * encoder.token_multiple + 3  # more tokens than the items need, as `max_items` leaves them
    spec = encoder.inputs["pixel_values"]
    buffer = torch.full((spec.rows.of(tokens, items), *spec.shape), torch.nan, dtype=spec.dtype)
    buffer[: len(images)] = images
    with torch.no_grad():
        outputs = encoder.forward({"pixel_values": buffer}, Capacity(tokens, items, items))
    assert list(outputs) == list(encoder.outputs)
    for name, spec in encoder.outputs.items():
        assert outputs[name].dtype == spec.dtype
        assert outputs[name].shape == (spec.rows.of(tokens, items), *spec.shape)
    return {name: out[: len(images)] for name, out in outputs.items()}


def change(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> float:
    """The largest relative change in norm of any of the outputs."""
    assert {name: x.shape for name, x in old.items()} == {name: x.shape for name, x in new.items()}
    changes = [(new[name].double() - x.double()).norm() / x.double().norm() for name, x in old.items()]
    return float(torch.stack(changes).max())  # NaN if one is


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", TOKENS)
def test_exact_buffers_give_the_models_outputs_bitwise(kind: str, dtype: torch.dtype) -> None:
    model, images = build_model(kind, dtype), make_images(3)
    before, after = encode(model, images), forward(FixedResolutionEncoder(model), images, items=3)
    assert list(before) == list(after) == ["last_hidden_state", "pooler_output"][: 2 - kind.endswith("WithoutHead")]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", TOKENS)
def test_unused_images_reach_nothing(kind: str, dtype: torch.dtype) -> None:
    model, images = build_model(kind, dtype), make_images(3)
    assert change(encode(model, images), forward(FixedResolutionEncoder(model), images, items=8)) <= BOUND[dtype]


@pytest.mark.parametrize("kind", TOKENS)
def test_a_batch_in_several_replays(kind: str) -> None:
    model, images = build_model(kind), make_images(7)
    budgets = [TOKENS[kind], 4 * TOKENS[kind]]
    manager = EncoderGraphManager(FixedResolutionEncoder(model), budgets=budgets, max_items=3, policy="greedy")
    output = manager.execute(pixel_values=images)
    assert isinstance(output, BaseModelOutputWithPooling)
    assert change(encode(model, images), dict(output)) <= BOUND[torch.float32]
    assert manager.stats.replays == {budgets[0]: 1, budgets[1]: 2}
    assert (output.pooler_output is None) == kind.endswith("WithoutHead")


@pytest.mark.parametrize("kind", TOKENS)
def test_requests_and_examples(kind: str) -> None:
    encoder, images = FixedResolutionEncoder(build_model(kind, torch.bfloat16)), make_images(2)
    assert encoder.token_multiple == TOKENS[kind]
    assert encoder.request(images) == ((ItemSize(TOKENS[kind]),) * 2, {"pixel_values": images})
    example = encoder.example(5 * TOKENS[kind])
    assert example.sizes == (ItemSize(TOKENS[kind]),) * 5
    assert torch.equal(example.tensors["pixel_values"], torch.zeros(5, *IMAGE, dtype=torch.bfloat16))


def test_images_may_be_on_the_host() -> None:
    """A model without memory stands for one on an accelerator."""
    encoder, images = FixedResolutionEncoder(build_model("Siglip").to("meta")), make_images(2)
    for given in (images, images.to("meta")):
        assert encoder.request(given).tensors["pixel_values"] is given


BAD = [
    (make_images(1).tolist(), "a tensor [images, 3, 32, 32], got list"),
    (make_images(1)[0], "a tensor [images, 3, 32, 32], got [3, 32, 32]"),
    (torch.zeros(1, 3, 32, 40), "a tensor [images, 3, 32, 32], got [1, 3, 32, 40]"),
    (make_images(0), "at least one image, got none"),
    (make_images(1).byte(), "floating point on cpu, got torch.uint8 on cpu"),
    (make_images(1).to("meta"), "floating point on cpu, got torch.float32 on meta"),
]


@pytest.mark.parametrize(("images", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(images: Any, message: str) -> None:
    with pytest.raises(polyfuse.SpecError) as error:
        FixedResolutionEncoder(build_model("CLIP")).request(images)
    assert str(error.value) == f"CLIPVisionModel: pixel_values: expected {message}"


@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
def test_two_compilations_serve_all_layers_and_capacities(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter, compile_with = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options: compile_with(f, backend=counter, dynamic=dynamic))
    model, images = build_model(kind), make_images(1)
    encoder, before = FixedResolutionEncoder(model, compile_blocks=True), encode(model, images)
    for items in (5, 2, 8, 3):
        assert change(before, forward(encoder, images, items)) <= BOUND[torch.float32]
    assert counter.frame_count == 1
    assert change(before, forward(encoder, images, items=1)) <= BOUND[torch.float32]
    assert counter.frame_count == 2
