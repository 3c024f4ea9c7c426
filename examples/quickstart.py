"""Call an op, ask which backend ran it, and choose another: `python examples/quickstart.py`."""

import torch

import polyfuse


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 1024, dtype=torch.bfloat16)  # [gate | up]
    q, scale = polyfuse.silu_mul_block_quant(x, group_size=128)
    print("q", q.dtype, tuple(q.shape), "scale", tuple(scale.shape))

    # What an FP8 matrix product would see is near what the two halves give unquantised.
    gate, up = x.float().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    restored = q.float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)
    error = (restored.flatten(-2) - exact).norm() / exact.norm()
    print(f"relative error of the quantised product: {error:.3f}")

    print(polyfuse.explain("silu_mul_block_quant", x))
    with polyfuse.use_backend(["triton", "torch"]):
        polyfuse.silu_mul_block_quant(x)
    print("calls:", polyfuse.call_counts())


if __name__ == "__main__":
    main()
