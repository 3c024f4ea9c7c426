import json

import pytest

import polyfuse
from polyfuse.bench import host
from polyfuse.bench.host import HostBench, HostRow, run_host_bench
from polyfuse.cli import main
from polyfuse.spec import OPS

OP = "silu_mul_block_quant"


@pytest.fixture(autouse=True)
def fewer_rounds(monkeypatch):
    measure = host.host_ns
    monkeypatch.setattr(host, "host_ns", lambda call, after=None: measure(call, 2, 3, after=after))


def test_on_a_cpu_the_dispatcher_is_measured_alone():
    (row,) = run_host_bench([OP], "cpu").rows
    assert row.op == OP
    assert row.arrays == 1
    assert 0 < row.resolution_ns < row.dispatch_ns
    assert (row.allocation_ns, row.call_ns, row.launch_ns, row.backend) == (None, None, None, None)
    assert "nothing" not in polyfuse.dispatch.registry().names()


@pytest.mark.parametrize("op", [OP, "gdn_decode"])
def test_what_the_parts_of_a_call_on_an_accelerator_are(op):
    allocation, call, backend = host._whole(op, "cpu")
    assert 0 < allocation < call
    assert backend == "torch"
    row = HostRow(op, 1, 1.0, 2.0, 10.0, 20.0, backend)
    assert row.launch_ns == 8.0


def test_the_table_and_the_file(tmp_path, capsys):
    main(["bench", "host", "--op", OP, "--device", "cpu", "--out", str(tmp_path)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert OP in printed
    assert "resolve" in printed
    (path,) = tmp_path.glob("host_*.json")
    data = json.loads(path.read_text())
    assert data.keys() == {"device", "versions", "rows"}
    (row,) = data["rows"]
    assert row["dispatch_ns"] > row["resolution_ns"] > 0


def test_the_table_of_an_accelerator(monkeypatch, capsys):
    rows = [HostRow(OP, 1, 1e3, 2e3, 3e3, 1e4, "triton"), HostRow("gdn_decode", 9, 1e3, 2e3, 3e3, 1.5e4, "triton")]
    monkeypatch.setattr(host, "run_host_bench", lambda ops, device: HostBench("cuda (a GPU)", rows))
    main(["bench", "host", "--device", "cpu"], standalone_mode=False)
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "triton" in line]
    assert [cell.strip() for cell in lines[1]] == (
        ["gdn_decode", "9", "1.00", "2.00", "3.00", "10.00", "15.00", "1.50x", "triton"]
    )


def test_all_ops_are_measured():
    assert [row.op for row in run_host_bench().rows] == list(OPS)
