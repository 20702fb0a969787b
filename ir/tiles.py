"""Which operators a kernel can compute on a tile: what grouping may put into a kernel, and codegen can print."""

from __future__ import annotations

from torch.fx import Node

from .graph import Graph, dims_of, flat_types, is_constant, type_of
from .ops import LOOKUPS, PROJECTIONS, op_name
from .schemes import scheme_of
from .types import Dim

# One expression on a tile; the operators with a condition on their arguments are checked in `is_pointwise`.
TILE_POINTWISE = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor sub.Tensor mul.Tensor div.Tensor neg abs exp exp2 log log2 rsqrt sqrt reciprocal cos sin "
        "tanh sigmoid relu silu softplus erf pow.Tensor_Scalar square clamp clamp_min clamp_max maximum "
        "minimum to.dtype gelu rsub.Scalar where.self eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar "
        "ge.Scalar lt.Tensor le.Tensor gt.Tensor ge.Tensor eq.Tensor logical_and logical_or logical_not "
        "masked_fill.Scalar floor clamp.Tensor bitwise_not"
    ).split()
) | {"nn.silu_mul", "nn.gelu_mul"}

# The same values at other coordinates: no work, only index arithmetic.
TILE_VIEWS = frozenset(
    [
        "aten.reshape",
        "aten.unsqueeze",
        "aten.expand",
        "aten.slice.Tensor",
        "aten.transpose.int",
        "aten.select.int",
        "aten.cat",
    ]
)
TILE_LOOKUPS = LOOKUPS | {"aten.index_select"}
TILE_REDUCTIONS = frozenset(
    [
        "nn.rms_norm",
        "nn.layer_norm",
        "nn.add_rms_norm",
        "aten.mean.dim",
        "aten.sum.dim_IntList",
        "aten.amax",
        "aten.softmax.int",
        "nn.head_factors",
        "nn.absmax",
        "nn.quantize",
        "aten.gather",
    ]
)
# Sums over ranks, each of whole rows.
TILE_MEETINGS = frozenset({"dist.all_reduce", "dist.receive"})
# Operators with two results, which kernels make together.
TILE_PAIRS = frozenset({"nn.add_rms_norm", "aten.topk", "aten.max.dim"})
# Those that look for the largest numbers of each row.
TILE_LARGEST = frozenset({"aten.topk", "aten.max.dim"})
# Rows of which the largest numbers, or those in given columns, are looked for one after another, and how many of them.
_TOP_OF, _TOP = 1024, 16
# A row has to fit into the registers of one program, and so does a head with its result.
WIDEST_ROW = 16384
WIDEST_HEAD = 512

_POWERS = frozenset({2, 3, 4, 0.5, -0.5, -1})
_ELEMENTS = frozenset({"f32", "f16", "bf16", "f8e4m3", "i64", "i32", "i8", "bool"})


def is_pointwise(node: Node) -> bool:
    """Whether the operator is one expression on a tile."""
    name = op_name(node.target)
    if name == "dist.send":
        return _plain(node)
    if name not in TILE_POINTWISE or not _plain(node):
        return False
    if name == "aten.pow.Tensor_Scalar":
        return bool(node.args[1] in _POWERS)
    if name == "aten.div.Tensor":
        return not node.kwargs and type_of(node).dtype in ("f32", "f16", "bf16")
    if name in ("aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Scalar"):
        return bool(node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2)
    if name == "aten.to.dtype":
        return type_of(node).dtype in ("f32", "f16", "bf16", "i64", "i32", "bool")
    if name == "aten.bitwise_not":
        return type_of(node).dtype == "bool"
    if name == "aten.softplus":
        return len(node.args) == 1
    return True


