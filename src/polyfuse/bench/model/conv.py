"""`gdn_conv_prep`, which is one pass, against a conv of its own before `gdn_post_conv`."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import conv1d, silu

import polyfuse
from polyfuse.bench.subjects.text import TextModel

Conv = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ConvRow:
    """From [q | k | v] before the conv to normalised q, k and v: device time of one way, and as a multiple of one pass.

    The separate conv is PyTorch's, with SiLU, as in Transformers, followed by `gdn_post_conv`.
    """

    tokens: int
    variant: str
    us: float
    ratio: float

    def __str__(self) -> str:
        return f"conv, {self.tokens} tokens, {self.variant}: {self.us:.1f} us"


def measure_conv(subject: TextModel, lengths: Sequence[int], compiled: bool) -> Iterator[ConvRow]:
    """Measure both ways for one sequence of each length; with `compiled`, the separate conv under torch.compile too."""
    layer, clock = subject.layer, subject.clock
    weight = layer.conv1d.weight.squeeze(1)
    heads = {name: getattr(layer, name) for name in ("num_k_heads", "head_k_dim", "head_v_dim")}
    torch._dynamo.reset()
    convs: dict[str, Conv] = {"separate": _conv}
    if compiled:
        convs["separate, compiled"] = torch.compile(_conv, dynamic=False)
    for tokens in lengths:
        x = subject.random(tokens, layer.conv_dim)
        a, b = (subject.random(tokens, layer.num_v_heads) for _ in range(2))
        gates = a, b, layer.A_log, layer.dt_bias
        one_pass = clock.device_us(partial(polyfuse.gdn_conv_prep, x, weight, *gates, **heads))
        yield ConvRow(tokens, "one pass", round(one_pass, 3), 1.0)
        for name, conv in convs.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Dynamo's advice on code that is compiled for comparison only
                us = clock.device_us(partial(_conv_first, conv, x, weight, gates, heads))
            yield ConvRow(tokens, name, round(us, 3), round(us / one_pass, 4))


def _conv_first(
    conv: Conv, x: torch.Tensor, weight: torch.Tensor, gates: Sequence[torch.Tensor], heads: Mapping[str, Any]
) -> object:
    """The results of `gdn_post_conv` after the conv."""
    return polyfuse.gdn_post_conv(conv(x, weight), *gates, **heads)


def _conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Causal depthwise conv and SiLU of rows [tokens, channels], as Transformers computes them."""
    channels, width = weight.shape
    padded = conv1d(x.t()[None], weight[:, None], padding=width - 1, groups=channels)
    return silu(padded[0, :, : len(x)]).t()
