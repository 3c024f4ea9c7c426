"""`rms_norm_block_quant` in jax.numpy: right on every case."""

from typing import Any

from polyfuse.conformance import cases

OP = "rms_norm_block_quant"
CASES = [case for case in cases(OP) if case.repeat == 1]


def test_cases(jax_layer: Any, part: Any) -> None:
    assert jax_layer.problems(part(CASES)) == {}


def test_public_function(jax_layer: Any) -> None:
    assert jax_layer.public(CASES[0]) == ("passed", "")
