"""The definition of every op. Standard library only.

`OPS` is the one table of ops: a layer, a test or a document that needs "all ops" iterates it.
"""

if __name__ != "polyfuse.spec":
    raise ImportError(f"import polyfuse.spec, not {__name__}: a second identity registers every op twice")

from polyfuse.spec._errors import BackendError, SpecError, Unsupported
from polyfuse.spec._render import docstring, op_page
from polyfuse.spec._types import (
    FLOATS,
    FP32_ROUNDOFF,
    FP32_TINY,
    INTS,
    REQUIRED,
    AttrSpec,
    Call,
    Capability,
    Case,
    Cost,
    ErrorBound,
    OpSpec,
    Output,
    OutputSpec,
    TensorSpec,
)
from polyfuse.spec._validate import bind, dtype_name, fail
from polyfuse.spec.gdn_conv_prep import SPEC as _gdn_conv_prep
from polyfuse.spec.gdn_in_proj import SPEC as _gdn_in_proj
from polyfuse.spec.gdn_post_conv import SPEC as _gdn_post_conv
from polyfuse.spec.pos_embed_interpolate import SPEC as _pos_embed_interpolate
from polyfuse.spec.silu_mul_block_quant import SPEC as _silu_mul_block_quant

OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (_pos_embed_interpolate, _gdn_post_conv, _gdn_conv_prep, _silu_mul_block_quant, _gdn_in_proj)
}

__all__ = [
    "FLOATS",
    "FP32_ROUNDOFF",
    "FP32_TINY",
    "INTS",
    "OPS",
    "REQUIRED",
    "AttrSpec",
    "BackendError",
    "Call",
    "Capability",
    "Case",
    "Cost",
    "ErrorBound",
    "OpSpec",
    "Output",
    "OutputSpec",
    "SpecError",
    "TensorSpec",
    "Unsupported",
    "bind",
    "docstring",
    "dtype_name",
    "fail",
    "op_page",
]
