"""The definition of every op. Standard library only.

`OPS` is the one table of ops: a layer, a test or a document that needs "all ops" iterates it.
"""

if __name__ != "polyfuse.spec":
    raise ImportError(f"import polyfuse.spec, not {__name__}: a second identity registers every op twice")

import warnings
from importlib import import_module

from polyfuse.spec._errors import BackendError, SpecError, Unsupported
from polyfuse.spec._extras import EXTRAS, how_to_install, not_installed
from polyfuse.spec._picture import op_picture
from polyfuse.spec._render import docstring, op_page
from polyfuse.spec._source import literal, package_stub, parameters_source, public_module, result_names
from polyfuse.spec._types import (
    FLOATS,
    FP32_ROUNDOFF,
    FP32_TINY,
    INTS,
    REQUIRED,
    AttrSpec,
    Call,
    Capability,
    Cost,
    Deferral,
    ErrorBound,
    OpSpec,
    Output,
    OutputSpec,
    TensorSpec,
)
from polyfuse.spec._validate import bind, dtype_name, fail

# The one table of ops. A new op is a new line here.
_NAMES = (
    "pos_embed_interpolate",
    "gdn_post_conv",
    "gdn_conv_prep",
    "silu_mul_block_quant",
    "block_quant",
    "rms_norm_block_quant",
    "gdn_in_proj",
    "segment_attention",
    "gated_rms_norm",
    "gated_delta_rule",
    "gdn_decode",
)

FORMER_NAMES = {"gdn_conv_post": "gdn_conv_prep"}  # accepted for one more release, with a warning

OPS: dict[str, OpSpec] = {name: import_module(f"polyfuse.spec.{name}").SPEC for name in _NAMES}

__all__ = [
    "EXTRAS",
    "FLOATS",
    "FORMER_NAMES",
    "FP32_ROUNDOFF",
    "FP32_TINY",
    "INTS",
    "OPS",
    "REQUIRED",
    "AttrSpec",
    "BackendError",
    "Call",
    "Capability",
    "Cost",
    "Deferral",
    "ErrorBound",
    "OpSpec",
    "Output",
    "OutputSpec",
    "SpecError",
    "TensorSpec",
    "Unsupported",
    "bind",
    "canonical",
    "docstring",
    "dtype_name",
    "fail",
    "how_to_install",
    "literal",
    "not_installed",
    "op_page",
    "op_picture",
    "package_stub",
    "parameters_source",
    "public_module",
    "result_names",
]


def canonical(op: str) -> str:
    """The name of an op as it is now. Raises `SpecError` for an unknown op; warns of a former name."""
    if op in FORMER_NAMES:
        warnings.warn(f"{op} is now {FORMER_NAMES[op]}; the old name goes in the next release", DeprecationWarning, 3)
        return FORMER_NAMES[op]
    if op not in OPS:
        raise SpecError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    return op
