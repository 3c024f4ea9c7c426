"""The conformance cases of an op: those of its spec, then the real shapes of the model files."""

from polyfuse.configs import model_configs
from polyfuse.spec import OPS, Case


def all_cases(op: str, *, models: bool = True) -> tuple[Case, ...]:
    """Every case of an op, names unique."""
    cases = list(OPS[op].cases())
    if models:
        for name, config in model_configs().items():
            cases += [case.case(name) for case in config.ops.get(op, [])]
    names = [c.name for c in cases]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"{op}: case names used twice: {', '.join(sorted(twice))}")
    return tuple(cases)
