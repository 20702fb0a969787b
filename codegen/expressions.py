"""How each pointwise operator prints as a Triton expression on tiles. Floats are computed in fp32."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..ir.cache_rounding import LARGEST
from ..ir.graph import type_of
from ..ir.ops import op_name
from .exchange import HELPERS as EXCHANGE_HELPERS
from .instructions import HELPERS as INSTRUCTION_HELPERS
from .largest import HELPERS as LARGEST_HELPERS
from .rounding import HELPERS as ROUNDING_HELPERS

Print = Callable[[Sequence[str], Node], str]

_INTEGERS = {
    "i64": "tl.int64",
    "i32": "tl.int32",
    "i16": "tl.int16",
    "i8": "tl.int8",
    "u8": "tl.uint8",
    "bool": "tl.int1",
}

# Functions that an expression may call; a kernel file holds those that it uses.
HELPERS = {
    **EXCHANGE_HELPERS,
    **INSTRUCTION_HELPERS,
    **LARGEST_HELPERS,
    **ROUNDING_HELPERS,
    "prefetch": """@triton.jit
def prefetch(pointers, BYTES: tl.constexpr):
    # To the L2 cache, by the copy engine: no register waits for it. Needs sm_90, and takes whole 16 bytes.
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,n",
        [pointers.to(tl.int64) & -16, BYTES], dtype=tl.int32, is_pure=False, pack=1,
    )
""",
    "tanh": """@triton.jit
def tanh(x):
    # exp(-2|x|) loses the small values to cancellation, so they take the first terms of the series.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
""",
    "quarter_turns": """@triton.jit
def quarter_turns(x):
    # Positions make large angles: whole quarter turns are taken off in fp64, the rest is within 45 degrees.
    turns = x.to(tl.float64) * 0.6366197723675814
    whole = tl.floor(turns + 0.5)
    return whole.to(tl.int64) & 3, ((turns - whole) * 1.5707963267948966).to(tl.float32)
""",
    "sine_series": """@triton.jit
def sine_series(r):
    r2 = r * r
    return r * (1.0 + r2 * (-1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * (1.0 / 362880)))))
""",
    "cosine_series": """@triton.jit
def cosine_series(r):
    r2 = r * r
    return 1.0 + r2 * (-0.5 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 + r2 * (-1.0 / 3628800)))))
""",
    "cosine": """@triton.jit
def cosine(x):
    quarter, r = quarter_turns(x)
    value = tl.where((quarter & 1) == 0, cosine_series(r), sine_series(r))
    return tl.where((quarter == 1) | (quarter == 2), -value, value)
""",
    "sine": """@triton.jit
def sine(x):
    quarter, r = quarter_turns(x)
    value = tl.where((quarter & 1) == 0, sine_series(r), cosine_series(r))
    return tl.where(quarter >= 2, -value, value)
""",
    "gelu": """@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
""",
    "gelu_tanh": """@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
""",
    "silu": """@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))
""",
    "softplus": """@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
