"""Linear layers of mixture-of-experts blocks: each (token, choice) pair times the weight of the expert it chose."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..ir.schemes import Scheme
from .grouped_linear_template import HOPPER_CHOICE, ONE_CHOICE, TEMPLATE
from .packed_rows import PackedRows
from .signature import OVERLAPS
from .writer import Writer


@dataclass(frozen=True)
class GroupedLinearSpec:
    """out[t, j] = weight[ids[t, j]] @ x[t] + bias[ids[t, j]], and zeros where ids[t, j] is none of the experts.

    ``per_pair``: x is [T, top_k, in_features] and gives each pair its own row, not [T, in_features].
    ``transposed``: weights are [num_experts, in_features, out_features], not [num_experts, out_features, in_features].
    ``scheme``: weights are rows of codes, u8 [num_experts, out_features, scheme.row_bytes(in_features)], and if it is dynamic
    so are the rows of x. ``dtype`` is that of out, and of what is not in codes.
    ``chosen_from``: how many experts tokens are sent to, if there are more than these.
    """

    num_experts: int
    top_k: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    per_pair: bool = False
    transposed: bool = False
    bias: bool = False
    scheme: Scheme | None = None
    chosen_from: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise ValueError(f"grouped linear kernels exist for {[str(dtype) for dtype in _TYPES]}, not {self.dtype}")
        if self.scheme is not None and self.transposed:
            raise ValueError("grouped linear kernels read weights in codes row by row")

    @property
    def codes(self) -> Scheme | None:
        """The scheme of rows and weights that are multiplied as codes."""
        return self.scheme if self.scheme is not None and self.scheme.dynamic else None


@dataclass(frozen=True)
class _Tile:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    # Left to choose, the assembler spills a little for the sake of more resident warps.
    maxnreg: int = 255

    def __str__(self) -> str:
        numbers = f"{self.block_m}, {self.block_n}, {self.block_k}, num_warps={self.num_warps}"
        return f"{numbers}, num_stages={self.num_stages}, maxnreg={self.maxnreg}"


@dataclass(frozen=True)
class _Tiles:
    """For pairs that hardly ever go to the same expert, and for few, some and many pairs of each.

    Those for pairs apart are narrow, so that one token's pairs are enough programs for all processors, and read far ahead.
    ``hopper`` are those for some and many pairs there.
    """

    apart: _Tile
    few: _Tile
    some: _Tile
    many: _Tile
    hopper: tuple[_Tile, _Tile] | None = None


_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_HALF = _Tiles(
    _Tile(16, 64, 128, 4, 6), _Tile(16, 128, 128, 4, 3), _Tile(64, 128, 64, 8, 3), _Tile(128, 128, 64, 8, 3),
    (_Tile(64, 256, 64, 8, 3), _Tile(128, 256, 64, 8, 3)),
)  # fmt: skip
_FP32 = _Tiles(_Tile(16, 16, 32, 4, 3), _Tile(16, 32, 32, 4, 3), _Tile(64, 32, 32, 4, 2), _Tile(64, 64, 32, 8, 2))
# Rows that are not whole 16-byte vectors, or not whole tiles, take addresses and masks per element: more registers.
_HALF_ROUGH = _Tiles(
    _Tile(16, 32, 32, 4, 2), _Tile(16, 64, 32, 4, 2), _Tile(64, 64, 32, 8, 2), _Tile(128, 64, 32, 8, 2)
)
_FP32_ROUGH = _Tiles(_Tile(16, 16, 32, 4, 3), _Tile(16, 32, 32, 4, 3), _Tile(64, 32, 16, 4, 2), _Tile(64, 64, 16, 8, 2))

# A turn takes whole groups of 4-bit codes, and 16 codes of each place of their words.
_HALF_BYTES = _Tiles(
    _Tile(16, 64, 128, 8, 6), _Tile(16, 128, 128, 8, 4), _Tile(64, 64, 128, 4, 3), _Tile(128, 64, 128, 8, 2),
    (_Tile(64, 128, 128, 4, 3), _Tile(64, 128, 128, 4, 3)),
)  # fmt: skip
_HALF_PACKED = replace(_HALF_BYTES, apart=_Tile(16, 64, 256, 8, 3), few=_Tile(16, 128, 128, 4, 3, 168))
# Zero points, or many factors, take registers of their own.
_HALF_FINE = replace(_HALF_PACKED, few=_Tile(16, 64, 128, 4, 3))
_FP32_PACKED = _Tiles(
    _Tile(16, 16, 128, 8, 2), _Tile(16, 32, 128, 8, 2), _Tile(32, 32, 128, 8, 2), _Tile(64, 32, 128, 8, 2)
)
# Sums of whole codes, which become numbers, take more registers.
_CODES = _Tiles(
    _Tile(16, 64, 256, 4, 6, 168), _Tile(16, 128, 128, 8, 4), _Tile(64, 128, 128, 8, 3), _Tile(128, 128, 64, 8, 4),
    (_Tile(64, 256, 128, 8, 3), _Tile(128, 256, 128, 8, 3)),
)  # fmt: skip
# Long rows make enough turns for those of twice the length.
_LONG = 2048
_LONG_CODES = replace(_CODES, few=_Tile(16, 128, 256, 4, 3))
# For those of all digits, and for rough rows.
_SMALL_CODES = _Tiles(
    _Tile(16, 32, 64, 4, 3), _Tile(16, 64, 64, 4, 3), _Tile(64, 64, 64, 8, 2), _Tile(128, 32, 64, 8, 2)
)


def grouped_linear_source(spec: GroupedLinearSpec) -> str:
    """The text of a kernel file with ``sort_pairs``, ``launch`` and ``VARIANTS``; equal specs give equal texts."""
    shape = {
        "NUM_EXPERTS": spec.num_experts,
        "PAD_EXPERTS": 1 << spec.num_experts.bit_length(),
        "TOP_K": spec.top_k,
        "IN": spec.in_features,
        "OUT": spec.out_features,
    }
    words = {
        "SHAPE": repr(shape).replace("'", '"'),
        "CHOSEN_FROM": str(max(spec.chosen_from, spec.num_experts)),
        "X_ROW": "pair" if spec.per_pair else "pair // TOP_K",
        "X_SHAPE": _rows_shape(spec),
        "X_STRIDE": str(spec.codes.row_bytes(spec.in_features)) if spec.codes else "IN",
        "OVERLAPS": OVERLAPS,
        "SUMS": "tl.int32" if spec.codes and not spec.codes.floats else "tl.float32",
        "ACC": "sums" if spec.codes else "acc",
        "LOOP": _loop(spec),
        "W_EXPERT": str(spec.scheme.row_bytes(spec.in_features) * spec.out_features) if spec.scheme else "IN * OUT",
        "W_SHAPE": _weight_shape(spec),
        "W_TYPE": "*u8" if spec.scheme else f"*{_TYPES[spec.dtype]}",
        "BIAS_ARG": " bias_ptr," if spec.bias else "",
        "BIAS_ADD": _BIAS_ADD if spec.bias else "",
        "BIAS_PARAMETER": " bias," if spec.bias else "",
        "BIAS_VALUE": " bias," if spec.bias else "",
        "BIAS_TYPE": f', "bias_ptr": "*{_TYPES[spec.dtype]}"' if spec.bias else "",
        "BIAS_DOC": ", bias [NUM_EXPERTS, OUT]" if spec.bias else "",
        "TYPE": f"*{_TYPES[spec.dtype]}",
        "CAPABILITIES": "(90,)" if spec.codes and spec.codes.floats else "(80, 90)",
        "X_TYPE": "*u8" if spec.codes else f"*{_TYPES[spec.dtype]}",
    }
    tiles = _tiles(spec)
    words |= {name.upper(): str(getattr(tiles, name)) for name in ("apart", "few", "some", "many")}
    if tiles.hopper is None:
        words["CHOICE"] = ONE_CHOICE.rstrip()
    else:
        some, many = map(str, tiles.hopper)
        words["CHOICE"] = HOPPER_CHOICE.replace("$SOME$", some).replace("$MANY$", many).rstrip()
    text = TEMPLATE
    for name, value in words.items():
        text = text.replace(f"${name}$", value)
    return text


def _tiles(spec: GroupedLinearSpec) -> _Tiles:
    whole = spec.dtype == torch.float32
    if spec.codes is not None:
        if whole or spec.in_features % 16:
            return _SMALL_CODES
        return _LONG_CODES if spec.in_features >= _LONG else _CODES
    if spec.scheme is not None:
        if whole or spec.scheme.bits == 8:
            return _FP32_PACKED if whole else _HALF_BYTES
        return _HALF_FINE if spec.scheme.zeros or 0 < spec.scheme.group < 64 else _HALF_PACKED
    rough = spec.in_features % 64 != 0 or (spec.transposed and spec.out_features % 8 != 0)
    if whole:
        return _FP32_ROUGH if rough else _FP32
    return _HALF_ROUGH if rough else _HALF


def _rows_shape(spec: GroupedLinearSpec) -> str:
    lead = "T, TOP_K" if spec.per_pair else "T"
    if spec.codes is not None:
        return f"[{lead}, {spec.codes.row_bytes(spec.in_features)}] in {spec.codes.name}"
    return f"[{lead}, IN]"


def _weight_shape(spec: GroupedLinearSpec) -> str:
    if spec.scheme is not None:
        return f"[NUM_EXPERTS, OUT, {spec.scheme.row_bytes(spec.in_features)}] in {spec.scheme.name}"
    return "[NUM_EXPERTS, IN, OUT]" if spec.transposed else "[NUM_EXPERTS, OUT, IN]"


def _loop(spec: GroupedLinearSpec) -> str:
    """The loop over the depth, and what its sums are multiplied with."""
    if spec.codes is not None:
        return _codes_loop(spec, spec.codes)
    return _plain_loop(spec) if spec.scheme is None else _packed_loop(spec, spec.scheme)


def _plain_loop(spec: GroupedLinearSpec) -> str:
    """The loop over the depth, with weights in the type of the rows."""
    writer = Writer()
    if not spec.transposed:
        writer.line("n_row = tl.where(n < OUT, n, 0) * IN  # likewise for a feature past the last")
    with writer.block("for k0 in range(0, IN, BLOCK_K):"):
        writer.line("k = k0 + tl.arange(0, BLOCK_K)")
        writer.line(f"x = {_ROWS}")
        if spec.transposed:
            writer.line("w_mask = (k < IN)[:, None] & (n < OUT)[None, :]")
            writer.line("w = tl.load(expert_ptr + k[:, None] * OUT + n[None, :], mask=w_mask, other=0.0)")
        else:
            writer.line(
                "w = tl.load(expert_ptr + n_row[:, None] + k[None, :], mask=(k < IN)[None, :], other=0.0).trans()"
            )
        writer.line('acc = tl.dot(x, w, acc, input_precision="ieee")')
    return writer.text().rstrip()


def _packed_loop(spec: GroupedLinearSpec, scheme: Scheme) -> str:
    """The loop over the depth, with weights in codes that become numbers on their way."""
    writer, packed = Writer(), PackedRows("expert_ptr", scheme, spec.in_features)

    @contextmanager
    def rows() -> Iterator[str]:
        writer.line(f"x = {_ROWS}")
        yield "x"

    def product(weight: str, given: str, total: str) -> str:
        writer.line(f"w = {weight}.to(x_ptr.dtype.element_ty)")
        return f'tl.dot({given}, w, {total}input_precision="ieee")'

    writer.line("n_ok = n < OUT")
    with writer.block("for k0 in range(0, IN, BLOCK_K):"):
        packed.print_turn(writer, [("acc", "n")], "n_ok", ("[None, :]", "[:, None]"), rows, product, "tl.float32")
    if not scheme.group:
        packed.print_column_factors(writer, "acc", "n", "n_ok")
        writer.line("acc *= acc_factors[None, :]")
    return writer.text().rstrip()


def _codes_loop(spec: GroupedLinearSpec, scheme: Scheme) -> str:
    """The loop over the depth, with rows and weights in codes, whose sums get the factors of both."""
    writer, kind = Writer(), "float8e4nv" if scheme.floats else "int8"
    packed, rows = (PackedRows(pointer, scheme, spec.in_features) for pointer in ("expert_ptr", "x_ptr"))
    options = 'input_precision="ieee"' if scheme.floats else "out_dtype=tl.int32"
    # The tensor cores sum products of E4M3 with less than 24 bits.
    cast = ".to(tl.float16)" if scheme.floats and spec.dtype == torch.float32 else ""
    length = scheme.row_bytes(spec.in_features)
    writer.line("n_ok = n < OUT")
    writer.line(f"n_row = tl.where(n_ok, n, 0) * {length}  # likewise for a feature past the last")
    with writer.block("for k0 in range(0, IN, BLOCK_K):"):
        writer.line("k = k0 + tl.arange(0, BLOCK_K)")
        place = f"{rows.as_numbers(kind)} + x_row[:, None] + k[None, :]"
        writer.line(f"x = tl.load({place}, mask=(k < IN)[None, :], other=0.0){cast}")
        place = f"{packed.as_numbers(kind)} + n_row[:, None] + k[None, :]"
        writer.line(f"w = tl.load({place}, mask=(k < IN)[None, :], other=0.0){cast}.trans()")
        writer.line(f"sums = tl.dot(x, w, sums, {options})")
    packed.print_column_factors(writer, "acc", "n", "n_ok")
    first = scheme.factors_at(spec.in_features)
    writer.line(f"row_factors = tl.load({rows.as_numbers('float32')} + x_row // 4 + {first // 4})")
    writer.line("acc = sums.to(tl.float32) * row_factors[:, None] * acc_factors[None, :]")
    return writer.text().rstrip()


_ROWS = "tl.load(x_ptr + x_row[:, None] + k[None, :], mask=(k < IN)[None, :], other=0.0)"
_BIAS_ADD = """
    acc += tl.load(bias_ptr + expert * OUT + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]"""
