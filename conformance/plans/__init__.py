"""What the covering cases of each op vary: a module per op with its `PLAN`."""

from importlib import import_module

from polyfuse.conformance.plan import Plan


def plan(op: str) -> Plan:
    """The plan of an op, by the op's name."""
    found: Plan = import_module(f"polyfuse.conformance.plans.{op}").PLAN
    return found
