"""The files of golden vectors: arrays as .npy, of which nothing is unpickled."""

import hashlib
from io import BytesIO
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from polyfuse.reference._numerics import Array, numpy_dtype
from polyfuse.spec import SpecError

SCHEMA = 1  # of the manifest and of the index, raised when a reader of the former one would misread it
MANIFEST, INDEX, VERIFIER = "manifest.json", "index.txt", "golden_verify.c"

# What a flag of an element of a result means.
ANY, SIGN = 1, 2

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


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
    """The array in the bytes of a .npy file; `path` is for messages. Raises `SpecError` as `read` does."""
    file = BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran_order, found = _HEADERS[version](file)
    except KeyError as error:
        raise SpecError(f"{path}: expected version 1.0 or 2.0 of the .npy format, got another") from error
    except (ValueError, TypeError, SyntaxError) as error:
        raise SpecError(f"{path}: not a .npy file") from error
    stored = stored_dtype(dtype)
    if found.str != stored.str:
        raise SpecError(f"{path}: expected dtype '{stored.str}' (the bits of {dtype}), got '{found.str}'")
    left = len(data) - file.tell()
    if any(size < 0 for size in shape) or prod(shape) * stored.itemsize != left:
        raise SpecError(f"{path}: {left} bytes of data are not those of shape {list(shape)}")
    values = np.frombuffer(data, stored, offset=file.tell())
    return values.reshape(shape, order="F" if fortran_order else "C").view(numpy_dtype(dtype))


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder. Raises `SpecError` for a name that leads out of it."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise SpecError(f"{folder}: expected the name of a file inside of it, got {name!r}")
    return folder / parts
