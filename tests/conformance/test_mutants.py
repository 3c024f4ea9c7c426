"""Each tolerance has wrong implementations that it rejects, on ordinary and on real-model inputs."""

import pytest

from polyfuse.conformance import Trial, cases
from polyfuse.conformance.ops import suite
from polyfuse.reference import oracle
from polyfuse.spec import OPS


@pytest.fixture(scope="module")
def trials():
    return {op: [Trial(op, case, seed=1) for case in cases(op) if case.repeat == 1] for op in OPS}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in suite(op).MUTANTS])
def test_a_mutant_is_rejected(trials, op, name):
    mutant = suite(op).MUTANTS[name]
    for trial in trials[op]:
        values, call = trial.inputs()
        if trial.check(mutant(**values), call):
            return
    pytest.fail(f"no case of {op} rejects {name}")


@pytest.mark.parametrize("op", OPS)
def test_the_oracle_itself_passes_every_case(trials, op):
    for trial in trials[op]:
        values, call = trial.inputs()
        assert trial.check(oracle(op)(**values), call) is None


@pytest.mark.parametrize("op", OPS)
def test_the_core_cases_exist(op):
    assert set(OPS[op].core) <= {case.name for case in cases(op)}
    assert OPS[op].core
