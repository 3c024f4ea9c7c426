"""Text of backends and their errors, made safe to show."""

import re

# What XML cannot hold, half characters, and what makes the text around it run the other way.
_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with every character escaped that a page or an XML file cannot hold, as Python would write it."""
    return _UNPRINTABLE.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def number(count: int, noun: str) -> str:
    """A count with its noun, as `1 case` and `1,234 cases`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def words(reason: str) -> str:
    """A status or a reason as text."""
    return reason.replace("_", " ")
