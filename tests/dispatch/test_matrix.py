"""The support matrix, the log, and processes that start from this one."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from polyfuse.cli import main
from polyfuse.dispatch import Backend, registry
from polyfuse.dispatch._matrix import as_markdown, support_matrix
from polyfuse.spec import OPS


def test_every_backend_has_a_row_for_every_op():
    rows = support_matrix()
    assert {(row.op, row.backend) for row in rows} >= {(op, name) for op in OPS for name in registry().names()}
    by_name = {(row.op, row.backend): row for row in rows}
    fused = by_name["gdn_in_proj", "pallas"]
    assert fused.limits == ("cuda 8.0 or later", "strategy in 'auto', 'fused'")
    assert by_name["segment_attention", "triton"].limits == (
        "dim a multiple of 8",
        "dim from 16 to 128",
        "last on cuda with dim a multiple of 32: PyTorch's own kernel is faster there",
    )
    assert by_name["silu_mul_block_quant", "triton"].cells()[2] == "cuda, rocm, xpu, cpu (interpreted)"
    assert by_name["silu_mul_block_quant", "torch"].cells()[2] == "any"


def test_what_is_missing_says_why():
    registry().add(Backend("half", "torch", "polyfuse.torch_impl", implements={"gdn_in_proj": 99}))
    try:
        rows = {row.op: row for row in support_matrix() if row.backend == "half"}
    finally:
        registry.cache_clear()
    assert rows["gdn_in_proj"].missing == "implements version 99 of gdn_in_proj, this is version 2"
    assert rows["gdn_post_conv"].missing == "does not implement gdn_post_conv"
    line = "| gdn_post_conv | half | torch | - | - | does not implement gdn_post_conv |"
    assert line in as_markdown([*rows.values()]).splitlines()


def test_the_command_prints_markdown_and_json():
    table = CliRunner().invoke(main, ["matrix"]).output
    assert table.splitlines()[:2] == [
        "| op | backend | arrays | devices | gradients | limits |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = json.loads(CliRunner().invoke(main, ["matrix", "--json"]).output)
    assert len(rows) == len(table.splitlines()) - 2
    assert rows[0].keys() >= {"op", "backend", "devices", "limits", "missing"}


RUN = """
import multiprocessing, sys
import numpy as np

def work(_):
    import polyfuse
    out = polyfuse.pos_embed_interpolate(np.ones((4, 2), np.float32), [[1, 2, 2]])
    return out.sum().item(), polyfuse.call_counts()

if __name__ == "__main__":
    import polyfuse
    polyfuse.pos_embed_interpolate(np.ones((4, 2), np.float32), [[1, 2, 2]])
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.map(work, [0])[0])
"""


@pytest.mark.parametrize(("method", "calls"), [("fork", 2), ("spawn", 1)])
def test_worker_processes_find_their_backends(method, calls, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RUN)
    done = subprocess.run([sys.executable, script, method], capture_output=True, text=True, check=False)
    assert done.stdout == f"(8.0, {{('pos_embed_interpolate', 'numpy'): {calls}}})\n", done.stderr


@pytest.mark.parametrize(
    ("level", "text"),
    [
        ("debug", "polyfuse DEBUG: pos_embed_interpolate: numpy (configs/platforms/cpu.yaml)\n"),
        ("warning", ""),
    ],
)
def test_the_log_names_each_first_decision(level, text):
    code = (
        "import numpy as np, polyfuse\n"
        "for _ in range(3): polyfuse.pos_embed_interpolate(np.ones((4, 2), np.float32), [[1, 2, 2]])"
    )
    env = {"POLYFUSE_LOG": level, "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stderr == text


def test_an_unknown_log_level_is_an_error():
    env = {"POLYFUSE_LOG": "loud", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", "import polyfuse; polyfuse.explain"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert "environment variable POLYFUSE_LOG: expected one of debug, info, warning, error, got 'loud'" in done.stderr
