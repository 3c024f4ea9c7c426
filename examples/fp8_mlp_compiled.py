"""The torch.compile pass finds SiLU, product and FP8 quantisation in an MLP: `python examples/fp8_mlp_compiled.py`."""

import torch
from torch import nn

import polyfuse
from polyfuse.runtime.fusion import enable
from polyfuse.unfused import block_quant, silu_mul


class Mlp(nn.Module):
    """Gate and up projection in one, then SiLU, product and quantisation, written as two functions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block_quant(silu_mul(self.gate_up(x)))


def main() -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(64, 256), torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        want = mlp(x)
        with enable():
            got = torch.compile(mlp, fullgraph=True)(x)
    print(
        "equal to the last bit:",
        all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True)),
    )
    print("fused calls:", sum(n for (op, _), n in polyfuse.call_counts().items() if op == "silu_mul_block_quant"))


if __name__ == "__main__":
    main()
