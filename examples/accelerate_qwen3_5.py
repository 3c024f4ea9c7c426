"""Generate with an accelerated Qwen3.5 language model: `python examples/accelerate_qwen3_5.py`.

The model is small and its weights are random, so that it runs on a CPU in seconds.
"""

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from polyfuse.integrations.transformers import accelerate, report

HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}


def main() -> None:
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZES, **HEADS)).eval()
    prompt = torch.arange(1, 13)[None]
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}

    before = model.generate(prompt, **settings)
    accelerate(model)
    after = model.generate(prompt, **settings)
    print("generated", after[0, prompt.shape[1] :].tolist())
    print("the same tokens as untouched:", torch.equal(before, after))
    print(report(model))


if __name__ == "__main__":
    main()
