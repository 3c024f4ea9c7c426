"""What the covering cases of each op vary: a module per op with its `PLAN`."""

from importlib import import_module
from importlib.util import find_spec

from polyfuse.conformance.plan import Plan


def plan(op: str) -> Plan | None:
    """The plan of an op, by the op's name; None for an op that has its own cases alone."""
    name = f"polyfuse.conformance.plans.{op}"
    if find_spec(name) is None:
        return None
    found: Plan = import_module(name).PLAN
    return found
