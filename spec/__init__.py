"""The definition of every op. Standard library only.

`OPS` is the one table of ops: a layer, a test or a document that needs "all ops" iterates it.
"""

if __name__ != "polyfuse.spec":
    raise ImportError(f"import polyfuse.spec, not {__name__}: a second identity registers every op twice")

from polyfuse.spec._errors import BackendError, SpecError, Unsupported
from polyfuse.spec._types import (
    FLOATS,
    FP32_ROUNDOFF,
    INTS,
    AttrSpec,
    Call,
    Capability,
    Case,
    Cost,
    ErrorBound,
    OpSpec,
    OutputSpec,
    TensorSpec,
)
from polyfuse.spec._validate import bind, dtype_name, fail
from polyfuse.spec.pos_embed_interpolate import SPEC as _pos_embed_interpolate

OPS: dict[str, OpSpec] = {spec.name: spec for spec in (_pos_embed_interpolate,)}

__all__ = [
    "FLOATS",
    "FP32_ROUNDOFF",
    "INTS",
    "OPS",
    "AttrSpec",
    "BackendError",
    "Call",
    "Capability",
    "Case",
    "Cost",
    "ErrorBound",
    "OpSpec",
    "OutputSpec",
    "SpecError",
    "TensorSpec",
    "Unsupported",
    "bind",
    "dtype_name",
    "fail",
]
