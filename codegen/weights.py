"""How the kernels of a matmul read a tile of its weight: as it is, or from the bytes of a quantisation scheme."""

from __future__ import annotations

from torch.fx import Node

from ..ir.graph import type_of
from ..ir.schemes import Scheme, scheme_of
from ..ir.types import TensorType
from .columns import Plan
from .writer import Writer

_TRITON = {"f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16"}


def is_rounded(layout: Plan) -> bool:
    """Whether the weight is quantised."""
    return scheme_of(type_of(layout.weight).dtype) is not None


def rows_type(layout: Plan) -> TensorType:
    """The type of the rows that are multiplied with the weight."""
    rows = layout.anchor.args[0]
    assert isinstance(rows, Node)
    return type_of(rows)


def element(layout: Plan) -> str:
    """The type of the operands of a small matrix product, as Triton text."""
    return _TRITON[rows_type(layout).dtype] if is_rounded(layout) else f"{layout.weight.name}_ptr.dtype.element_ty"


def scheme(layout: Plan) -> Scheme:
    """The scheme of a quantised weight."""
    found = scheme_of(type_of(layout.weight).dtype)
    assert found is not None
    return found


def plain_tile(layout: Plan, column: str, ok: str, across: str, along: str, more: str = "") -> str:
    """The expression of a tile of a weight that is not quantised. ``column`` and ``ok`` are the columns of the result
    (rows of the weight) and their mask; ``across`` and ``along`` are the shapes that they and ``k`` get."""
    where = f"{layout.weight.name}_ptr + {column}{across} * {layout.depth} + k{along}"
    return f"tl.load({where}, mask={ok}{across} & (k < {layout.depth}){along}, other=0{more})"


def words_of(layout: Plan) -> str:
    """Words in ``BLOCK_K`` codes, as Triton text."""
    return f"BLOCK_K // {scheme(layout).places}"


def print_words(
    writer: Writer, layout: Plan, name: str, column: str, ok: str, across: str, along: str, more: str = ""
) -> None:
    """Print the words of a tile, in 16 bits, under that name. The mask tells by its form that they are read together."""
    how = scheme(layout)
    where = f"{_as_numbers(layout, 'int16')} + {column}{across} * {how.row_bytes(layout.depth) // 2} + word{along}"
    mask = f"{ok}{across} & (word < {how.factors_at(layout.depth) // 2}){along}"
    writer.line(f"{name} = tl.load({where}, mask={mask}, other=0{more})")


def print_inputs(writer: Writer, layout: Plan, place: int) -> None:
    """Print which inputs the codes of one place of the words belong to."""
    writer.line(f"k = word // 8 * {scheme(layout).block} + word % 8 + {8 * place}")


def codes_at(layout: Plan, words: str, place: int) -> str:
    """The codes of one place of the words, fp32, without zero point and factor."""
    how = scheme(layout)
    if how.bits == 8:
        return f"{words}.to(tl.int8).to(tl.float32)" if place == 0 else f"({words} >> 8).to(tl.float32)"
    codes = f"(({words} >> {4 * place}) & 15)"
    return f"{codes}.to(tl.float32)" if how.zeros else f"(({codes} ^ 8) - 8).to(tl.float32)"


def column_factors(layout: Plan, column: str) -> str:
    """The factor of each column's sums, ``[1, columns]``; empty if there is none."""
    if not is_rounded(layout) or scheme(layout).group:
        return ""
    row, first = scheme(layout).row_bytes(layout.depth), scheme(layout).factors_at(layout.depth)
    where = f"{_as_numbers(layout, 'float32')} + {column} * {row // 4} + {first // 4}"
    return f"tl.load({where}, mask=n_ok, other=0)"


def group_values(layout: Plan, column: str, ok: str, block: str, across: str, along: str) -> tuple[str, str]:
    """The factors and zero points (empty if there are none) of groups, fp32, for the blocks of codes in ``block``."""
    how, depth = scheme(layout), layout.depth
    length, place = how.row_bytes(depth), f"({block} // {how.group // how.block}){along}"
    mask = f"mask={ok}{across} & ({block} < {depth // how.block}){along}, other=0"
    numbers = (
        f"{_as_numbers(layout, 'float32')} + {column}{across} * {length // 4} + {how.factors_at(depth) // 4} + {place}"
    )
    points = f"{layout.weight.name}_ptr + {column}{across} * {length} + {how.zeros_at(depth)} + {place}"
    return f"tl.load({numbers}, {mask})", f"tl.load({points}, {mask}).to(tl.float32)" if how.zeros else ""


def print_group_values(writer: Writer, layout: Plan, column: str, ok: str, across: str, along: str) -> None:
    """Print the factors and zero points of each word's group, for ``numbers_at``."""
    if scheme(layout).group:
        factors, zeros = group_values(layout, column, ok, "(word // 8)", across, along)
        writer.line(f"factors = {factors}")
        if zeros:
            writer.line(f"zeros = {zeros}")


def numbers_at(layout: Plan, words: str, place: int) -> str:
    """What the codes of one place stand for, in the type that is multiplied; factors of columns are left to the sums."""
    codes = codes_at(layout, words, place)
    if scheme(layout).group:
        codes = f"({codes} - zeros) * factors" if scheme(layout).zeros else f"{codes} * factors"
    return f"({codes}).to({element(layout)})"


def _as_numbers(layout: Plan, kind: str) -> str:
    """The pointer to the weight's bytes as one to numbers; what is known of its alignment, the cast forgets."""
    return f"tl.multiple_of({layout.weight.name}_ptr.to(tl.pointer_type(tl.{kind})), 16)"
