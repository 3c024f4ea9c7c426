"""The parts of a Gated DeltaNet layer, each alone: what `bench model` times of a layer."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import polyfuse
from polyfuse.bench.baseline import untouched
from polyfuse.bench.subjects.variants import implementation

# What Transformers' layers call for the delta rule, and the op that does it in accelerated ones.
RULES = {"prefill": "torch_chunk_gated_delta_rule", "decode": "torch_recurrent_gated_delta_rule"}
OPS = {"prefill": "gated_delta_rule", "decode": "gdn_decode"}
FLASH_QLA = "flash_qla"

# The parts of a layer. In the untouched layer the second one is code between calls: what is left without the others.
PARTS = {
    "prefill": ("in projections", "conv to rule", "delta rule", "gated norm", "out projection"),
    "decode": ("in projections", "between projections", "out projection"),
}

Call = Callable[[], Any]
Place = tuple[Any, str]  # an object and the name of what the layer calls there


class LayerParts:
    """The parts of one Gated DeltaNet layer, untouched or accelerated."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.names: Any = sys.modules[type(layer).__module__]  # whose functions the layer calls by name

    def rule_that_runs(self, phase: str, call: Call) -> str:
        """The name of the delta rule that a call of the layer in a phase runs, as it is now.

        Either the op with its backend, or the function that Transformers calls, with its module. FLA may hand a call
        on to FlashQLA, which is then named too.
        """
        op, before = OPS[phase], polyfuse.call_counts()
        call()
        counts = polyfuse.call_counts()
        by = [backend for (name, backend), n in counts.items() if name == op and n > before.get((op, backend), 0)]
        name = f"polyfuse.{op}"
        if not by:
            function = implementation(getattr(self.names, RULES[phase]))
            name = f"{function.__module__}.{function.__qualname__}"
        by += [FLASH_QLA] if _runs_flash_qla(call) else []
        return f"{name} ({', '.join(by)})" if by else name

    def calls(self, phase: str, variant: str, call: Call) -> dict[str, Call]:
        """Each part as a call of its own, on the tensors that it gets in a call of the layer in a variant.

        A part that the layer does not call is left out, such as all ops where an accelerated layer takes its own path.
        """
        taken: dict[str, list[Call]] = {}
        with self._watched(phase, variant, partial(_noted, taken)):
            call()
        return {part: partial(_all_of, taken[part]) for part in PARTS[phase] if part in taken}

    @contextmanager
    def what_is_left(self, phase: str, variant: str, call: Call) -> Iterator[None]:
        """The layer with those of its parts already done that `calls` has: each gives what it gave in this call."""
        results: dict[Place, Any] = {}
        with self._watched(phase, variant, partial(_kept, results)):
            call()
        with self._watched(phase, variant, partial(_given, results)):
            yield

    @contextmanager
    def _watched(self, phase: str, variant: str, watch: Callable[..., Any]) -> Iterator[None]:
        """The layer with `watch(part, place, function, *args, **kwargs)` called for the functions of its parts."""
        with ExitStack() as stack:
            for part, places in self._places(phase, variant).items():
                for place in places:
                    function = getattr(*place)
                    stack.enter_context(patch.object(*place, partial(watch, part, place, function)))
            yield

    def _places(self, phase: str, variant: str) -> Mapping[str, Sequence[Place]]:
        """Where the layer calls its parts."""
        layer = self.layer
        first, second, *middle, last = PARTS[phase]
        if untouched(variant):
            projections = [module for name, module in layer.named_children() if name.startswith("in_proj_")]
            places = {first: [(projection, "forward") for projection in projections], second: []}
            between = [(self.names, RULES[phase]), (layer.norm, "forward")]
        else:
            places = {first: [(polyfuse, "gdn_in_proj")]}
            places[second] = [(polyfuse, "gdn_decode" if phase == "decode" else "gdn_conv_prep")]
            between = [(polyfuse, "gated_delta_rule"), (polyfuse, "gated_rms_norm")]
        places |= {part: [place] for part, place in zip(middle, between, strict=False)}  # decode has none of them
        return places | {last: [(layer.out_proj, "forward")]}


def _noted(taken: dict[str, list[Call]], part: str, place: Place, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A part's call, noted so that it can be made again."""
    taken.setdefault(part, []).append(partial(function, *args, **kwargs))
    return function(*args, **kwargs)


def _kept(results: dict[Place, Any], part: str, place: Place, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A part's call, with its result kept."""
    results[place] = function(*args, **kwargs)
    return results[place]


def _given(results: dict[Place, Any], part: str, place: Place, function: Any, *args: Any, **kwargs: Any) -> Any:
    """What `_kept` has kept, in the place of a call."""
    return results[place]


def _all_of(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _runs_flash_qla(call: Call) -> bool:
    """Whether FLA hands the delta rule of a call that was made before on to FlashQLA, which it then has imported."""
    module = sys.modules.get(FLASH_QLA)
    if module is None:
        return False
    with patch.object(module, "chunk_gated_delta_rule", wraps=module.chunk_gated_delta_rule) as rule:
        call()
    return bool(rule.called)
