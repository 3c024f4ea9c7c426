"""The parts of a Gated DeltaNet layer, alone or left out: what `bench model` times of a layer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import getclosurevars
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import polyfuse
from polyfuse.integrations.transformers import projection_weights

# What Transformers' layers call for the delta rule.
RULES = {"prefill": "torch_chunk_gated_delta_rule", "decode": "torch_recurrent_gated_delta_rule"}


class LayerParts:
    """The parts of one Gated DeltaNet layer, untouched or accelerated."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def delta_rule(self, phase: str) -> Callable[..., Any]:
        """The function that Transformers calls for the delta rule in a phase, `prefill` or `decode`."""
        return getattr(self._names(), RULES[phase])

    def delta_rule_name(self, phase: str) -> str:
        """The name of the function that runs for a phase, with its module: a kernel's, or Transformers' in PyTorch."""
        rule: Any = self.delta_rule(phase)
        if isinstance(rule, nn.Module):  # what the kernels package makes of a function
            rule = getclosurevars(type(rule).forward).nonlocals["func"]
        found = getclosurevars(rule).nonlocals["implementation"]
        return f"{found.__module__}.{found.__qualname__}"

    @contextmanager
    def no_delta_rule(self, normalises: bool = True) -> Iterator[list[tuple[Any, Any]]]:
        """The layer without its delta rule, in whose place is memory for its result.

        Yields a list in which the delta rule's arguments are noted. With `normalises` the l2norm of q and k is computed
        where the delta rule is asked to.
        """
        seen: list[tuple[Any, Any]] = []

        def rule(query: Any, key: Any, value: Any, **options: Any) -> tuple[Any, Any]:
            seen[:] = [((query, key, value), options)]
            if normalises and options["use_qk_l2norm_in_kernel"]:
                self.l2norm(query, key)
            return torch.empty_like(value, memory_format=torch.contiguous_format), options["initial_state"]

        rules: Any = dict.fromkeys(RULES.values(), rule)
        with patch.multiple(self._names(), **rules):
            yield seen

    def l2norm(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys normalised by Transformers' own function, in their dtype."""
        norm = self._names().l2norm
        return norm(query), norm(key)

    def projected(self, x: torch.Tensor, variant: str) -> Sequence[torch.Tensor]:
        """What the layer's input projections give for hidden states [batch, tokens, hidden] in a variant."""
        if variant == "accelerated":
            return polyfuse.gdn_in_proj(x.flatten(0, 1), **projection_weights(self.layer))
        return [projection(x) for projection in self._projections()]

    @contextmanager
    def no_projections(self, x: torch.Tensor, variant: str) -> Iterator[None]:
        """The layer with its input projections done, and without its gated norm and output projection."""
        outputs = self.projected(x, variant)
        with ExitStack() as stack:
            if variant == "accelerated":
                stack.enter_context(patch.object(polyfuse, "gdn_in_proj", lambda *_, **__: outputs))
            else:
                for projection, output in zip(self._projections(), outputs, strict=True):
                    stack.enter_context(patch.object(projection, "forward", lambda _, output=output: output))
            stack.enter_context(patch.object(self.layer.norm, "forward", lambda hidden, gate: hidden))
            stack.enter_context(patch.object(self.layer.out_proj, "forward", lambda hidden: hidden))
            yield

    def _projections(self) -> list[Any]:
        """The untouched layer's own input projections."""
        return [module for name, module in self.layer.named_children() if name.startswith("in_proj_")]

    def _names(self) -> Any:
        """The Python module of the model's classes, whose functions its layers call by name."""
        return sys.modules[type(self.layer).__module__]