def is_row_op(node: Node) -> bool:
    """Whether a kernel that holds whole rows in registers can compute the operator."""
    name = op_name(node.target)
    if not _plain(node) or not _has_rows(node):
        return False
    if name in TILE_POINTWISE:
        return is_pointwise(node)
    if name in TILE_VIEWS:
        return _is_view(node, name)
    if name in TILE_LOOKUPS:
        return bool(name != "aten.index_select" or node.args[1] == 0)
    if name == "aten.gather":
        return _picks(node)
    if name in TILE_REDUCTIONS:
        return _reduces_rows(node, name)
    if name in ("nn.rope", "nn.head_codes", "nn.cache_write"):
        return True
    if name in TILE_MEETINGS:
        return _meets_by_rows(node)
    if name in TILE_LARGEST:
        return _finds_largest(node, name)
    if name == "aten.scatter.value":
        return _writes_column(node)
    pair = node.args[0] if name == "getitem" else None
    return isinstance(pair, Node) and op_name(pair.target) in TILE_PAIRS and is_row_op(pair)


def sums_choices(node: Node) -> bool:
    """Whether an operator adds up the rows of each token, ``[T, J, K]`` to ``[T, K]``."""
    return op_name(node.target) == "aten.sum.dim_IntList" and node.args[1] in ([-2], (-2,), -2)


def is_view(node: Node) -> bool:
    """Whether the operator only looks at values in another shape, and a kernel can follow it by index arithmetic."""
    name = op_name(node.target)
    return name in TILE_VIEWS and name != "aten.cat" and _plain(node) and _is_view(node, name)


def _is_element(dtype: str) -> bool:
    return dtype in _ELEMENTS or scheme_of(dtype) is not None


def _plain(node: Node) -> bool:
    """Element types that kernels handle, the dynamic dim outermost, so that all strides are known, arguments in order."""
    if _by_name(node):
        return False
    for value in [node, *node.all_input_nodes]:
        for kind in flat_types(value.meta["type"]):
            if not _is_element(kind.dtype) or any(isinstance(size, Dim) for size in kind.shape[1:]):
                return False
    return True


def _by_name(node: Node) -> list[str]:
    """Arguments given by name of which kernels know nothing; what ``dtype`` is the result's type says."""
    return [name for name in node.kwargs if name not in ("alpha", "approximate", "dtype")]


def _has_rows(node: Node) -> bool:
    """Whether all results have rows: a vector is none."""
    return all(kind.rank > 1 or dims_of([kind]) for kind in flat_types(node.meta["type"]))


def _is_view(node: Node, name: str) -> bool:
    if name in ("aten.cat", "aten.slice.Tensor"):
        dim = node.args[1] if len(node.args) > 1 else 0
        return bool(dim == -1 and type_of(node).rank > 1)
    if name == "aten.transpose.int":
        return not isinstance(type_of(node).shape[-1], Dim) and -1 not in node.args[1:3]
    return True


def _reduces_rows(node: Node, name: str) -> bool:
    source = node.args[0]
    assert isinstance(source, Node)
    shape = type_of(source).shape
    if not shape or not isinstance(shape[-1], int):
        return False
    if shape[-1] > WIDEST_ROW:
        return False
    if name in ("nn.rms_norm", "nn.layer_norm", "nn.add_rms_norm", "nn.head_factors"):
        return True
    if name == "nn.quantize":  # whole rows, as steps round them: other schemes are for weights
        scheme = scheme_of(type_of(node).dtype)
        return scheme is not None and scheme.dynamic and node.args[2:3] in ((), (1,))
    if name == "nn.absmax":
        return bool(len(node.args) < 2 or node.args[1] == 1)
    if name == "aten.softmax.int":
        return bool(node.args[1] == -1)
    dims = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    if dims == [-1]:
        return keep
    inner = shape[-2] if len(shape) > 2 else None
    return name == "aten.sum.dim_IntList" and dims == [-2] and not keep and isinstance(inner, int) and inner <= 64


def _finds_largest(node: Node, name: str) -> bool:
    """Whether a kernel can look for the largest numbers of each row, in order of size."""
    source, count, *rest = node.args
    assert isinstance(source, Node)
    kind = type_of(source)
    few = isinstance(kind.shape[-1], int) and kind.shape[-1] <= _TOP_OF
    if name == "aten.max.dim":
        return bool(few and kind.torch_dtype.is_floating_point and node.args[1:] == (-1, True))
    dim, biggest, in_order = rest + [-1, True, True][len(rest) :]
    few = few and isinstance(count, int) and count <= _TOP
    return bool(few and not node.kwargs and kind.torch_dtype.is_floating_point and biggest and in_order and dim == -1)


