"""What an encoder offers to run in graphs: `GraphableEncoder`, and the sizes, buffers and requests that it speaks in.

An encoder turns items (images, videos) into output tokens. Items are packed one after another along the first
dimension of every buffer, and nothing that an item's rows give may depend on another item or on padding. A port
states its buffers as data, checks a call, and computes one packed batch; copying, padding, packing, capture,
replay and the order of results are the manager's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch


class ItemSize(NamedTuple):
    """What one item needs: `tokens` output tokens, and `frames` attention segments (1 for an image)."""

    tokens: int
    frames: int = 1


class Capacity(NamedTuple):
    """What one packed batch holds at most."""

    tokens: int
    items: int
    frames: int


@dataclass(frozen=True)
class Rows:
    """How many rows of a buffer belong to an item: some for each of its tokens, and some for itself."""

    per_token: int = 0
    per_item: int = 0

    def of(self, tokens: int, items: int = 1) -> int:
        """The rows of `items` items of `tokens` tokens together; of a whole buffer for a capacity's numbers."""
        return self.per_token * tokens + self.per_item * items


@dataclass(frozen=True)
class BufferSpec:
    """A static buffer `[rows, *shape]`. With `zero`, rows that no item uses are zero before every replay."""

    rows: Rows
    shape: tuple[int, ...]
    dtype: torch.dtype
    zero: bool = False


class EncoderRequest(NamedTuple):
    """A checked call: its items' sizes in order, and for every input buffer the items' rows, on any device."""

    sizes: tuple[ItemSize, ...]
    tensors: Mapping[str, torch.Tensor]


class GraphableEncoder(Protocol):
    """An encoder that `EncoderGraphManager` can capture. See `docs/porting_encoders.md` for a worked port."""

    @property
    def name(self) -> str:
        """What messages and stats call the encoder."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the weights, on which the buffers will be."""
        ...

    @property
    def inputs(self) -> Mapping[str, BufferSpec]:
        """The specs of the input buffers, by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, BufferSpec]:
        """The specs of what `forward` gives, by name; their `zero` is not used."""
        ...

    @property
    def token_multiple(self) -> int:
        """A number that divides every item's tokens, and so every budget."""
        ...

    def request(self, *args: Any, **kwargs: Any) -> EncoderRequest:
        """Check a call of the model and describe it. May read sizes back from the device, once.

        Raises `SpecError` for bad input: no items, sizes that do not match the data, a wrong device or dtype.
        """
        ...

    def example(self, tokens: int) -> EncoderRequest:
        """Make a typical request of exactly `tokens` tokens, a multiple of `token_multiple`, to warm up and to time."""
        ...

    def forward(self, inputs: Mapping[str, torch.Tensor], capacity: Capacity) -> Mapping[str, torch.Tensor]:
        """Compute a packed batch in buffers of exactly `capacity`, whose last rows may be unused.

        Must not wait for the device, read from it or depend on the values in unused rows, which may be anything
        (zero where the buffer's spec says so): it is captured once and replayed with other contents.
        """
        ...

    def result(self, outputs: Mapping[str, torch.Tensor], request: EncoderRequest) -> Any:
        """Give the outputs of all items of a request, in order, as the model itself returns them."""
        ...
