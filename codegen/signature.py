"""What all emitted files share: parameters, pointer types, and the frame of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from ..ir.graph import Graph, type_of
from ..ir.ops import op_name
from ..ir.schemes import scheme_of
from .expressions import helpers_used
from .writer import Writer

POINTERS = {
    "f32": "*fp32",
    "f16": "*fp16",
    "bf16": "*bf16",
    "f8e4m3": "*fp8e4nv",
    "i64": "*i64",
    "i32": "*i32",
    "i8": "*i8",
    "bool": "*i1",
}


TRITON_TYPES = {"f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16"}


def fresh_outputs(graph: Graph) -> list[Node]:
    """The results that the caller allocates: all but updated caches, which are written in place."""
    results: list[Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    return [node for node in results if op_name(node.target) != "nn.cache_write"]


def parameters(graph: Graph) -> list[str]:
    """The tensors a launcher takes: the inputs, then the results to fill."""
    return [node.name for node in graph.inputs()] + [node.name for node in fresh_outputs(graph)]


def pointer_types(graph: Graph) -> dict[str, str]:
    """Triton's types of the pointer parameters."""
    return {f"{node.name}_ptr": _pointer(type_of(node).dtype) for node in [*graph.inputs(), *fresh_outputs(graph)]}


def _pointer(dtype: str) -> str:
    return "*u8" if scheme_of(dtype) else POINTERS[dtype]


OVERLAPS = """\
@functools.cache
def overlaps(device):
    \"\"\"Whether a kernel may begin before the one in front of it has ended, and waits for it by itself.\"\"\"
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
"""

COUNTERS = """\
@functools.cache
def counters(device, count):
    \"\"\"Zeros that the parts of a result count their arrival in; the last of them leaves zero again.\"\"\"
    return torch.zeros(count, dtype=torch.int32, device=device)
"""

_RUN = """\
def run(variant, grid, *arguments, **workspace):
    constants = {**variant["constexprs"], **workspace}
    options = {"num_warps": variant["num_warps"], "num_stages": variant["num_stages"]}
    if overlaps(arguments[0].device):
        constants, options = {**constants, "PDL": True}, {**options, "launch_pdl": True}
    return variant["kernel"][grid](*arguments, **constants, **options)
"""


def file_text(kernels: Sequence[str], *host: str) -> str:
    """The file of the kernels: imports, the helper functions that they call, the kernels, and the host's part.

    Kernels take ``PDL`` (programmatic dependent launch), and are launched through ``run``.
    """
    imports = "import functools\n\nimport torch\nimport triton\nimport triton.language as tl\n"
    helpers = helpers_used("\n".join(kernels))
    return "\n\n".join([imports, *helpers, *kernels, OVERLAPS, _RUN, *host])


def kernel_text(name: str, parameters: str, body: str, unspecialised: Sequence[str] = ()) -> str:
    """A kernel as text. Integers named ``unspecialised`` have no value or factor that a kernel is compiled for."""
    names = ", ".join(f'"{item}"' for item in unspecialised)
    decorator = f"@triton.jit(do_not_specialize=[{names}])" if names else "@triton.jit"
    return f"{decorator}\ndef {name}({parameters}):\n{body}"


def types_text(signature: Mapping[str, str]) -> str:
    """The types of a kernel's parameters as the text of a dict."""
    return "{" + ", ".join(f'"{name}": "{kind}"' for name, kind in signature.items()) + "}"


def print_begin(writer: Writer, wait: bool = False) -> None:
    """Print that the next kernel may begin, which waits for this one by itself; and the ``wait`` for those in front."""
    writer.line("if PDL:")
    writer.line("    tl.extra.cuda.gdc_launch_dependents()")
    if wait:
        writer.line("    tl.extra.cuda.gdc_wait()")


def print_wait(writer: Writer) -> None:
    """Print the wait for the kernels in front, after which all that they wrote is there."""
    writer.line("if PDL:")
    writer.line("    tl.extra.cuda.gdc_wait()")
