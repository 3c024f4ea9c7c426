"""Golden vectors: cases as files with the interval of every element, for those who test a kernel without Python."""

from polyfuse.conformance.golden._export import CHOICES, Exported, export
from polyfuse.conformance.golden._verify import Verdict, verify

__all__ = ["CHOICES", "Exported", "Verdict", "export", "verify"]