def _writes_column(node: Node) -> bool:
    """Whether one number of each row is replaced by the same number."""
    source, dim, index = node.args[:3]
    assert isinstance(source, Node) and isinstance(index, Node)
    kind, columns = type_of(source), type_of(index).shape
    plain = len(node.args) == 4 and not node.kwargs and kind.torch_dtype.is_floating_point
    return bool(plain and dim == -1 and columns == (*kind.shape[:-1], 1))


def _picks(node: Node) -> bool:
    """Whether a kernel can look for a few columns of each row."""
    source, dim, index = node.args[:3]
    assert isinstance(source, Node) and isinstance(index, Node)
    kind, columns = type_of(source), type_of(index).shape
    width, count = kind.shape[-1], columns[-1]
    few = isinstance(width, int) and width <= _TOP_OF and isinstance(count, int) and count <= _TOP
    plain = len(node.args) == 3 and not node.kwargs and kind.torch_dtype.is_floating_point
    return few and plain and dim in (-1, kind.rank - 1) and kind.shape[:-1] == columns[:-1]


def _meets_by_rows(node: Node) -> bool:
    """Whether ranks can add up whole rows in a kernel, which may write over what it adds up: no one else may read that."""
    source, width = node.args[0], type_of(node).shape[-1]
    alone = isinstance(source, Node) and len(source.users) == 1 and source.op == "call_function"
    fits = isinstance(width, int) and 1 < width <= WIDEST_ROW and type_of(node).rank > 1
    return alone and fits and type_of(node).dtype in ("f32", "f16", "bf16")


def is_matmul(node: Node) -> bool:
    """Whether the node is a linear layer on rows ``[M, K]`` with weights that are constants."""
    if op_name(node.target) not in PROJECTIONS or not _plain(node) or type_of(node).dtype not in ("f32", "f16", "bf16"):
        return False
    x, *weights = node.args[:3]
    if not isinstance(x, Node) or type_of(x).rank != 2:
        return False
    return all(item is None or (isinstance(item, Node) and is_constant(item)) for item in weights)


def is_alone(node: Node) -> bool:
    """Whether a kernel computes the operator and nothing else: attention, or the product of rows with experts."""
    name = op_name(node.target)
    if _by_name(node):
        return False
    return name == "nn.grouped_linear" or (name == "nn.paged_attention" and not _why_not_attended(node))


def _why_not_attended(node: Node) -> str:
    """Why no kernel computes a paged attention; empty if one does."""
    for cache in node.args[1:3]:
        assert isinstance(cache, Node)
        kind = type_of(cache)
        width = kind.shape[-1]
        if not isinstance(width, int) or width > WIDEST_HEAD:
            return f"{cache.name} has heads of {width} numbers: a kernel has room for {WIDEST_HEAD}"
        if kind.dtype in ("i8", "f8e4m3") and width % 2:
            return f"{cache.name} has heads of {width} codes: kernels read codes in pairs"
    return ""


def why_outside(node: Node) -> str:
    """Why no kernel computes an operator."""
    name = op_name(node.target)
    if named := _by_name(node):
        return f"{name}: kernels take arguments in order, not by name: {', '.join(named)}"
    if name == "nn.paged_attention":
        return _why_not_attended(node)
    for value in [node, *node.all_input_nodes]:
        for kind in flat_types(value.meta["type"]):
            if not _is_element(kind.dtype):
                return f"{value.name} has elements of type {kind.dtype}, which kernels do not handle"
            if any(isinstance(size, Dim) for size in kind.shape[1:]):
                return f"{value.name} has rows of tokens in an inner dim: {kind}"
    if not _has_rows(node):
        return f"{node.name} is a vector: it has no rows"
    if name in PROJECTIONS:
        return f"{name}: its weight is computed in the step, or its rows are no matrix"
    known = name in TILE_POINTWISE | TILE_VIEWS | TILE_LOOKUPS | TILE_REDUCTIONS | TILE_PAIRS
    return f"{name}: no kernel takes these arguments" if known else f"{name} is not among the operators of kernels"


def loose(graph: Graph) -> list[Node]:
    """The nodes computed in each step."""
    return [node for node in graph.calls() if not is_constant(node) and str(node.target) != "cache"]
