"""Every op as one Pallas kernel: interpreted on CPU, native where the op's CAPABILITY says so."""

if __name__ != "polyfuse.reference.pallas":
    raise ImportError(f"import polyfuse.reference.pallas, not {__name__}")
