"""Files that are missing, cut off or not what they should be: one clear line, in Python and in C."""

import json
import struct

import numpy as np
import pytest

from polyfuse import SpecError
from polyfuse.conformance.golden import export
from polyfuse.conformance.golden._export import index
from polyfuse.conformance.golden._files import read
from polyfuse.reference import oracle
from tests.conformance.golden_files import manifest, of_c, of_python, results, write_outputs

OP, CASE = "gated_rms_norm", "float32-sigmoid-offset_1.0"
NAME = f"{OP}/{CASE}"


@pytest.fixture
def golden(tmp_path):
    export(tmp_path / "golden", [OP], names=[CASE])
    return tmp_path / "golden"


@pytest.fixture
def outputs(golden, tmp_path):
    (entry,) = manifest(golden)["cases"]
    write_outputs(tmp_path / "outputs", entry, results(entry, oracle(OP)))
    return tmp_path / "outputs"


@pytest.fixture
def output(outputs):
    return outputs / NAME / "y.npy"


def problem(golden, outputs):
    """What is wrong with the one result, as both say."""
    (found,) = of_python(golden, outputs)[NAME]
    status, lines, errors = of_c(golden, outputs)
    assert (status, errors) == (1, "")
    assert lines[1:] == ["0 of 1 cases right"]
    assert lines[0].startswith(f"WRONG  {NAME}: ")
    assert lines[0].split(": ")[1] == found.split(": ")[0]
    return found, lines[0].removeprefix(f"WRONG  {NAME}: ")


def npy(header, data=b"", version=1):
    """The bytes of a .npy file with a header of one's own."""
    text = header.encode() if isinstance(header, str) else header
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text + data


def head(descr="'<f4'", fortran="False", shape="(5, 48)"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def test_right_outputs_are_right(golden, outputs):
    assert of_python(golden, outputs) == {NAME: ()}
    assert of_c(golden, outputs) == (0, [f"right  {NAME}", "1 of 1 cases right"], "")


def test_a_missing_output(golden, outputs, output):
    output.unlink()
    assert problem(golden, outputs) == (f"y: {output}: missing",) * 2


def test_fortran_order_is_read(golden, outputs, output):
    array = np.load(output)
    np.save(output, np.asfortranarray(array))
    assert b"'fortran_order': True" in output.read_bytes()
    assert of_python(golden, outputs) == {NAME: ()}
    assert of_c(golden, outputs)[0] == 0
    # The same bytes read in the other order are wrong.
    output.write_bytes(output.read_bytes().replace(b"'fortran_order': True, ", b"'fortran_order': False,"))
    assert "elements wrong" in problem(golden, outputs)[1]


def test_the_second_version_of_the_format_is_read(golden, outputs, output):
    array = np.load(output)
    with output.open("wb") as file:
        np.lib.format.write_array(file, array, (2, 0))
    assert of_python(golden, outputs) == {NAME: ()}
    assert of_c(golden, outputs)[0] == 0


def test_nothing_is_unpickled(golden, outputs, output):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    np.save(output, np.array([Trap()], object), allow_pickle=True)
    python, c = problem(golden, outputs)
    assert python == c == f"y: {output}: expected dtype '<f4' (the bits of float32), got '|O'"


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2", "<u4", "<i4"])
def test_another_dtype_or_order_of_bytes(golden, outputs, output, dtype):
    np.save(output, np.load(output).astype(dtype))
    python, c = problem(golden, outputs)
    assert python == c == f"y: {output}: expected dtype '<f4' (the bits of float32), got '{dtype}'"


def test_a_structured_dtype(golden, outputs, output):
    np.save(output, np.zeros(3, [("a", "<f4")]))
    assert problem(golden, outputs) == (f"y: {output}: not a .npy file",) * 2


def test_another_shape(golden, outputs, output):
    array = np.load(output)
    np.save(output, array.reshape(-1))
    python, c = problem(golden, outputs)
    assert python == c == f"y: expected shape {list(array.shape)}, got [{array.size}]"


def test_a_file_cut_off_anywhere_or_too_long(golden, outputs, output):
    whole = output.read_bytes()
    start = len(whole) - np.load(output).nbytes
    for length in [*range(0, start, 7), start - 1, start, start + 1, len(whole) - 4, len(whole) - 1]:
        output.write_bytes(whole[:length])
        for said in problem(golden, outputs):
            assert "not a .npy file" in said or "bytes of data are not those of" in said, length
    output.write_bytes(whole + b"\0")
    for said in problem(golden, outputs):
        assert "bytes of data are not those of" in said


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\3\4 a zip, and no array",
        b"\x93NUMPY\3\0\x10\0\0\0" + b" " * 16,
        b"\x93NUMPY\1\1\x10\0" + b" " * 16,
        npy("no header"),
        npy("{'descr': '<f4'}"),
        npy(head(shape="(2, -3)")),
        npy(head(shape="(2, 3.0)")),
        npy(head(shape="2")),
        npy(head(shape="(2")),
        npy(head(fortran="Perhaps")),
        npy(head(descr="<f4")),
        npy(head(shape="(4611686018427387905, 4)"), b"\0" * 16),  # 16 bytes in arithmetic of 64 bits
        npy(head(shape="(18446744073709551617,)"), b"\0" * 4),
        npy(head(shape="(99999999999999999999999999,)"), b"\0" * 4),
        npy(head(shape="(" + "1, " * 40 + ")"), b"\0" * 4),
        npy(head(), version=2)[:-30],
        npy(head().encode() + b"\0", b"\0" * 960),
        npy(" " * 20000 + head(), version=2),
    ],
)
def test_garbage(golden, outputs, output, data):
    output.write_bytes(data)
    for said in problem(golden, outputs):
        assert said.startswith(f"y: {output}: ")
        assert "\n" not in said


