"""Golden vectors: what is written, and that both verdicts on outputs are the verdict of conformance."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from polyfuse import SpecError
from polyfuse.conformance import cases, compare, make_inputs
from polyfuse.conformance.golden import export
from polyfuse.conformance.golden._export import Entry, index
from polyfuse.conformance.golden._files import SCHEMA, read, write
from polyfuse.conformance.ops import suite
from polyfuse.reference import Exact, oracle
from polyfuse.reference._numerics import HALF_BYTE, numpy_dtype, parts_of
from polyfuse.spec import OPS, Output, bind
from tests.conformance.golden_files import (
    bits,
    case_named,
    manifest,
    of_c,
    of_python,
    results,
    write_outputs,
    wrong_results,
)

DTYPES = (
    *("float32", "float16", "bfloat16", "int8", "int32", "int64", "uint8"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
)

LONG = {"gated_delta_rule": pytest.mark.slow}
COUNT = re.compile(r"\d+ of \d+ elements wrong")
FIRST = re.compile(r"WRONG .*?: .*?: \d+ of \d+ elements wrong; at \[[\d, ]*\]")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core") / "golden"
    export(folder)
    return folder


def agreed(folder: Path, outputs: Path) -> dict[str, set[str]]:
    """The arrays that are wrong, by case, as both say; fails where Python and C differ."""
    python = of_python(folder, outputs)
    status, lines, errors = of_c(folder, outputs)
    assert errors == ""
    named = {(case, problem.split(": ")[0]) for case, problems in python.items() for problem in problems}
    assert wrong_results(lines) == named
    assert status == (1 if named else 0)
    right = {line.removeprefix("right  ") for line in lines if line.startswith("right")}
    assert right == {case for case, problems in python.items() if not problems}
    assert lines[-1] == f"{len(right)} of {len(python)} cases right"
    return {case: {array for name, array in named if name == case} for case in python}


def test_the_core_cases_of_every_op_are_written(golden):
    written = [(entry["op"], entry["case"]) for entry in manifest(golden)["cases"]]
    assert sorted(written) == sorted((op, case) for op, spec in OPS.items() for case in spec.core)
    assert sum(path.stat().st_size for path in golden.rglob("*.*")) < 16e6, "small by default"
    assert {path.name for path in golden.iterdir() if path.is_file()} == {
        *("manifest.json", "index.txt", "golden_verify.c")
    }


def test_the_files_are_what_make_inputs_gives(golden):
    for entry in manifest(golden)["cases"]:
        given = make_inputs(OPS[entry["op"]], case_named(entry["op"], entry["case"]))
        arrays = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}
        assert arrays.keys() == {described["name"] for described in entry["inputs"]}
        for described in entry["inputs"]:
            array = arrays[described["name"]]
            stored = np.load(golden / described["file"], allow_pickle=False)
            assert (described["dtype"], described["shape"]) == (array.dtype.name, list(array.shape))
            assert (stored.dtype.str, stored.shape) == (described["stored_as"], array.shape)
            assert bits(stored) == bits(array)
        assert set(entry["absent"]) == {t.name for t in OPS[entry["op"]].tensors if given[t.name] is None}


def test_attributes_and_host_arguments_come_back_exactly(golden):
    for entry in manifest(golden)["cases"]:
        given = make_inputs(OPS[entry["op"]], case_named(entry["op"], entry["case"]))
        call = bind(OPS[entry["op"]], given)
        assert entry["attributes"] == dict(call.attrs)
        assert {name: type(value) for name, value in entry["attributes"].items()} == {
            name: type(value) for name, value in call.attrs.items()
        }
        assert {name: tuple(map(tuple, rows)) for name, rows in entry["host"].items()} == dict(call.host)
        assert entry["spec_version"] == OPS[entry["op"]].version


def test_an_infinite_attribute_is_its_name(tmp_path, monkeypatch):
    chosen = next(case for case in cases("segment_attention"))
    case = type(chosen)(**{**vars(chosen), "attrs": {**chosen.attrs, "scale": 0.1 + 0.2}})
    entry = Entry(tmp_path, "segment_attention", case, 0)
    assert json.loads(json.dumps(entry.write()["attributes"]))["scale"] == 0.1 + 0.2
    entry.call.attrs["scale"] = float("-inf")
    assert entry.write()["attributes"]["scale"] == "-inf"


def test_an_updated_argument_is_an_input_before_and_a_result_after(golden):
    entry = next(e for e in manifest(golden)["cases"] if e["op"] == "gdn_decode")
    before = {array["name"]: array for array in entry["inputs"] if array["updated"]}
    after = {result["name"]: result for result in entry["results"] if result["updated"]}
    assert before.keys() == after.keys() == {"conv_state", "recurrent_state"}
    exact = oracle("gdn_decode").intervals(**make_inputs(OPS["gdn_decode"], case_named("gdn_decode", entry["case"])))
    flags = np.load(golden / after["recurrent_state"]["flags"]["file"])
    assert np.array_equal(flags == 2, exact["recurrent_state"].kept)
    assert {*np.unique(flags)} == {0, 2}


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        export(tmp_path / name, ["gated_rms_norm"], seed=seed)
    a, b, c = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.npy")}
        for name in "abc"
    )
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    assert a == b
    assert a.keys() == c.keys()
    assert a != c


def test_results_of_the_oracle_are_right(golden, tmp_path):
    for entry in manifest(golden)["cases"]:
        write_outputs(tmp_path, entry, results(entry, oracle(entry["op"])))
    assert not any(agreed(golden, tmp_path).values())


@pytest.mark.parametrize("op", [pytest.param(op, marks=LONG.get(op, ())) for op in OPS])
def test_the_verdict_on_wrong_implementations_is_that_of_compare(golden, op, tmp_path):
    entries = [entry for entry in manifest(golden)["cases"] if entry["op"] == op]
    # Only this op's: the other cases have no outputs, which says nothing here.
    mine = tmp_path / "golden"
    export(mine, [op])
    mutants = suite(op).MUTANTS
    chosen = dict(list(mutants.items())[:: max(1, len(mutants) // 8)])
    exact = [oracle(op).intervals(**make_inputs(OPS[op], case_named(op, entry["case"]))) for entry in entries]
    caught = 0
    for name, mutant in chosen.items():
        want = {}
        for entry, bounds in zip(entries, exact, strict=True):
            got = results(entry, mutant)
            write_outputs(tmp_path / name, entry, got)
            want[f"{op}/{entry['case']}"] = {
                r["name"] for r in entry["results"] if compare(r["name"], got[r["name"]], bounds[r["name"]], r["dtype"])
            }
        assert agreed(mine, tmp_path / name) == want, name
        caught += any(want.values())
    assert caught > 2


def every_value(dtype):
    """All bit patterns of a narrow dtype, else random ones and those that matter."""
    size = numpy_dtype(dtype).itemsize
    if size <= 2:
        return np.arange(256**size, dtype=np.uint32).astype(f"u{size}").view(numpy_dtype(dtype))
    patterns = np.random.default_rng(0).integers(0, 2**63, 3000, np.uint64).astype(f"u{size}")
    patterns[::3] >>= np.uint64(8 * size - 8) if size == 8 else np.uint32(8 * size - 8)  # small integers, subnormals
    special = np.array([0, 1, 1 << (8 * size - 1), (1 << (8 * size)) - 1], f"u{size}")
    if size == 4:
        special = np.append(special, np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001], "u4"))
    return np.concatenate([patterns, special]).view(numpy_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_verdicts_are_that_of_compare_on_every_value(dtype, tmp_path):
    """Every bit pattern against intervals of each kind, shuffled so that many are wrong and many are right."""
    rng = np.random.default_rng(1)
    got = every_value(dtype)
    with np.errstate(invalid="ignore"):
        true = got.astype(np.float64)
    true = np.where(rng.random(got.size) < 0.4, rng.permutation(true), true)
    wide = rng.choice([0.0, 0.01, 1e30], got.size) * np.abs(np.where(np.isfinite(true), true, 1.0))
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        kinds = {
            "around": Exact.around(true, wide),
            "copied": Exact(true, true, true, bits=True),
            "kept": Exact(true, true - 0.5, true + 0.5, kept=rng.random(got.size) < 0.5),
            "past_both_ends": Exact(true, np.full(got.size, -1e300), np.full(got.size, 1e300)),
            "anything": Exact(true, np.full(got.size, -np.inf), np.full(got.size, np.inf)),
        }
    if numpy_dtype(dtype).itemsize == 4:
        numbers = np.ascontiguousarray(got).view(np.uint8).astype(np.float64)
        numbers[::7] += 3
        kinds["bytes"] = Exact(numbers, numbers - 1, numbers + 1, parts="uint8")
    if dtype == "uint8":
        numbers = parts_of(got, HALF_BYTE).astype(np.float64)
        numbers[::7] = rng.permutation(numbers[::7])
        kinds["halves"] = Exact(numbers, numbers - 1, numbers + 1, parts=HALF_BYTE)
        kinds["halves_signed"] = Exact(numbers, numbers, numbers, bits=True, parts=HALF_BYTE)
    entry = Entry(tmp_path / "golden", "gated_rms_norm", next(iter(cases("gated_rms_norm"))), 0)
    described, want = [], {}
    blocks = [slice(i, i + max(16, got.size // 256)) for i in range(0, got.size, max(16, got.size // 256))]
    for kind, exact in kinds.items():
        for number, block in enumerate(blocks):
            name = f"{kind}{number}"
            parts = exact.value.size // got.size
            size = slice(block.start * parts, block.stop * parts)
            part = Exact(
                *(array[size] for array in (exact.value, exact.low, exact.high)),
                bits=exact.bits,
                parts=exact.parts,
                kept=None if exact.kept is None else exact.kept[size],
            )
            with np.errstate(all="ignore"):
                described.append(entry.result(Output(name, got[block].shape, dtype), part))
                problem = compare(name, got[block], part, dtype)
            if problem:
                want[name] = COUNT.search(problem)[0]
            write(tmp_path / "out" / described[-1]["file"], got[block])
    case = {"op": "gated_rms_norm", "case": "made", "inputs": [], "results": described}
    document = {"schema": SCHEMA, "cases": [case]}
    (tmp_path / "golden/manifest.json").write_text(json.dumps(document))
    (tmp_path / "golden/index.txt").write_text(index([case]))
    with np.errstate(all="ignore"):
        found = agreed(tmp_path / "golden", tmp_path / "out")["gated_rms_norm/made"]
    assert found == want.keys()
    assert 0 < len(want) < len(described)
    lines = of_c(tmp_path / "golden", tmp_path / "out")[1]
    assert {line.split(": ")[1]: COUNT.search(line)[0] for line in lines if "WRONG" in line} == want


def test_c_says_what_python_says(golden, tmp_path):
    """Also how many elements are wrong, and which one most."""
    for entry in manifest(golden)["cases"]:
        arrays = {name: np.array(array) for name, array in results(entry, oracle(entry["op"])).items()}
        for array in arrays.values():
            flat = array.reshape(-1)
            flat[flat.size // 2 :: 11] = 1
            flat[flat.size // 3 : flat.size // 3 + 1] = 100
        write_outputs(tmp_path, entry, arrays)
    python = [
        f"WRONG  {case}: {problem}" for case, problems in of_python(golden, tmp_path).items() for problem in problems
    ]
    c = [line for line in of_c(golden, tmp_path)[1] if line.startswith("WRONG")]
    assert len(c) == len(python) > 50
    assert [re.match(FIRST, line)[0] for line in c] == [re.match(FIRST, line)[0] for line in python]


def test_an_export_says_what_it_leaves_out(tmp_path):
    done = export(tmp_path / "golden", ["gated_rms_norm"], names=["bfloat16-*", "float32-silu-*"], max_elements=1000)
    assert len(done.cases) > 3
    few = export(tmp_path / "few", ["gated_rms_norm"], names=["bfloat16-*"], max_elements=10)
    assert few.cases == ()
    assert all(why.endswith("elements, more than 10") for why in few.left_out.values())
    assert manifest(tmp_path / "few")["left_out"] == few.left_out
    with pytest.raises(SpecError, match="case: expected a pattern that a case of gated_rms_norm has, got nothing_has"):
        export(tmp_path / "none", ["gated_rms_norm"], names=["nothing_has*"])
    with pytest.raises(SpecError, match="cases: expected one of core, all, got 'some'"):
        export(tmp_path / "none", choice="some")
    with pytest.raises(SpecError, match="golden: expected an empty folder, or none"):
        export(tmp_path / "golden")


def test_an_array_is_read_back_as_it_was_written(tmp_path):
    for dtype in DTYPES:
        array = every_value(dtype)[:24].reshape(2, 3, 4)
        write(tmp_path / "a.npy", array.transpose(2, 0, 1))
        back = read(tmp_path / "a.npy", dtype)
        assert (back.dtype, back.shape) == (array.dtype, (4, 2, 3))
        assert bits(back) == bits(array.transpose(2, 0, 1))
