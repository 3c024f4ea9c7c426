"""Calls with an array that a backend claims to read on the host: declined while a CUDA graph is captured."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import polyfuse
from polyfuse import Unsupported
from polyfuse.conformance.defects._planted import planted
from polyfuse.dispatch import Device, _arguments, _torch_library, registry
from polyfuse.dispatch._matrix import as_markdown, support
from polyfuse.dispatch._plan import CALLS

OP = "gated_delta_rule"
REASON = "cu_seqlens in the capture of a CUDA graph: reader reads the values on the host"
ENDS = torch.tensor([0, 2, 5])


class Capture:
    """Whether a graph is captured, and the calls that reached the backend."""

    on = False
    launches = 0


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Capture]:
    """The backend `reader`, which claims to read the boundaries, on what the dispatcher takes for a CUDA device."""
    found = Capture()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.on)
    monkeypatch.setattr(_arguments, "device_of", lambda value, family: Device("cuda", (9, 0)))
    polyfuse.refresh()
    capability = replace(registry().get("torch").load(OP).capability, host_reads=("cu_seqlens",))

    def make(right: Any) -> Any:
        def function(*args: Any, **keywords: Any) -> Any:
            found.launches += 1
            return right(*args, **keywords)

        return function

    planted("reader", OP, "torch", make, capability)
    yield found
    polyfuse.refresh()


def arguments(ends: torch.Tensor | None = ENDS) -> dict[str, Any]:
    shapes = {"q": (5, 1, 8), "k": (5, 1, 8), "v": (5, 2, 8), "g": (5, 2), "beta": (5, 2)}
    return {name: torch.full(shape, -0.25) for name, shape in shapes.items()} | {"cu_seqlens": ends}


def test_a_call_is_declined_in_a_capture_before_anything_is_launched(capture: Capture) -> None:
    polyfuse.gated_delta_rule(**arguments(), backend="reader")
    capture.on = True
    with pytest.raises(Unsupported, match=f"^{REASON}$"):
        polyfuse.gated_delta_rule(**arguments(), backend="reader")
    assert capture.launches == 1
    polyfuse.gated_delta_rule(**arguments(None), backend="reader")
    assert capture.launches == 2


def test_what_a_capture_decides_holds_for_the_capture_alone(capture: Capture) -> None:
    capture.on = True
    with pytest.raises(Unsupported):
        polyfuse.gated_delta_rule(**arguments(), backend="reader")
    capture.on = False
    polyfuse.gated_delta_rule(**arguments(), backend="reader")
    assert capture.launches == 1
    assert polyfuse.call_counts() == {(OP, "reader"): 1}


def eager(values: dict[str, Any]) -> Any:
    return polyfuse.gated_delta_rule(**values)


def registered(values: dict[str, Any]) -> Any:
    """The same call of the node of a compiled graph."""
    call = CALLS[OP]
    every = call.spec.parameters | values
    return torch.ops.polyfuse.gated_delta_rule(*_torch_library.flatten(call, tuple(every[name] for name in call.names)))


@pytest.mark.parametrize("call", [eager, registered])
def test_the_next_backend_of_the_order_runs_it(capture: Capture, call: Any, caplog: pytest.LogCaptureFixture) -> None:
    want = polyfuse.gated_delta_rule(**arguments(), backend="torch")
    capture.on = True
    with caplog.at_level(logging.WARNING, "polyfuse"), polyfuse.use_backend(["reader", "torch"]):
        got = call(arguments())
    assert all(map(torch.equal, got, want))
    assert capture.launches == 0
    assert f"{OP}: reader declined this call ({REASON}): passed over" in caplog.text


def test_explain_says_so_in_a_capture(capture: Capture) -> None:
    def verdict() -> tuple[str | None, str, str]:
        found = polyfuse.explain(OP, **arguments(), backend=["reader", "torch"])
        return found.winner, found.candidates[0].status, found.candidates[0].reason

    assert verdict() == ("reader", "chosen", "first usable of backend= on the call")
    capture.on = True
    assert verdict() == ("torch", "unsupported", REASON)


def test_a_call_on_the_cpu_is_no_part_of_a_capture(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arguments, "device_of", lambda value, family: Device("cpu"))
    capture.on = True
    polyfuse.gated_delta_rule(**arguments(), backend="reader")
    assert capture.launches == 1


def test_the_matrix_names_the_arrays(capture: Capture) -> None:
    row = support(OP, "reader")
    assert row.host_reads == ("cu_seqlens",)
    assert "cu_seqlens is read on the host: never in the capture of a graph" in as_markdown([row])
    assert support(OP, "torch").host_reads == ()
