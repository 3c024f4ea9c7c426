"""The rules of a pool of states, from whose slots a call's sequences begin and into which they leave their states."""

from typing import Any

from polyfuse.spec._types import INTS, Call, TensorSpec
from polyfuse.spec._validate import fail

# The arguments beside `state_pool` [slots, ...].
POOL_ARGUMENTS = (
    TensorSpec("state_indices", ("S",), INTS, "each sequence's slot of the pool, -1 for none", optional=True),
    TensorSpec(
        "has_initial_state", ("S",), ("bool",), "False: the sequence begins from zeros, not its slot", optional=True
    ),
)


def check_pool(call: Call, sequences: Any) -> None:
    """Raise `SpecError` for a pool beside what it is in place of, for one that is too small, and for what needs one."""
    name = call.op.name
    if "state_pool" not in call.dtypes:
        for argument in POOL_ARGUMENTS:
            if argument.name in call.dtypes:
                fail(name, argument.name, "None without a state_pool", "an array")
        return
    if "initial_state" in call.dtypes:
        fail(name, "initial_state", "None beside a state_pool", "an array", "to write it into the sequences' slots")
    if call.attrs["output_final_state"]:
        fail(name, "output_final_state", "False beside a state_pool, which is updated", True)
    least = 1 if "state_indices" in call.dtypes else sequences
    if call.dims["slots"] < least:
        shape = next(t.shape for t in call.op.tensors if t.name == "state_pool")
        fail(name, "state_pool", f"slots >= {least} in [{', '.join(shape)}]", call.dims["slots"])
