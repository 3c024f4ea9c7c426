"""The files of golden vectors: arrays as .npy, of which nothing is unpickled."""

import hashlib
import re
from io import BytesIO
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from polyfuse.reference._numerics import Array, numpy_dtype
from polyfuse.spec import SpecError

SCHEMA = 2  # of the manifest and of the index, raised when a reader of the former one would misread it
MANIFEST, INDEX, VERIFIER = "manifest.json", "index.txt", "golden_verify.c"

# What a flag of an element of a result means.
ANY, SIGN = 1, 2

MAGIC, LONGEST_HEADER, MOST_DIMS = b"\x93NUMPY", 10_000, 32

# The keys of a .npy file's header, and the form of the value of each.
_HEADER = {
    "descr": r"""(['"])([^'"]*)\1""",
    "fortran_order": "True|False",
    "shape": r"\( *(?:\d+ *(?:, *|(?=\))))*\)",
}


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype that a .npy file has for a dtype name, little-endian.

    A .npy file cannot name the low-precision dtypes: unsigned integers of their size hold their bits.
    """
    own = numpy_dtype(dtype)
    return (own if own.isbuiltin == 1 else np.dtype(f"u{own.itemsize}")).newbyteorder("<")


def write(path: Path, array: Array) -> str:
    """Write the bits of an array, in C order, and return the file's SHA-256."""
    stored = np.ascontiguousarray(array).reshape(array.shape)
    with BytesIO() as buffer:
        np.lib.format.write_array(buffer, stored.view(stored_dtype(stored.dtype.name)), (1, 0), allow_pickle=False)
        data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read(path: Path, dtype: str) -> Array:
    """The array that a .npy file holds, as one of `dtype`.

    Raises `SpecError` for a file that is missing, is no .npy file, holds another dtype, or is too short or too long for
    the shape that it states.
    """
    return parse(contents(path), dtype, path)


def contents(path: Path) -> bytes:
    """The bytes of a file. Raises `SpecError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}") from error


def parse(data: bytes, dtype: str, path: Path) -> Array:
    """The array in the bytes of a .npy file; `path` is for messages. Raises `SpecError` as `read` does.

    NumPy's own reader takes headers in forms that no writer gives them, and memory for any shape. This one takes what
    the C program takes, and looks at the size of the file first.
    """
    if len(data) < 10 or data[:6] != MAGIC:
        raise SpecError(f"{path}: not a .npy file")
    if data[6:8] not in (b"\1\0", b"\2\0"):
        raise SpecError(f"{path}: expected version 1.0 or 2.0 of the .npy format, got another")
    start = 10 if data[6] == 1 else 12
    end = start + int.from_bytes(data[8:start], "little")
    header = data[start:end]
    found, fortran_order, shape = (_value(header, key, form) for key, form in _HEADER.items())
    if len(data) < end or len(header) > LONGEST_HEADER or b"\0" in header or not (found and fortran_order and shape):
        raise SpecError(f"{path}: not a .npy file")
    stored, said = stored_dtype(dtype), found[2].decode("latin1")
    if said != stored.str:
        raise SpecError(f"{path}: expected dtype '{stored.str}' (the bits of {dtype}), got '{said}'")
    sizes = [int(size) for size in re.findall(rb"\d+", shape[0])]
    if len(sizes) > MOST_DIMS:
        raise SpecError(f"{path}: not a .npy file")
    if prod(sizes) * stored.itemsize != len(data) - end:
        raise SpecError(f"{path}: {len(data) - end} bytes of data are not those of its shape")
    try:
        values = np.frombuffer(data, stored, offset=end).reshape(
            sizes, order="F" if fortran_order[0] == b"True" else "C"
        )
    except (ValueError, OverflowError) as error:
        raise SpecError(f"{path}: no array can have its shape") from error
    return values.view(numpy_dtype(dtype))


def _value(header: bytes, key: str, form: str) -> re.Match[bytes] | None:
    """What the header of a .npy file says of a key, if that has the form that it must have."""
    named = re.search(rf"""(['"]){key}\1 *: *""".encode(), header)
    return re.compile(form.encode()).match(header, named.end()) if named else None


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder. Raises `SpecError` for a name that leads out of it."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise SpecError(f"{folder}: expected the name of a file inside of it, got {name!r}")
    return folder / parts
