"""What the tests of the two JAX layers share: an op in a layer, and how its cases are compiled and judged.

A test that asks for `layer` runs in both layers; one that asks for `jax_layer` or `pallas_layer` is about that layer.
The op is the `OP` of its module. Compiling is most of the time here.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from polyfuse.conformance import Case, Trial
from polyfuse.dispatch import registry

ON_CPU = jax.default_backend() == "cpu"
# How an interpreted kernel is compiled for a CPU says nothing of the kernel: without these emitters it is faster.
INTERPRETED = {"xla_cpu_use_fusion_emitters": False} if ON_CPU else {}
TRITON_CALLS = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")


class Layer:
    """One op in one of the two JAX layers."""

    def __init__(self, name: str, op: str) -> None:
        self.name, self.op = name, op
        self.module = import_module(f"polyfuse.reference.{name}.{op}")
        self.function = getattr(self.module, op)
        self._compiled: dict[str, Any] = {}

    def public(self, case: Case) -> tuple[str, str]:
        """(status, detail) of a case through the public function."""
        return Trial(self.op, case, seed=0).on(registry().get(self.name))

    def call(self, values: dict[str, Any]) -> Any:
        """The op's results on NumPy values. Calls that differ in their numbers alone are compiled once."""
        arrays, attrs = _parted(values)
        key = _signature(arrays, attrs)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(partial(self.function, **attrs))
        return self._compiled[key](**arrays)

    def problem(self, trial: Trial) -> str | None:
        """What is wrong with the result of a case, or None."""
        values, call = trial.inputs()
        return trial.check(self.call(values), call)

    def problems(self, cases: Sequence[Case], seed: int = 0, joined: str = "") -> dict[str, str]:
        """What is wrong with each wrong case's result.

        All cases are one compiled function, in which those that differ in their numbers alone stand once. It gets the
        array named `joined` as halves and puts them together.
        """
        trials = [Trial(self.op, case, seed) for case in cases]
        found = {}
        for trial, result in zip(trials, self._together(trials, joined), strict=True):
            found[trial.case.name] = trial.check(result, trial.inputs()[1])
        return {name: problem for name, problem in found.items() if problem}

    def _together(self, trials: Sequence[Trial], joined: str) -> list[Any]:
        calls = [_parted(_arguments(trial)) for trial in trials]
        alike: dict[str, list[int]] = {}
        for number, (arrays, attrs) in enumerate(calls):
            alike.setdefault(_signature(arrays, attrs), []).append(number)

        @partial(jax.jit, compiler_options=INTERPRETED if self.name == "pallas" else {})
        def every(arrays: list[dict[str, Any]]) -> list[Any]:
            results = []
            for numbers, given in zip(alike.values(), arrays, strict=True):
                whole = given | ({joined: jnp.concatenate(given[joined], axis=-1)} if joined else {})
                results.append(self.function(**whole, **calls[numbers[0]][1]))
            return results

        results: dict[int, Any] = {}
        for turn in range(max(map(len, alike.values()))):
            chosen = [numbers[min(turn, len(numbers) - 1)] for numbers in alike.values()]
            given: list[dict[str, Any]] = [dict(calls[number][0]) for number in chosen]
            for one in given:
                if joined:
                    one[joined] = jnp.split(one[joined], 2, axis=-1)
            results |= dict(zip(chosen, every(given), strict=True))
        return [results[number] for number in range(len(calls))]


def _arguments(trial: Trial) -> dict[str, Any]:
    """The arguments of a case as its op's backends get them: host values as tuples, dtypes by name."""
    values, call = trial.inputs()
    return {**values, **call.host, **call.attrs}


def _parted(values: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The arrays, and all other arguments."""
    arrays = {name: jnp.asarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in values.items() if name not in arrays}


def _signature(arrays: dict[str, jax.Array], attrs: dict[str, Any]) -> str:
    """All that a compiled function depends on."""
    return repr(({name: (array.shape, array.dtype.name) for name, array in arrays.items()}, attrs))


@cache
def _layer(name: str, op: str) -> Layer:
    return Layer(name, op)


@pytest.fixture(params=["jax", "pallas"])
def layer(request: pytest.FixtureRequest) -> Layer:
    """The op of the test's module, in each of the two layers."""
    return _layer(request.param, request.module.OP)


@pytest.fixture
def jax_layer(request: pytest.FixtureRequest) -> Layer:
    return _layer("jax", request.module.OP)


@pytest.fixture
def pallas_layer(request: pytest.FixtureRequest) -> Layer:
    return _layer("pallas", request.module.OP)


@pytest.fixture(autouse=True)
def quickly_compiled() -> Iterator[None]:
    """On a CPU, programs are compiled without optimisations."""
    jax.config.update("jax_disable_most_optimizations", ON_CPU)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimised(quickly_compiled: None) -> None:
    """Programs are compiled with all optimisations after all."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def cpu_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, a kernel is traced with a CPU's tiles alone: tracing those of a GPU as well takes longer."""
    if ON_CPU:
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cpu, **_: cpu(*operands))


@pytest.fixture
def gpu_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel is interpreted with a GPU's tiles. The test fails if it traces none."""
    traced = []

    def interpreted(*operands: Any, cuda: Callable[..., Any], **_: Any) -> Any:
        traced.append(cuda)
        return cuda(*operands, interpret=True)

    monkeypatch.setattr(jax.lax, "platform_dependent", interpreted)
    yield
    assert traced, "the kernel had been traced before, with other tiles"


@pytest.fixture
def mesh() -> Mesh:
    """Four devices in a row, of an axis `d`."""
    devices = jax.devices("cpu")
    assert len(devices) >= 4
    return Mesh(np.array(devices[:4]), ("d",))


@pytest.fixture
def bits() -> Callable[[Any], list[bytes]]:
    """The function that gives the bytes of each result."""
    return lambda results: [np.asarray(result).tobytes() for result in results]


@pytest.fixture
def lowered() -> Callable[..., str]:
    """The function that lowers an op's call for a platform: the program's text."""

    def lower(function: Any, *arguments: Any, platform: str = "cuda", **named: Any) -> str:
        unchecked = [jax.export.DisabledSafetyCheck.custom_call(target) for target in TRITON_CALLS]
        exported = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=unchecked)
        return str(exported(*arguments, **named).mlir_module())

    return lower


@pytest.fixture
def triton_kernels(lowered: Callable[..., str]) -> Callable[..., int]:
    """The function that counts the Triton kernels in an op's call, lowered for CUDA."""

    def count(function: Any, *arguments: Any, platform: str = "cuda", **named: Any) -> int:
        program = lowered(function, *arguments, platform=platform, **named)
        return sum(program.count(f"custom_call @{target}") for target in TRITON_CALLS)

    return count


@pytest.fixture(params=[0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))], ids="part{}".format)
def part(request: pytest.FixtureRequest) -> Callable[[Sequence[Case]], Sequence[Case]]:
    """The function that picks a fourth of an op's cases: `make test` takes the first one, `make test-all` each."""
    return lambda cases: cases[request.param :: 4]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the whole matrix of cases in Pallas' interpret mode to `make test-all`: it takes longest."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.name.startswith("test_cases") and "pallas" in item.name:
            item.add_marker(pytest.mark.slow)
