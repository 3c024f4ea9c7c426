"""Arguments that an op updates in place, on every way to a backend, by the example of `gdn_decode`."""

from typing import Any

import jax
import numpy as np
import pytest
import torch

import polyfuse
from polyfuse import BackendError, SpecError, Unsupported
from polyfuse.conformance import Trial, cases, compare
from polyfuse.conformance.inputs import place
from polyfuse.dispatch import _torch_library, to_numpy
from polyfuse.dispatch._plan import CALLS
from polyfuse.spec import OPS

STATES = ("conv_state", "recurrent_state")
TRIAL = Trial("gdn_decode", next(case for case in cases("gdn_decode") if case.name == "indices_int32-h2-hv4"), seed=0)


def arguments(family: str) -> dict[str, Any]:
    return place(TRIAL.inputs()[0], family, "cpu")


def bits(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {name: to_numpy(arrays[name]).tobytes() for name in STATES}


def assert_right(*results: Any) -> None:
    assert TRIAL.check(results, TRIAL.inputs()[1]) is None


def eager(values: dict[str, Any]) -> Any:
    return polyfuse.gdn_decode(**values)


def registered(values: dict[str, Any]) -> Any:
    """The same call of the node of a compiled graph."""
    call = CALLS["gdn_decode"]
    return torch.ops.polyfuse.gdn_decode(*_torch_library.flatten(call, tuple(values[name] for name in call.names)))


def test_the_spec_says_which() -> None:
    assert OPS["gdn_decode"].updated == STATES
    assert tuple(output.name for output in TRIAL.inputs()[1].results) == ("out", *STATES)


@pytest.mark.parametrize("call", [eager, registered])
def test_torch_tensors_are_written(call: Any) -> None:
    values = arguments("torch")
    before = {name: (values[name].data_ptr(), values[name]._version) for name in STATES}
    out = call(values)
    assert isinstance(out, torch.Tensor)
    assert_right(out, *(values[name] for name in STATES))
    for name, (address, version) in before.items():
        assert values[name].data_ptr() == address
        assert values[name]._version > version


@pytest.mark.parametrize("family", ["numpy", "jax"])
def test_other_arrays_come_back_and_stay(family: str) -> None:
    values = arguments(family)
    before = bits(values)
    results = polyfuse.gdn_decode(**values)
    assert len(results) == 3
    assert_right(*results)
    assert bits(values) == before


@pytest.mark.parametrize("backend", ["jax", "numpy"])
def test_a_backend_of_another_family_updates_torch_tensors(backend: str) -> None:
    values = arguments("torch")
    before = {name: (values[name].data_ptr(), values[name]._version) for name in STATES}
    out = polyfuse.gdn_decode(**values, backend=backend)
    assert isinstance(out, torch.Tensor)
    assert_right(out, *(values[name] for name in STATES))
    for name, (address, version) in before.items():
        assert values[name].data_ptr() == address
        assert values[name]._version > version


@pytest.mark.parametrize("family", ["numpy", "jax"])
def test_the_torch_backend_leaves_arrays_of_another_family(family: str) -> None:
    values = arguments(family)
    before = bits(values)
    results = polyfuse.gdn_decode(**values, backend="torch")
    assert all(isinstance(result, np.ndarray if family == "numpy" else jax.Array) for result in results)
    assert_right(*results)
    assert bits(values) == before


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        values = arguments("torch")
        values = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        assert values["conv_state"].is_inference()
        assert_right(polyfuse.gdn_decode(**values), *(values[name] for name in STATES))


@pytest.mark.parametrize("name", STATES)
def test_memory_that_two_elements_share_is_refused(name: str) -> None:
    values = arguments("torch")
    whole = values[name]
    overlapping = whole[:1].expand(whole.shape)
    before = whole.clone()
    with pytest.raises(
        SpecError, match=f"gdn_decode: {name}: expected a tensor whose elements have memory of their own"
    ):
        polyfuse.gdn_decode(**values | {name: overlapping})
    assert whole.view(torch.int32).equal(before.view(torch.int32))
    # The same shape with strides of its own, planned after the refusal, and refused again after that.
    polyfuse.gdn_decode(**values)
    with pytest.raises(SpecError, match="memory of their own"):
        polyfuse.gdn_decode(**values | {name: overlapping})


@pytest.mark.parametrize("name", ["x", "conv_weight", *STATES])
@pytest.mark.parametrize("call", [eager, registered])
def test_gradients_are_refused(call: Any, name: str) -> None:
    values = arguments("torch")
    before = bits(values)
    values[name].requires_grad_()
    with pytest.raises((Unsupported, BackendError), match="an input requires grad"):
        call(values)
    values[name].requires_grad_(False)
    assert bits(values) == before


def test_gradients_that_nobody_asks_for_are_no_reason() -> None:
    values = arguments("torch")
    values["conv_weight"].requires_grad_()
    with torch.no_grad():
        out = polyfuse.gdn_decode(**values)
    assert_right(out, *(values[name] for name in STATES))


def test_a_compiled_graph_updates_them() -> None:
    torch._dynamo.reset()
    values = arguments("torch")
    arrays = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    options = {name: value for name, value in values.items() if name not in arrays}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(arrays: dict[str, torch.Tensor]) -> torch.Tensor:
        return polyfuse.gdn_decode(**arrays, **options) * 1

    addresses = [arrays[name].data_ptr() for name in STATES]
    assert_right(model(arrays), *(arrays[name] for name in STATES))
    assert [arrays[name].data_ptr() for name in STATES] == addresses


def test_kept_elements_are_compared_with_their_sign() -> None:
    exact = TRIAL.exact()["recurrent_state"]
    got = exact.value.astype(np.float32)
    assert exact.kept is not None
    assert compare("recurrent_state", got, exact, "float32") is None
    at = tuple(np.argwhere(exact.kept & np.isnan(got))[0])
    got[at] = -got[at]
    assert "1 of" in str(compare("recurrent_state", got, exact, "float32"))
