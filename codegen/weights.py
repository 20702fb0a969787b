"""How the kernels of a matmul read a tile of its weight: as it is, or from the bytes of a quantisation scheme."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.schemes import Scheme, scheme_of
from ..ir.types import TensorType
from .columns import Plan
from .writer import Writer

_TRITON = {"f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16"}


def is_rounded(layout: Plan) -> bool:
    """Whether the weight is quantised and the rows are not: its words become numbers."""
    found = scheme_of(type_of(layout.weight).dtype)
    return found is not None and not found.dynamic


def in_codes(layout: Plan) -> bool:
    """Whether weight and rows are multiplied as they are held, in codes of a byte."""
    found = scheme_of(type_of(layout.weight).dtype)
    return found is not None and found.dynamic


def has_column_factors(layout: Plan) -> bool:
    """Whether each column's sums have a factor."""
    return in_codes(layout) or (is_rounded(layout) and not scheme(layout).group)


def rows_type(layout: Plan) -> TensorType:
    """The type of the rows that are multiplied with the weight."""
    rows = layout.anchor.args[0]
    assert isinstance(rows, Node)
    return type_of(rows)


def element(layout: Plan) -> str:
    """The type of the operands of a small matrix product, as Triton text."""
    if in_codes(layout):
        # The tensor cores sum products of E4M3 with less than 24 bits.
        exact = scheme(layout).floats and type_of(layout.anchor).dtype == "f32"
        return "tl.float16" if exact else code_type(scheme(layout))
    return _TRITON[rows_type(layout).dtype] if is_rounded(layout) else f"{layout.weight.name}_ptr.dtype.element_ty"


def code_type(how: Scheme) -> str:
    """The type of a code of a byte, as Triton text."""
    return "tl.float8e4nv" if how.floats else "tl.int8"


def scheme(layout: Plan) -> Scheme:
    """The scheme of a quantised weight."""
    found = scheme_of(type_of(layout.weight).dtype)
    assert found is not None
    return found


def plain_tile(layout: Plan, column: str, ok: str, across: str, along: str, more: str = "") -> str:
    """The expression of a tile of a weight that is not quantised, or of its codes. ``column`` and ``ok`` are the columns of
    the result (rows of the weight) and their mask; ``across`` and ``along`` are the shapes that they and ``k`` get."""
    mask = f"{ok}{across} & (k < {layout.depth}){along}"
    if in_codes(layout):
        how = scheme(layout)
        where = f"{as_numbers(layout.weight, code_type(how)[3:])} + {column}{across} * {row_length(layout)} + k{along}"
        cast = f".to({element(layout)})" if element(layout) != code_type(how) else ""
        return f"tl.load({where}, mask={mask}, other=0.0{more}){cast}"
    where = f"{layout.weight.name}_ptr + {column}{across} * {layout.depth} + k{along}"
    return f"tl.load({where}, mask={mask}, other=0{more})"


def row_length(layout: Plan) -> int:
    """From one row of a weight to the next, in its elements, or in bytes of codes."""
    return scheme(layout).row_bytes(layout.depth) if in_codes(layout) else layout.depth


def words_of(layout: Plan) -> str:
    """Words in ``BLOCK_K`` codes, as Triton text."""
    return f"BLOCK_K // {scheme(layout).places}"


def print_words(
    writer: Writer, layout: Plan, name: str, column: str, ok: str, across: str, along: str, more: str = ""
) -> None:
    """Print the words of a tile, in 16 bits, under that name. The mask tells by its form that they are read together."""
    how = scheme(layout)
    where = (
        f"{as_numbers(layout.weight, 'int16')} + {column}{across} * {how.row_bytes(layout.depth) // 2} + word{along}"
    )
    mask = f"{ok}{across} & (word < {how.factors_at(layout.depth) // 2}){along}"
    writer.line(f"{name} = tl.load({where}, mask={mask}, other=0{more})")


def print_inputs(writer: Writer, layout: Plan, place: int) -> None:
    """Print which inputs the codes of one place of the words belong to."""
    writer.line(f"k = word // 8 * {scheme(layout).block} + word % 8 + {8 * place}")


def codes_at(layout: Plan, words: str, place: int) -> str:
    """The codes of one place of the words, fp32, without zero point and factor.

    A code becomes bits of the fraction of a number whose exponent lets the lowest of them count 1; what that number
    counts without them is taken off. That is exact, and faster than converting integers.
    """
    how = scheme(layout)
    shift = how.bits * place
    rest = 23 - shift
    number = f"({_masked(how, words, place)} | {127 + rest << 23}).to(tl.float32, bitcast=True)"
    return f"({number} - {float((1 << rest) + how.middle)})"


def raw_codes_at(layout: Plan, words: str, place: int) -> str:
    """The codes of one place as they stand, as numbers without exponent, in fp32: the lowest bit of a word counts 2^-149.

    Multiplying with such numbers is as fast as with any, and takes a single operation to get them.
    """
    return f"{_masked(scheme(layout), words, place)}.to(tl.float32, bitcast=True)"


def _masked(how: Scheme, words: str, place: int) -> str:
    return f"({words}.to(tl.int32) & {(1 << how.bits) - 1 << how.bits * place})"


def print_column_factors(writer: Writer, layout: Plan, accumulators: Sequence[str]) -> None:
    """Print the factor of each column's sums, ``[1, columns]``, where the scheme has one for a whole row of the weight."""
    if not has_column_factors(layout):
        return
    row, first = scheme(layout).row_bytes(layout.depth), scheme(layout).factors_at(layout.depth)
    for offset, name in zip(layout.offsets, accumulators):
        column = f"(n[None, :] + {offset})" if offset else "n[None, :]"
        where = f"{as_numbers(layout.weight, 'float32')} + {column} * {row // 4} + {first // 4}"
        writer.line(f"{name}_factors = tl.load({where}, mask=n_ok, other=0)")


def print_group_values(
    writer: Writer, layout: Plan, name: str, column: str, ok: str, group: str, across: str, along: str
) -> None:
    """Print the factors and (where the scheme has them) zero points of the groups numbered ``group``, fp32.

    They get the names ``{name}_factors`` and ``{name}_zeros``.
    """
    how, depth = scheme(layout), layout.depth
    length, place = how.row_bytes(depth), f"({group}){along}"
    mask = f"mask={ok}{across} & ({group} < {how.groups(depth)}){along}, other=0"
    row = f"{as_numbers(layout.weight, 'float32')} + {column}{across} * {length // 4} + {how.factors_at(depth) // 4}"
    writer.line(f"{name}_factors = tl.load({row} + {place}, {mask})")
    if how.zeros:
        points = f"{layout.weight.name}_ptr + {column}{across} * {length} + {how.zeros_at(depth)} + {place}"
        writer.line(f"{name}_zeros = tl.load({points}, {mask}).to(tl.float32)")


def as_numbers(value: Node, kind: str) -> str:
    """The pointer to a value's bytes as one to numbers; what is known of its alignment, the cast forgets."""
    return f"tl.multiple_of({value.name}_ptr.to(tl.pointer_type(tl.{kind})), 16)"
