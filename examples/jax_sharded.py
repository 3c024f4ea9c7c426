"""An op over tokens that are sharded on eight devices, under jax.jit: `python examples/jax_sharded.py`.

On a machine with a CPU only, XLA is told to make eight devices of it.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import polyfuse


def main() -> None:
    mesh = Mesh(jax.devices(), ("tokens",))
    rows = NamedSharding(mesh, PartitionSpec("tokens", None))
    x = jax.random.normal(jax.random.key(0), (16 * mesh.size, 1024), jnp.bfloat16)

    fused = jax.jit(lambda x: polyfuse.silu_mul_block_quant(x, group_size=128))
    want = fused(x)
    q, scale = fused(jax.device_put(x, rows))
    print(mesh.size, "devices hold", q.sharding.shard_shape(q.shape), "of", q.shape)
    same = [
        bool(jnp.array_equal(a.astype(jnp.float32), b.astype(jnp.float32)))
        for a, b in zip((q, scale), want, strict=True)
    ]
    print("equal to one device:", all(same))


if __name__ == "__main__":
    main()