def test_an_empty_array_may_have_any_other_size(golden, outputs, output):
    output.write_bytes(npy(head(shape="(9223372036854775807, 9223372036854775807, 0)")))
    python, c = problem(golden, outputs)
    assert python == f"y: {output}: no array can have its shape"
    assert c == "y: expected shape [5, 48], got [9223372036854775807, 9223372036854775807, 0]"


@pytest.mark.parametrize("file", ["in/x.npy", "expected/y.low.npy", "expected/y.exact.npy"])
def test_golden_vectors_that_were_changed(golden, outputs, file):
    path = golden / NAME / file
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    for said in problem(golden, outputs):
        assert f"{path}: changed since it was exported" in said
    path.unlink()
    for said in problem(golden, outputs):
        assert said.endswith(f"{path}: missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected schema 2, got None"),
        ('{"schema": 1, "cases": []}', "expected schema 2, got 1; export them again"),
        ('{"schema": 3, "cases": []}', "expected schema 2, got 3"),
        ('{"schema": 2}', "not the manifest of golden vectors: KeyError('cases')"),
        ('{"schema": 2, "cases": [7]}', "not the manifest of golden vectors"),
    ],
)
def test_a_manifest_that_is_none(golden, outputs, text, message):
    (golden / "manifest.json").write_text(text)
    with pytest.raises(SpecError) as raised:
        of_python(golden, outputs)
    assert message in str(raised.value)
    assert str(golden / "manifest.json") in str(raised.value)


def test_an_index_that_does_not_belong_to_the_manifest(golden, outputs):
    (golden / "index.txt").write_text("polyfuse-golden 2\nend 0\n")
    with pytest.raises(SpecError, match=r"index.txt: does not belong to manifest.json; export it again"):
        of_python(golden, outputs)
    assert of_c(golden, outputs)[:2] == (1, ["0 of 0 cases right"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "expected the index of golden vectors of schema 2"),
        (lambda text: text.replace("golden 2", "golden 1"), "of golden vectors of schema 2; export them again"),
        (lambda text: text.replace("golden 2", "golden 3"), "expected the index of golden vectors of schema 2"),
        (lambda text: text[:-2], "line 10 is cut off"),
        (lambda text: text.replace("end 1\n", ""), "cut off"),
        (lambda text: text.replace("end 1", "end 2"), "cut off"),
        (lambda text: text.replace("float32 float32", "float31 float31"), "a dtype that this program knows"),
        (lambda text: text.replace(f"low {OP}", f"low ../{OP}"), "leads out of its folder"),
        (lambda text: text.replace(f"low {OP}", "low /etc"), "leads out of its folder"),
        (lambda text: "".join(x for x in text.splitlines(True) if not x.startswith("high")), "y has no high"),
        (lambda text: text.replace("case ", "case " + "x" * 9000), "is cut off"),
        (lambda text: text.replace("case ", "kind "), "line 2 is none of an index"),
    ],
)
def test_an_index_that_is_none(golden, outputs, change, message):
    """For C, which reads nothing else."""
    path = golden / "index.txt"
    path.write_text(change(path.read_text()))
    status, _, errors = of_c(golden, outputs)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_no_index(golden, outputs):
    (golden / "index.txt").unlink()
    assert of_c(golden, outputs)[0] == 2
    with pytest.raises(SpecError, match=r"index.txt: missing"):
        of_python(golden, outputs)


def test_a_name_that_leads_out_of_the_folder(golden, outputs):
    document = manifest(golden)
    document["cases"][0]["results"][0]["file"] = "../../secret.npy"
    (golden / "manifest.json").write_text(json.dumps(document))
    (golden / "index.txt").write_text(index(document["cases"]))
    assert "expected the name of a file inside of it, got '../../secret.npy'" in of_python(golden, outputs)[NAME][0]
    assert "leads out of its folder" in of_c(golden, outputs)[2]


def test_headers_changed_at_random(golden, outputs, output):
    """Whatever a byte of the header becomes, both say the same of it, and C reads nothing past the file."""
    whole = output.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(0, 70)] = rng.choice(list(b"0123456789'(),:<>|fuTF \0\xff"))
        output.write_bytes(bytes(data))
        right = of_python(golden, outputs)[NAME] == ()
        status, _, errors = of_c(golden, outputs)
        assert (status, errors) == (0 if right else 1, ""), bytes(data[:128])


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(SpecError, match="Is a directory"):
        read(tmp_path, "float32")
