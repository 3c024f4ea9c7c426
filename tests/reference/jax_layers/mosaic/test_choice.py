"""Which calls are asked to take Mosaic GPU kernels: none unless they are preferred and every GPU runs them."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from polyfuse.reference.pallas import mosaic

OP = "silu_mul_block_quant"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No test knows the GPUs of another one."""
    mosaic.usable.cache_clear()
    yield
    mosaic.usable.cache_clear()


def machine(*capabilities: str) -> Any:
    """`jax.local_devices` of a machine with such GPUs."""

    def local_devices(backend: str) -> list[SimpleNamespace]:
        assert backend == "cuda"
        if not capabilities:
            raise RuntimeError("Unknown backend cuda")
        return [SimpleNamespace(compute_capability=capability) for capability in capabilities]

    return local_devices


@pytest.mark.parametrize(
    ("capabilities", "usable"),
    [((), False), (("9.0",), True), (("8.9",), False), (("12.0", "10.0"), True), (("9.0", "8.0"), False)],
)
def test_usable(monkeypatch: pytest.MonkeyPatch, capabilities: tuple[str, ...], usable: bool) -> None:
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
    monkeypatch.setattr(jax, "local_devices", machine(*capabilities))
    assert mosaic.usable() is usable


def test_without_mosaic_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'absl'")

    monkeypatch.setattr(jax, "local_devices", machine("9.0"))
    monkeypatch.setattr(mosaic, "import_module", no_module)
    assert not mosaic.usable()


def test_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
    monkeypatch.setattr(jax, "local_devices", machine("9.0"))
    monkeypatch.setattr(mosaic, "PREFERRED", False)
    assert mosaic.preferred(OP) is None
    monkeypatch.setattr(mosaic, "PREFERRED", True)
    module = mosaic.preferred(OP)
    assert module is not None
    assert module.__name__ == f"polyfuse.reference.pallas.mosaic.{OP}"
