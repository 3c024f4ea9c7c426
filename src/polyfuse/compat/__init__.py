"""Functions of inference engines under their own names and signatures, in `polyfuse.compat.vllm` and `.sglang`.

Each function is one op of polyfuse, so that a plugin for an engine replaces the engine's function by an import. Its
documentation says what differs, and where the engine's function stands. No engine is imported.

An argument that the op cannot honour raises `NotImplementedError`, and a wrong one `polyfuse.SpecError`, both before
anything runs.
"""
