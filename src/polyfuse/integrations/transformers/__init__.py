"""Transformers models on polyfuse: `accelerate(model)`, `report(model)` of what it does, and `restore(model)`."""

from polyfuse.spec import not_installed

if missing := not_installed(__name__, "torch", "transformers"):
    raise missing

from polyfuse.integrations.transformers._accelerate import accelerate, encoder_manager, invalidate, restore
from polyfuse.integrations.transformers._gated_delta_net import projection_weights, stack_projections
from polyfuse.integrations.transformers._graphs import make_encoder
from polyfuse.integrations.transformers._kernels_hub import kernel_mapping
from polyfuse.integrations.transformers._report import Part, Report, report

__all__ = [
    "Part",
    "Report",
    "accelerate",
    "encoder_manager",
    "invalidate",
    "kernel_mapping",
    "make_encoder",
    "projection_weights",
    "report",
    "restore",
    "stack_projections",
]
