"""A Polyfuse backend for CPUs: every op as loops that Numba compiles to threads and vector instructions."""

from polyfuse.dispatch import Backend

BACKEND = Backend(
    "numba",
    "torch",
    "polyfuse_numba",
    requires=("torch", "numba"),
    implements={
        "pos_embed_interpolate": 2,
        "gdn_post_conv": 2,
        "gdn_conv_prep": 3,
        "silu_mul_block_quant": 3,
        "gdn_in_proj": 2,
    },
)
