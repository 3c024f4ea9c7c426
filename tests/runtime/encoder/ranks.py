"""A small encoder for tests of data-parallel encoding, and what a call on one rank came to."""

import time

import torch

from polyfuse import SpecError
from polyfuse.runtime.encoder.protocol import BufferSpec, EncoderRequest, ItemSize, Rows
from polyfuse.spec import fail


def images(*tokens: int) -> list[torch.Tensor]:
    return [torch.arange(n * 3.0).reshape(n, 3) + 1000 * i for i, n in enumerate(tokens)]


class Encoder:
    def __init__(self):
        self.name, self.token_multiple, self.device = "Encoder", 1, torch.device("cpu")
        self.inputs = {"pixels": BufferSpec(Rows(per_token=1), (3,), torch.float32)}
        self.outputs = {
            "embeds": BufferSpec(Rows(per_token=1), (3,), torch.bfloat16),
            "levels": BufferSpec(Rows(per_token=2, per_item=1), (3,), torch.float32),
            "count": BufferSpec(Rows(per_item=1), (), torch.int64),
        }

    def request(self, pixels):
        sizes = tuple(ItemSize(len(image)) for image in pixels)
        if not sizes or min(sizes) < (1,):
            fail("encoder", "pixels", "images with tokens", [size.tokens for size in sizes])
        return EncoderRequest(sizes, {"pixels": torch.cat(pixels)})

    def result(self, outputs, request):
        return {"tokens": [size.tokens for size in request.sizes], **outputs}


class Manager:
    def __init__(self):
        self.encoder = Encoder()
        self.ran = []
        self.error = None

    def run(self, request, indices=None):
        self.ran.append(indices)
        if self.error:
            raise self.error
        parts = request.tensors["pixels"].split([size.tokens for size in request.sizes])
        chosen = [parts[i] for i in (range(len(parts)) if indices is None else indices)]
        return {
            "embeds": torch.cat(chosen).mul(2).bfloat16(),
            "levels": torch.cat([torch.cat([x + 0.1, x - 0.1, x.sum(0, keepdim=True)]) for x in chosen]),
            "count": torch.tensor([len(x) for x in chosen]),
        }


def attempt(function, *args):
    started = time.monotonic()
    try:
        return {"result": function(*args)}
    except (RuntimeError, SpecError) as error:
        cause = error.__cause__ and f"{type(error.__cause__).__name__}: {error.__cause__}"
        seconds = time.monotonic() - started
        return {"type": type(error).__name__, "text": str(error), "cause": cause and cause[:40], "seconds": seconds}
