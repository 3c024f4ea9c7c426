"""The two halves of `silu_mul_block_quant` as separate functions in plain PyTorch, on any device.

`polyfuse.runtime.fusion` recognises them in a compiled graph and puts the fused op in their place. On the torch backend
`block_quant(silu_mul(x))` is, bit for bit, `polyfuse.silu_mul_block_quant(x, materialize=True)`. Write a model with
them if it shall run with that pass and without it, or use them to say what a fused kernel has to equal.
"""

from polyfuse.spec import not_installed

if missing := not_installed(__name__, "torch"):
    raise missing

from polyfuse.torch_impl._unfused import block_quant, silu_mul

__all__ = ["block_quant", "silu_mul"]