""",
}


def _infix(symbol: str) -> Print:
    return lambda a, node: f"{a[0]} {symbol} {a[1]}"


def _call(function: str) -> Print:
    return lambda a, node: f"{function}({', '.join(a)})"


def _power(a: Sequence[str], node: Node) -> str:
    x, exponent = a[0], node.args[1]
    return {
        2: f"{x} * {x}",
        3: f"{x} * {x} * {x}",
        4: f"({x} * {x}) * ({x} * {x})",
        0.5: f"tl.sqrt({x})",
        -0.5: f"1.0 / tl.sqrt({x})",
        -1: f"1.0 / {x}",
    }[exponent]  # type: ignore[index]


def _clamp(a: Sequence[str], node: Node) -> str:
    low, high = ((*node.args[1:], None, None))[:2]
    text = a[0]
    if low is not None:
        text = f"tl.maximum({text}, {a[1]})"
    if high is not None:
        text = f"tl.minimum({text}, {a[2]})"
    return text


def _cast(a: Sequence[str], node: Node) -> str:
    kind = type_of(node).dtype
    if kind in _INTEGERS:
        return f"{a[0]}.to({_INTEGERS[kind]})"
    if kind == "bool":
        return f"{a[0]} != 0"
    source = node.args[0]
    assert isinstance(source, Node)
    return a[0] if type_of(source).torch_dtype.is_floating_point else f"{a[0]}.to(tl.float32)"


def _gelu(a: Sequence[str], node: Node) -> str:
    return f"{'gelu_tanh' if node.kwargs.get('approximate') == 'tanh' else 'gelu'}({a[0]})"


def _gelu_mul(a: Sequence[str], node: Node) -> str:
    tanh = len(node.args) > 2 and node.args[2] == "tanh"
    return f"{'gelu_tanh' if tanh else 'gelu'}({a[0]}) * {a[1]}"


def _head_codes(a: Sequence[str], node: Node) -> str:
    kind = type_of(node).dtype
    return f"code({a[0]}, {a[1]}, {LARGEST[kind]}, {kind in _INTEGERS})"


def _divide(a: Sequence[str], node: Node) -> str:
    return f"{a[0]} / {a[1]}"


PRINTERS: dict[str, Print] = {
    "aten.add.Tensor": _infix("+"),
    "aten.sub.Tensor": _infix("-"),
    "aten.mul.Tensor": _infix("*"),
    "aten.div.Tensor": _divide,
    "aten.rsub.Scalar": lambda a, node: f"{a[1]} - {a[0]}",
    "aten.neg": lambda a, node: f"-{a[0]}",
    "aten.abs": _call("tl.abs"),
    "aten.exp": _call("tl.exp"),
    "aten.exp2": _call("tl.exp2"),
    "aten.log": _call("tl.log"),
    "aten.log2": _call("tl.log2"),
    "aten.sqrt": _call("tl.sqrt"),
    "aten.rsqrt": lambda a, node: f"1.0 / tl.sqrt({a[0]})",
    "aten.reciprocal": lambda a, node: f"1.0 / {a[0]}",
    "aten.cos": _call("cosine"),
    "aten.sin": _call("sine"),
    "aten.tanh": _call("tanh"),
    "aten.erf": _call("tl.erf"),
    "aten.floor": _call("tl.floor"),
    "aten.sigmoid": lambda a, node: f"1.0 / (1.0 + tl.exp(-{a[0]}))",
    "aten.relu": lambda a, node: f"tl.maximum({a[0]}, 0.0)",
    "aten.silu": _call("silu"),
    "aten.softplus": _call("softplus"),
    "aten.square": lambda a, node: f"{a[0]} * {a[0]}",
    "aten.pow.Tensor_Scalar": _power,
    "aten.clamp": _clamp,
    "aten.clamp.Tensor": _clamp,
    "aten.clamp_min": lambda a, node: f"tl.maximum({a[0]}, {a[1]})",
    "aten.clamp_max": lambda a, node: f"tl.minimum({a[0]}, {a[1]})",
    "aten.maximum": _call("tl.maximum"),
    "aten.minimum": _call("tl.minimum"),
    "aten.to.dtype": _cast,
    "aten.gelu": _gelu,
    "aten.where.self": _call("tl.where"),
    "aten.masked_fill.Scalar": lambda a, node: f"tl.where({a[1]}, {a[2]}, {a[0]})",
    "aten.logical_and": _infix("&"),
    "aten.logical_or": _infix("|"),
    **dict.fromkeys(["aten.logical_not", "aten.bitwise_not"], lambda a, node: f"{a[0]} == 0"),
    "nn.silu_mul": lambda a, node: f"silu({a[0]}) * {a[1]}",
    "nn.gelu_mul": _gelu_mul,
    "nn.head_codes": _head_codes,
    **{
        f"aten.{name}.{kind}": _infix(symbol)
        for name, symbol in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="))
        for kind in ("Scalar", "Tensor")
        if (name, kind) != ("ne", "Tensor")
    },
}


def print_pointwise(node: Node, arguments: Sequence[str]) -> str:
    """The expression of a pointwise node on the given tiles."""
    return PRINTERS[op_name(node.target)](arguments, node)


def literal(value: Any) -> str:
    """A constant argument as Triton text."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float) and math.isinf(value):
        return 'float("inf")' if value > 0 else 'float("-inf")'
    if isinstance(value, torch.dtype):
        return str(value)
    return repr(value)


def helpers_used(source: str) -> list[str]:
    """The helper functions that a kernel's text calls, those that they call themselves first."""
    texts, found = [source], set[str]()
    while texts:
        text = texts.pop()
        for name, body in HELPERS.items():
            if name not in found and re.search(rf"(?<![\w.]){name}\(", text):
                found.add(name)
                texts.append(body)
    return [body for name, body in HELPERS.items() if name in found]
