"""Names of values and the lines of model code they come from."""

from __future__ import annotations

import re

from torch.fx import Node


def short_name(name: str) -> str:
    """A value name for a weight: ``model.layers.0.mlp.up_proj.weight`` becomes ``l0_mlp_up_proj_weight``."""
    layer = re.search(r"(?:^|\.)(\d+)\.", name)
    rest = name[layer.end() :] if layer else name
    rest = rest.removeprefix("model.")
    return re.sub(r"\W", "_", f"l{layer[1]}_{rest}" if layer else rest)


def source_line(node: Node) -> str:
    """The innermost line of the model's own code: ``modeling_llama.py:182``."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "modeling_" in frame[0]]
    return f"{own[-1][0].rpartition('/')[2]}:{own[-1][1]}" if own else ""


def value_name(node: Node, name: str = "") -> str:
    """A name that tells the layer and the module: ``l0_q_proj``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    layer = re.search(r"\.(\d+)(?:\.|$)", path)
    leaf = path.rpartition(".")[2]
    packet = str(node.target).removeprefix("aten.").partition(".")[0]
    base = name or (leaf if packet in ("linear", "embedding", "addmm") and leaf and not leaf.isdigit() else packet)
    return f"l{layer[1]}_{base}" if layer else base
