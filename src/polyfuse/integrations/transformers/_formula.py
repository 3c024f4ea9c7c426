"""What a module's `forward` computes, read off a trace of it: a part is told by that, not by the name of its class."""

from typing import Any

from torch import fx, nn
from torch.fx.proxy import TraceError

SILU = ("SiLU", "SiLUActivation")


class _Tracer(fx.Tracer):
    """Traces a module's own `forward` alone, its children as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def formula(module: nn.Module) -> str | None:
    """What a `forward(x)` computes, with SiLU as `silu` and other children by name.

    None if it branches, or takes other arguments.
    """
    try:
        graph = _Tracer().trace(module)
    except (TraceError, TypeError):
        return None
    (output,) = graph.find_nodes(op="output")
    return _written(output.args[0], module) if len(graph.find_nodes(op="placeholder")) == 1 else None


def _written(node: Any, module: nn.Module) -> str:
    """The expression that a node of a traced `forward` computes."""
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "placeholder":
        return "x"
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if node.op == "call_module" and type(module.get_submodule(name)).__name__ in SILU:
        name = "silu"
    arguments = [_written(value, module) for value in node.args]
    arguments += [f"{key}={_written(value, module)}" for key, value in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"
