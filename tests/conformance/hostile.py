"""A backend package whose kernel does to its process what kernels do, in a case each, and is right in all others."""

import os
import textwrap

from polyfuse.spec import OPS

OP = "gdn_post_conv"
PACKAGE = f"""
    import sys, time, os
    from polyfuse.dispatch import Backend
    BACKEND = Backend("hostile", "numpy", __name__, implements={{"{OP}": {OPS[OP].version}}})
    WAIVING = Backend(
        "hostile", "numpy", __name__, implements=BACKEND.implements, waivers={{"*/rows_1": "erratum 1"}}
    )
    IN_WORKER = os.getpid() != {os.getpid()}
"""
KERNEL = """
    import os, pathlib, signal, sys, time
    import numpy as np
    from polyfuse.reference.gdn_post_conv import gdn_post_conv as oracle
    from polyfuse.spec import Capability
    CAPABILITY = Capability()
    kept = []

    def gdn_post_conv(conv_out, a, b, A_log, dt_bias, **options):
        match len(conv_out), conv_out.shape[1]:
            case 1, _:
                os.kill(os.getpid(), signal.SIGSEGV)
            case 2, _:
                pathlib.Path("hangs").write_text(str(os.getpid()))
                while True:
                    pass
            case 67, _:
                print("this chip needs a rest")
                os._exit(0)
            case 7, _:
                while True:
                    kept.append(np.ones(2**24))
                    time.sleep(0.005)
            case 9, 384:
                raise ZeroDivisionError("deliberate")
            case 9, 1408:
                sys.exit(0)
            case 5, _:
                kept.append(np.ones(2**24))
                if len(kept) > 6:
                    raise MemoryError("the leak has accumulated")
        return oracle(conv_out, a, b, A_log, dt_bias, **options)
"""
# Each case that goes wrong with its ending, in the order of the cases; qkv_large is right.
ENDINGS = {
    "rows_1": "crashed",
    "rows_2": "timed_out",
    "rows_67": "exited",
    "dims_k24-v40-heads3": "raised",
    "dims_k80-v96-heads4": "exited",
    "one_value_head": "out_of_memory",
}
ONLY = [*ENDINGS, "qkv_large"]


def write(folder, name="hostile", more=""):
    """Lay the package out in a folder, with `more` code in it."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(textwrap.dedent(PACKAGE) + textwrap.dedent(more))
    (folder / name / f"{OP}.py").write_text(textwrap.dedent(KERNEL))
