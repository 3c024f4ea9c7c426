"""The oracle: every op in NumPy float64, written to be read, with the interval that a right result lies in."""

if __name__ != "polyfuse.reference":
    raise ImportError(f"import polyfuse.reference, not {__name__}")

from polyfuse.reference._numerics import Exact
from polyfuse.reference._oracle import Oracle, oracle

__all__ = ["Exact", "Oracle", "oracle"]
