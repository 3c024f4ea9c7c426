"""The environment variables that polyfuse reads: their names, and one error for a name or a value that is none."""

import os
from difflib import get_close_matches

from polyfuse.spec import FORMER_NAMES, OPS, SpecError

PREFIX = "POLYFUSE_"
BACKEND = "POLYFUSE_BACKEND"
ENCODER = "POLYFUSE_ENCODER_"
SHADOW = ("POLYFUSE_SHADOW", "POLYFUSE_SHADOW_DUMP", "POLYFUSE_SHADOW_SEED")
SINGLE = (BACKEND, "POLYFUSE_CONFIG", "POLYFUSE_LOG", "POLYFUSE_STREAMS", "POLYFUSE_STRICT", "POLYFUSE_TUNING", *SHADOW)


def known_variables() -> list[str]:
    """Every name that has a meaning, but for the encoder's settings, which the config file's schema names."""
    return [*SINGLE, *(f"{BACKEND}_{name.upper()}" for name in (*OPS, *FORMER_NAMES))]


def check_variables() -> None:
    """Raise `SpecError` for a variable that begins as ours do and has no meaning."""
    known = known_variables()
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and not name.startswith(ENCODER) and name not in known:
            raise SpecError(f"environment variable {name}: unknown{did_you_mean(name, known)}")


def flag(name: str) -> bool | None:
    """The value of a variable that is 0 or 1; None where it is not set. Raises `SpecError` for another value."""
    value = os.environ.get(name)
    if not value:
        return None
    if value not in ("0", "1"):
        raise SpecError(f"environment variable {name}: expected 0 or 1, got {value!r}")
    return value == "1"


def tuning_is_frozen() -> bool:
    """Whether kernels may run with measured launch parameters only. Raises `SpecError` for an unknown value."""
    value = os.environ.get("POLYFUSE_TUNING")
    if value not in (None, "", "frozen"):
        raise SpecError(f"environment variable POLYFUSE_TUNING: expected frozen, got {value!r}")
    return value == "frozen"


def shadow() -> tuple[float, int]:
    """The share of calls that shadow mode checks, 0 where it is off, and its seed. Raises `SpecError`."""
    share, seed = (os.environ.get(name) or "0" for name in ("POLYFUSE_SHADOW", "POLYFUSE_SHADOW_SEED"))
    try:
        number = float(share)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise SpecError(f"environment variable POLYFUSE_SHADOW: expected a number from 0 to 1, got {share!r}")
    if not seed.isdecimal():
        raise SpecError(f"environment variable POLYFUSE_SHADOW_SEED: expected an integer >= 0, got {seed!r}")
    return number, int(seed)


def did_you_mean(name: str, known: list[str]) -> str:
    """`; did you mean X?` for what is nearest to a name, else what is known."""
    near = get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
