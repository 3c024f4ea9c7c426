"""What the ranks of data-parallel encoding compare before they encode: a row of bytes each, whose size never changes.

    error: int64 | 5 facts, each the 16 bytes of its digest and 240 of its text

A fact is what has to be the same on all ranks; its text is cut, its digest is of all of it. If `error` is not 0 the
rank cannot take part, and the first `error` bytes behind it are the message, in the place of the facts.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from polyfuse.runtime.encoder.protocol import BufferSpec, EncoderRequest, GraphableEncoder
from polyfuse.spec import dtype_name

_SIZE = 8
_DIGEST, _TEXT = 16, 240
_FACT = _DIGEST + _TEXT
_FACTS = ("encoder", "inputs", "outputs", "token_multiple", "items")


def header(encoder: GraphableEncoder, request: EncoderRequest) -> bytes:
    """The row of a rank that can take part."""
    sizes = [tuple(size) for size in request.sizes]
    facts = (
        encoder.name,
        _shown(encoder.inputs),
        _shown(encoder.outputs),
        str(encoder.token_multiple),
        f"{len(sizes)} of {sum(tokens for tokens, _ in sizes)} tokens, as (tokens, frames) {sizes}",
    )
    return bytes(_SIZE) + b"".join(map(_fact, facts))


def failed_header(error: Exception) -> bytes:
    """The row of a rank that has an error in place of a request."""
    text = error_text(error)[: len(_FACTS) * _FACT]
    return len(text).to_bytes(_SIZE, "little") + text.ljust(len(_FACTS) * _FACT, b"\0")


def check_headers(rows: Sequence[bytes], ranks: Sequence[int], error: Exception | None) -> None:
    """Raise `RuntimeError` unless all rows are equal or errors of one type; `ranks` are whose the rows are.

    It is raised from this rank's own error where there is one.
    """
    if len(set(rows)) == 1:
        return
    sizes = [int.from_bytes(row[:_SIZE], "little") for row in rows]
    failures = {rank: row[_SIZE : _SIZE + size] for rank, row, size in zip(ranks, rows, sizes, strict=True) if size}
    types = {text.partition(b":")[0] for text in failures.values()}
    if len(failures) == len(rows) and len(types) == 1:
        return
    if failures:
        raise failure(failures) from error
    differences = []
    for i, name in enumerate(_FACTS):
        start = _SIZE + i * _FACT
        having: dict[bytes, list[int]] = {}
        for rank, row in zip(ranks, rows, strict=True):
            having.setdefault(row[start : start + _FACT], []).append(rank)
        if len(having) > 1:
            differences += [f"{name} {_text(fact)} on {_named(those)}" for fact, those in having.items()]
    raise RuntimeError(f"data parallel encoding: expected equal calls on all ranks, got {'; '.join(differences)}")


def failure(failures: Mapping[int, bytes]) -> RuntimeError:
    """The error of a request that failed on some ranks, from the texts of their errors."""
    texts = [f"on rank {rank}: {text.decode(errors='replace')}" for rank, text in failures.items()]
    return RuntimeError(f"data parallel encoding failed {'; '.join(texts)}")


def error_text(error: Exception) -> bytes:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).encode()


def _fact(value: str) -> bytes:
    whole = value.encode()
    shown = whole if len(whole) <= _TEXT else whole[: _TEXT - 3] + b"..."
    return blake2b(whole, digest_size=_DIGEST).digest() + shown.ljust(_TEXT, b"\0")


def _text(fact: bytes) -> str:
    return fact[_DIGEST:].rstrip(b"\0").decode(errors="replace")


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _shown(specs: Mapping[str, BufferSpec]) -> str:
    """Specs in short: `pixels bfloat16 [4*tokens, 1536]`."""
    texts = []
    for name, spec in specs.items():
        counts = (spec.rows.per_token, "tokens"), (spec.rows.per_item, "items")
        rows = " + ".join(f"{count}*{unit}" for count, unit in counts if count)
        texts.append(f"{name} {dtype_name(spec.dtype)} [{', '.join([rows, *map(str, spec.shape)])}]")
    return ", ".join(texts)
