"""The oracle: every op in NumPy float64, written to be read."""

if __name__ != "polyfuse.reference":
    raise ImportError(f"import polyfuse.reference, not {__name__}")
