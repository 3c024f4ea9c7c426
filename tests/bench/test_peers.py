"""`bench --peers`: a right peer has a ratio, a wrong one is marked, and none that fails stops the run."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner

import polyfuse
from polyfuse.bench import one_case, ops, peers
from polyfuse.bench.ops import PeerRow, run_bench
from polyfuse.bench.peers import Package, Peer, Prepared, base
from polyfuse.bench.peers.base import options, places
from polyfuse.cli import main
from polyfuse.spec import OPS, SpecError

OP = "silu_mul_block_quant"
CASE = "T1_D2048"


def right(x):
    return polyfuse.silu_mul_block_quant(x, backend="torch")


def wrong(x):
    q, scale = right(x)
    return q, 2 * scale


def nearly(x):
    q, scale = right(x)
    return q, scale * (1 + 2.0**-10)


def raises(x):
    raise RuntimeError("needs sm_100\nand more")


def peer(name, *modules, tolerance=None, **given):
    def prepare(function, a):
        return Prepared(lambda: function(a.x))

    return Peer(
        OP,
        f"fake {name}",
        (places(name, *(modules or ("fake_kernels",))),),
        prepare,
        options(OP, ("cpu",), **given),
        tolerance=tolerance or {},
        reason="by design",
    )


def install(monkeypatch):
    """A package with a peer of each kind, in a module that is there, and one that is not installed."""
    module = ModuleType("fake_kernels")
    for function in (right, wrong, nearly, raises):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "fake_kernels", module)
    fake = Package(
        ("fake-kernels",),
        (
            peer("right", "fake_kernels.moved", "fake_kernels"),
            peer("wrong"),
            peer("nearly", tolerance={"scale": 2.0**-9}),
            peer("raises"),
            peer("gone"),
            peer("right", group_size=(64,)),
        ),
        note="knows no norm",
    )
    found = (fake, Package(("other-kernels",), (peer("right"),)))

    def version(name):
        if name == "fake-kernels":
            return "1.2"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(base, "version", version)
    for where in (one_case, ops, peers):
        monkeypatch.setattr(where, "PACKAGES", found)


@pytest.fixture
def packages(monkeypatch):
    install(monkeypatch)


@pytest.fixture(scope="module")
def run():
    """A run with these peers, and what it told before each."""
    told = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch)
        return run_bench([OP], ["torch"], compiled=False, cases=[CASE], peers=True, on_start=told.append), told


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the command says of such a run, and the folder of its file."""
    folder = tmp_path_factory.mktemp("out")
    asked = ["bench", "--device", "cpu", "--op", OP, "--case", CASE, "--backend", "torch", "--no-compile", "--peers"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch)
        return CliRunner().invoke(main, [*asked, "--out", str(folder)]), folder


@pytest.fixture
def rows(run):
    result, _ = run
    assert result.packages == {"fake-kernels": "1.2", "other-kernels": None}
    assert all((row.op, row.case, row.version) == (OP, CASE, "1.2") for row in result.peers)
    return result, {row.peer: row for row in result.peers}


def test_each_peer_of_an_installed_package_that_has_the_case_is_listed_once(rows):
    _, found = rows
    assert list(found) == ["fake right", "fake wrong", "fake nearly", "fake raises", "fake gone"]


def test_a_right_peer_has_its_times_as_a_multiple_of_ours(rows):
    result, found = rows
    (ours,) = result.rows
    row = found["fake right"]
    assert (row.status, row.note, row.ours) == ("right", "", "torch")
    assert row.ratio == pytest.approx(row.device_us / ours.device_us, abs=1e-3)
    assert row.cold_ratio == pytest.approx(row.cold_us / ours.cold_us, abs=1e-3)
    assert min(row.device_us, row.cold_us, ours.device_us, ours.cold_us) > 0


def test_a_wrong_peer_is_told_by_the_oracle(rows):
    _, found = rows
    assert found["fake wrong"].status == "wrong"
    assert found["fake wrong"].note.startswith("scale: 16 of 16 elements wrong; at [0, ")


def test_a_peer_that_is_inexact_by_design_says_by_how_much(rows):
    _, found = rows
    assert found["fake nearly"].status == "differs"
    assert found["fake nearly"].note == "by scale 9.8e-04 of the largest value: by design"


def test_a_peer_beyond_what_it_states_is_wrong(packages, monkeypatch):
    worse = (Package(("fake-kernels",), (peer("wrong", tolerance={"scale": 2.0**-9}),)),)
    for where in (one_case, ops):
        monkeypatch.setattr(where, "PACKAGES", worse)
    (row,) = run_bench([OP], ["torch"], compiled=False, cases=[CASE], peers=True).peers
    assert row.status == "wrong"
    assert row.note.endswith("the largest error is 1.0e+00 of the largest value")


