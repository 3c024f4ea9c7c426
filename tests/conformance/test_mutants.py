"""Each tolerance has wrong implementations that it rejects, on ordinary and on real-model inputs."""

import pytest

from polyfuse.conformance.mutants import MUTANTS
from polyfuse.conformance.runner import Trial
from polyfuse.spec import OPS

SMALL = 100_000


@pytest.fixture(scope="module")
def trials():
    made = {}
    for op in OPS:
        made[op] = [Trial(op, case, seed=1) for case in OPS[op].cases() if case.repeat == 1]
    return made


def test_every_op_has_mutants():
    assert set(MUTANTS) == set(OPS)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in MUTANTS for name in MUTANTS[op]])
def test_a_mutant_is_rejected(trials, op, name):
    killed = []
    for trial in trials[op]:
        values, call = trial.inputs()
        if trial.check(MUTANTS[op][name](**values), call):
            killed.append(trial.case.name)
    assert killed, f"no case of {op} rejects {name}"


@pytest.mark.parametrize("op", OPS)
def test_the_oracle_itself_passes_every_case(trials, op):
    import polyfuse

    for trial in trials[op]:
        values, call = trial.inputs()
        assert trial.check(getattr(polyfuse, op)(**values), call) is None
