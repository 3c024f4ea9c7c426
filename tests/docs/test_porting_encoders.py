"""The encoder in docs/porting_encoders.md computes what the text says."""

import re
from pathlib import Path
from typing import Any

import torch

from polyfuse.runtime import EncoderGraphManager

DOCS = Path(__file__).parents[2] / "docs"


def test_the_ported_encoder_computes_means() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "porting_encoders.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    with torch.no_grad():
        want = torch.stack([part.mean(0) for part in names["model"](names["rows"]).split([10, 5, 25])])
        padded = EncoderGraphManager(names["MeanEncoder"](names["model"]), budgets=[64], policy="greedy")
        padded.capture()
        padded.fill_buffers(float("nan"))
        again = padded.execute(names["rows"], [10, 5, 25])
    torch.testing.assert_close(names["means"], want)
    torch.testing.assert_close(again, want)
    assert (names["manager"].stats.requests, padded.stats.padding) == (1, 24)