def test_a_peer_that_raises_or_is_not_there_has_a_reason_and_no_times(rows):
    _, found = rows
    assert found["fake raises"].note == "RuntimeError: needs sm_100"
    assert found["fake gone"].note == "fake_kernels:gone: AttributeError: module 'fake_kernels' has no attribute 'gone'"
    for name in ("fake raises", "fake gone"):
        assert (found[name].status, found[name].device_us, found[name].ratio) == ("failed", None, None)


def test_without_the_option_no_peer_is_looked_for(packages):
    result = run_bench([OP], ["torch"], compiled=False, cases=[CASE])
    assert (result.peers, result.packages) == ([], {})


def test_the_tables_and_what_is_not_installed(printed):
    shown, _ = printed
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    (line,) = [line for line in lines if "fake wrong" in line and "│" in line]
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[5] == "wrong"
    assert cells[6].startswith("(")
    assert cells[6].endswith(")")
    assert any(line.startswith(f"wrong fake wrong 1.2, {CASE} of qwen3_5_35b_a3b: scale: 16 of 16") for line in lines)
    assert "fake-kernels: knows no norm" in lines
    assert "not installed: other-kernels" in lines


def test_a_peer_is_named_before_it_is_timed(run):
    _, told = run
    assert f"{OP} {CASE} of qwen3_5_35b_a3b: fake right" in told


def test_the_file_has_the_peers_as_far_as_the_run_came(printed):
    _, folder = printed
    (path,) = folder.glob("*.json")
    data = json.loads(path.read_text())
    found = {row["peer"]: row for row in data["peers"]}
    assert found["fake right"]["ratio"] > 0
    assert found["fake right"]["cold_ratio"] > 0
    assert found["fake gone"]["status"] == "failed"
    assert data["packages"] == {"fake-kernels": "1.2", "other-kernels": None}
    assert data["rows"][0]["cold_us"] > 0


def test_a_peer_takes_the_optional_arrays_that_it_names():
    call = SimpleNamespace(dtypes={"x": "bfloat16", "num_rows": "int32"}, attrs={}, dims={})
    one = Peer(OP, "p", (), lambda: None)
    assert one.refusal(call, "cpu") == "without num_rows"
    assert Peer(OP, "p", (), lambda: None, needs=("num_rows",)).refusal(call, "cpu") is None
    assert Peer(OP, "p", (), lambda: None, takes=("num_rows",)).refusal(call, "cpu") is None
    assert Peer(OP, "p", (), lambda: None, needs=("num_rows", "up")).refusal(call, "cpu") == "only with up"


@pytest.mark.parametrize("package", peers.PACKAGES, ids=lambda package: package.name)
def test_what_a_peer_states_is_of_its_op(package):
    assert package.peers or package.note
    for one in package.peers:
        spec = OPS[one.op]
        assert one.options.mistakes(spec) == []
        assert {*one.takes, *one.needs} <= {t.name for t in spec.tensors if t.optional}
        assert set(one.tolerance) <= {*(o.name for o in spec.outputs), *spec.updated}
        assert bool(one.tolerance) == bool(one.reason)
        assert all(":" in place for named in one.places for place in named)


def test_rows_are_of_a_peer_that_is_not_compared_where_none_of_ours_ran(packages, monkeypatch):
    result = run_bench([OP], ["jax"], compiled=False, cases=[CASE], peers=True)
    row = next(row for row in result.peers if row.status == "right")
    assert isinstance(row, PeerRow)
    assert (row.ours, row.ratio, row.cold_ratio) == (None, None, None)


def test_where_no_peer_has_a_case(monkeypatch):
    for where in (one_case, ops, peers):
        monkeypatch.setattr(where, "PACKAGES", (Package(("nothing-there",), (peer("right"),)),))
    asked = ["bench", "--device", "cpu", "--op", OP, "--case", CASE, "--backend", "torch", "--no-compile", "--peers"]
    lines = CliRunner().invoke(main, asked).stdout.splitlines()
    assert "no peer that is installed has one of these cases on this device" in lines


def test_an_unknown_filter_is_an_error():
    with pytest.raises(SpecError, match=r"^--case T3: no bench case; expected one of T1_D2048, T16384_D768, "):
        run_bench([OP], model="qwen3_5_35b_a3b", cases=["T3"])
