"""What a type checker says of calls: mistakes are found, and right calls have the types of their arrays."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RIGHT = """
import numpy as np
import torch
import polyfuse

x = torch.ones(4, 256)
q, scale = polyfuse.silu_mul_block_quant(x, quant_dtype=torch.int8, scale_layout="col_major")
result = polyfuse.gdn_post_conv(x, x, x, x, x, num_k_heads=1, head_k_dim=1, head_v_dim=1)
v: torch.Tensor = result.v
ba: torch.Tensor = polyfuse.gdn_in_proj(x, x, x, w_z=x, w_a=x).ba
rows: np.ndarray = polyfuse.pos_embed_interpolate(np.ones((4, 4)), [[1, 2, 2]])
"""
# Each line with what both checkers must report on it.
WRONG = {
    'polyfuse.silu_mul_block_quant(x, scale_layout="column_major")': "scale_layout",
    "q, k, v, g, beta = polyfuse.gdn_conv_prep(x, x, x, x, x, x, num_k_heads=1, head_k_dim=1, head_v_dim=1)": "unpack",
    "polyfuse.silu_mul_blok_quant(x)": "misspelt function",
    "polyfuse.gdn_in_proj(x, x, x).qkv": "misspelt result",
    "polyfuse.gdn_in_proj(x, x)": "missing argument",
    "polyfuse.gdn_in_proj(x, np.ones(3), x)": "two frameworks",
    "polyfuse.gdn_in_proj(x, x, x, x, x)": "w_z and w_a by position",
}
# What is skipped says nothing of tensors, and is half of what mypy would read.
SETTINGS = """
[mypy]
mypy_path = {}
follow_imports = silent

[mypy-torch._dynamo.*,torch._inductor.*,torch.distributed.*,torch.fx.*,torch.nn.*,torch.utils.*]
follow_imports = skip
"""
HEAD = "import numpy as np\nimport torch\nimport polyfuse\n\nx = torch.ones(4, 256)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typing")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(HEAD + "\n".join(WRONG) + "\n")
    return folder


def wrong_lines() -> set[int]:
    first = HEAD.count("\n") + 1
    return set(range(first, first + len(WRONG)))


def test_mypy(folder: Path) -> None:
    (folder / "mypy.ini").write_text(SETTINGS.format(ROOT / "src"))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "right.py", "wrong.py"]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.splitlines()
    errors = [line for line in lines if ": error: " in line]
    found = {(line.split(":")[0], int(line.split(":")[1])) for line in errors}
    assert found == {("wrong.py", number) for number in wrong_lines()}, lines


def test_pyright(folder: Path) -> None:
    settings = {"extraPaths": [str(ROOT / "src")], "include": ["right.py", "wrong.py"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    report = json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout)
    found = {
        (Path(d["file"]).name, d["range"]["start"]["line"] + 1)
        for d in report["generalDiagnostics"]
        if d["severity"] == "error"
    }
    assert found == {("wrong.py", number) for number in wrong_lines()}, report["generalDiagnostics"]
