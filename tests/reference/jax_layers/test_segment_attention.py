"""`segment_attention` in jax.numpy: right on every case, and under jit, vmap and grad."""

from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import model_cases
from polyfuse.dispatch import registry
from polyfuse.reference.jax import segment_attention as module
from polyfuse.reference.jax.segment_attention import segment_attention
from polyfuse.spec.segment_attention import NAME

CASES = {case.name: case for case in [*cases(NAME), *model_cases(NAME)]}

# Compiling is most of the time here.
FAST = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


@cache
def compiled(**attrs: Any) -> Any:
    return jax.jit(partial(segment_attention, **attrs), compiler_options=FAST)


def arguments(rows: int, seed: int = 0) -> list[jax.Array]:
    """q, k, v of two heads of 8."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((rows, 2, 8)), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    trial = Trial(NAME, case, seed=0)
    values, call = trial.inputs()
    arrays = [jnp.asarray(values[name]) for name in ("q", "k", "v", "cu_seqlens")]
    result = compiled(scale=values["scale"], max_seqlen=values["max_seqlen"])(*arrays)
    assert trial.check(result, call) is None


@pytest.mark.parametrize("name", ["bfloat16-segments", "segment_nan-float32-24"])
def test_public_function(name: str) -> None:
    assert Trial(NAME, CASES[name], seed=0).on(registry().get("jax")) == ("passed", "")


@pytest.mark.parametrize("block", [4, 7, 64])
def test_blocks_of_rows_change_nothing_but_roundings(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, ends = arguments(19), jnp.array([0, 5, 17])
    want = compiled()(*given, ends)
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    got = jax.jit(partial(segment_attention.__wrapped__, scale=None, max_seqlen=None))(*given, ends)
    np.testing.assert_allclose(got[:17], want[:17], rtol=1e-5, atol=1e-6)


def test_one_program_serves_all_boundaries_and_leaks_nothing() -> None:
    given = arguments(14)
    program = jax.jit(segment_attention).lower(*given, jnp.array([0, 3, 9, 14])).compile()
    for ends in ([0, 3, 9, 14], [0, 0, 1, 14], [0, 7, 7, 7]):
        before = np.asarray(program(*given, jnp.array(ends)))
        for start, end in pairwise(ends):
            spoiled = [x.at[start:end].set(jnp.nan) for x in given]
            after = np.asarray(program(*spoiled, jnp.array(ends)))
            assert np.isnan(after[start:end]).all()
            others = [i for i in range(ends[-1]) if not start <= i < end]
            np.testing.assert_array_equal(after[others], before[others])


def test_vmap() -> None:
    batch = [jnp.stack(parts) for parts in zip(arguments(9), arguments(9, 1), strict=True)]
    ends = jnp.array([[0, 4, 9], [0, 9, 9]])
    results = jax.vmap(compiled())(*batch, ends)
    for i in range(2):
        want = compiled()(*(np.asarray(x)[i] for x in batch), ends[i])
        np.testing.assert_allclose(results[i], want, rtol=1e-5, atol=1e-6)


def test_gradients() -> None:
    differentiated = jax.jit(partial(segment_attention, cu_seqlens=jnp.array([0, 2, 2, 7])))
    check_grads(differentiated, arguments(7), order=1, modes=("rev",), rtol=2e-2, atol=2e-2, eps=1e-2)
