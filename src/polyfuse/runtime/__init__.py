"""What makes the kernels pay in real models."""

from polyfuse._projections import stack_weights
from polyfuse._streams import execute_in_parallel

__all__ = ["execute_in_parallel", "stack_weights"]
