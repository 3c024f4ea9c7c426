"""The modules of Transformers, with their activations quantised: what the pass is for."""

from typing import Any

import pytest
import torch

import polyfuse
from tests.runtime.fusion.graphs import DEVICE, assert_same_bits, quantise, rewrite, rows

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own

WIDTH, HIDDEN = 256, 384


class Quantising(torch.nn.Module):
    """In the place of the second projection: it gives what that would multiply."""

    def forward(self, y: torch.Tensor) -> Any:
        return quantise(y)


def placed(function: Any, x: torch.Tensor, materialize: bool = True) -> dict[str, Any]:
    """The one call that is placed; by default the results are those of the eager code, to the bit."""
    with torch.no_grad():
        got = rewrite(function, x, materialize=materialize)
        if materialize:
            assert_same_bits(got.outputs, function(x))
    assert got.reasons == []
    (found,) = got.placed
    return found


def test_the_mlp_of_qwen3() -> None:
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    mlp: Any = Qwen3MLP(Qwen3Config(hidden_size=WIDTH, intermediate_size=HIDDEN)).to(DEVICE, torch.bfloat16)
    mlp.down_proj = Quantising()
    found = placed(mlp, rows(2, 3)[..., :WIDTH])
    assert (found["op"], found["tensors"]) == ("silu_mul_block_quant", ["up"])
    assert found["shape"] == ["2", "3", str(HIDDEN)]


def test_the_activation_of_gpt_oss() -> None:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=2))
    if not hasattr(experts, "_apply_gate"):
        pytest.skip("this version has no function for the activation")
    found = placed(lambda x: quantise(experts._apply_gate(x)), rows(6))
    options = {name: found[name] for name in ("limit", "alpha", "up_offset", "interleaved", "materialize")}
    assert options == {
        "limit": 7.0,
        "alpha": float(torch.tensor(1.702)),
        "up_offset": 1.0,
        "interleaved": True,
        "materialize": True,
    }


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_the_norms_of_qwen3_and_qwen3_next(family: str) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    kinds: dict[str, Any] = {"qwen3": Qwen3RMSNorm, "qwen3_next": Qwen3NextRMSNorm}
    norm = kinds[family](512, eps=1e-6).to(DEVICE, torch.bfloat16)
    torch.nn.init.uniform_(norm.weight)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        total = x + x.flip(0)
        return [*quantise(norm(total)), total]

    x = rows(6)
    found = placed(function, x, materialize=False)
    assert (found["op"], found["tensors"]) == ("rms_norm_block_quant", ["weight", "residual"])
    assert found.get("weight_offset", 0.0) == (family == "qwen3_next")
    attrs = {name: found[name] for name in ("weight_offset", "scale_min") if name in found}
    with torch.no_grad():
        got = rewrite(function, x, materialize=False)
        want = polyfuse.rms_norm_block_quant(x, norm.weight, residual=x.flip(0), **attrs)
    assert_same_bits(got.outputs, want)
