"""Transformers models on polyfuse: `accelerate(model)`, and `restore(model)` to undo it."""

from polyfuse.integrations.transformers._accelerate import accelerate, encoder_manager, restore
from polyfuse.integrations.transformers._gated_delta_net import stacked_weights
from polyfuse.integrations.transformers._graphs import make_encoder
from polyfuse.integrations.transformers._kernels_hub import kernel_mapping

__all__ = ["accelerate", "encoder_manager", "kernel_mapping", "make_encoder", "restore", "stacked_weights"]
