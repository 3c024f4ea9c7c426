"""Every op in plain PyTorch, for any device."""

if __name__ != "polyfuse.torch_impl":
    raise ImportError(f"import polyfuse.torch_impl, not {__name__}")
