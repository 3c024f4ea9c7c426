"""What surrounds a backend's results is watched, of the built-in backends as well."""

import pytest
import torch

from polyfuse.conformance import cases, make_inputs, place
from polyfuse.conformance.checks import memory
from polyfuse.dispatch import registry
from polyfuse.spec import OPS

BACKENDS = [registry().get(name) for name in ("torch", "triton")]


@pytest.mark.parametrize(
    ("backend", "op"),
    [(backend, op) for backend in BACKENDS for op in OPS if not backend.missing(op)],
    ids=lambda value: getattr(value, "name", value),
)
@torch.no_grad()
def test_results_lie_inside_of_the_guarded_buffers(backend, op):
    values = place(make_inputs(OPS[op], cases(op)[0]), "torch", "cpu")
    with memory._guarded(0x7F) as buffers:
        found = backend.load(op).function(**values)
    storages = {buffer.untyped_storage().data_ptr() for buffer, _ in buffers}
    results = [x for x in (found if isinstance(found, tuple) else (found,)) if x.numel()]
    assert results
    assert {x.untyped_storage().data_ptr() for x in results} <= storages
