"""Transformers models on polyfuse: `accelerate(model)`, and `restore(model)` to undo it."""

from polyfuse.integrations.transformers._accelerate import accelerate, encoder_manager, restore
from polyfuse.integrations.transformers._graphs import make_encoder

__all__ = ["accelerate", "encoder_manager", "make_encoder", "restore"]
