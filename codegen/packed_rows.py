"""Rows of a quantised weight as a kernel reads them: words of codes, one place of them at a time, and their factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..ir.schemes import Scheme
from .instructions import PAIRED, codes_name
from .writer import Writer

# Codes of a group whose products are summed before its factor. For fewer, which also are not 16 of each place as the
# tensor cores take them, the sums apart cost more registers than a factor for each number.
_DEEP = 64


@dataclass(frozen=True)
class PackedRows:
    """Rows of ``depth`` codes from the address ``pointer`` on, which is Triton text and a multiple of 16 bytes.

    In what its methods print, ``column`` and ``ok`` are columns of the result (rows of the weight) and their mask;
    ``across`` and ``along`` are the shapes that they and what they are read for get.
    """

    pointer: str
    how: Scheme
    depth: int

    @property
    def words(self) -> str:
        """Words in ``BLOCK_K`` codes, as Triton text."""
        return f"BLOCK_K // {self.how.places}"

    def as_numbers(self, kind: str) -> str:
        """The pointer as one to numbers; what is known of its alignment, the cast forgets."""
        return f"tl.multiple_of({self.pointer}.to(tl.pointer_type(tl.{kind})), 16)"

    def print_words(
        self, writer: Writer, name: str, column: str, ok: str, across: str, along: str, more: str = ""
    ) -> None:
        """Print the words of a tile, in 16 bits, under that name. The mask tells by its form that they are read together."""
        row = self.how.row_bytes(self.depth) // 2
        where = f"{self.as_numbers('int16')} + {column}{across} * {row} + word{along}"
        mask = f"{ok}{across} & (word < {self.how.factors_at(self.depth) // 2}){along}"
        writer.line(f"{name} = tl.load({where}, mask={mask}, other=0{more})")

    def print_inputs(self, writer: Writer, place: int) -> None:
        """Print which inputs the codes of one place of the words belong to."""
        run = self.how.run
        writer.line(f"k = word // {run} * {self.how.block} + word % {run} + {run * place}")

    def codes_at(self, words: str, place: int) -> str:
        """The codes of one place of the words, fp32, without zero point and factor.

        A code becomes bits of the fraction of a number whose exponent lets the lowest of them count 1; what that number
        counts without them is taken off. That is exact, and faster than converting integers.
        """
        shift = self.how.bits * place
        rest = 23 - shift
        number = f"({self._masked(words, place)} | {127 + rest << 23}).to(tl.float32, bitcast=True)"
        return f"({number} - {float((1 << rest) + self.how.middle)})"

    def numbers_at(self, words: str, place: int, kind: str) -> str:
        """The same in ``kind``, as Triton text, which holds them exactly."""
        if kind not in PAIRED:
            return f"{self.codes_at(words, place)}.to({kind})"
        return f"{codes_name(kind, self.how.bits, place, self.how.middle)}({words}, PDL)"

    def raw_codes_at(self, words: str, place: int) -> str:
        """The codes of one place as they stand, as numbers without exponent, in fp32: the lowest bit of a word counts 2^-149.

        Multiplying with such numbers is as fast as with any, and takes a single operation to get them.
        """
        return f"{self._masked(words, place)}.to(tl.float32, bitcast=True)"

    def _masked(self, words: str, place: int) -> str:
        return f"({words}.to(tl.int32) & {(1 << self.how.bits) - 1 << self.how.bits * place})"

    def print_column_factors(self, writer: Writer, name: str, column: str, ok: str) -> None:
        """Print the factors of whole rows as ``{name}_factors``; ``column`` and ``ok`` are of one shape."""
        row, first = self.how.row_bytes(self.depth), self.how.factors_at(self.depth)
        where = f"{self.as_numbers('float32')} + {column} * {row // 4} + {first // 4}"
        writer.line(f"{name}_factors = tl.load({where}, mask={ok}, other=0)")

    def print_group_values(
        self, writer: Writer, name: str, column: str, ok: str, group: str, across: str, along: str
    ) -> None:
        """Print the factors and (where the scheme has them) zero points of the groups numbered ``group``, fp32.

        They get the names ``{name}_factors`` and ``{name}_zeros``.
        """
        how, depth = self.how, self.depth
        length, place = how.row_bytes(depth), f"({group}){along}"
        mask = f"mask={ok}{across} & ({group} < {how.groups(depth)}){along}, other=0"
        row = f"{self.as_numbers('float32')} + {column}{across} * {length // 4} + {how.factors_at(depth) // 4}"
        writer.line(f"{name}_factors = tl.load({row} + {place}, {mask})")
        if how.zeros:
            points = f"{self.pointer} + {column}{across} * {length} + {how.zeros_at(depth)} + {place}"
            writer.line(f"{name}_zeros = tl.load({points}, {mask}).to(tl.float32)")

    def print_turn(
        self,
        writer: Writer,
        sums: Sequence[tuple[str, str]],
        ok: str,
        shapes: tuple[str, str],
        rows: Callable[[], AbstractContextManager[str]],
        product: Callable[[str, str, str], str],
        kind: str,
    ) -> None:
        """Print a turn of small matrix products, which begins at ``k0``.

        Where a group is deep enough, its products are summed before the factors. Else each number gets its own.

        Args:
            sums: names of sums that are added to, each with the columns it is of.
            shapes: ``across`` and ``along``.
            rows: prints the rows at the inputs ``k`` and gives their name; left when they were multiplied.
            product: prints operands, of the weight and of rows, and returns their product with a total and a comma, or
                nothing, before its options. ``kind`` is the type of the operands, as Triton text.
        """
        how, (across, along) = self.how, shapes
        apart = how.group >= _DEEP
        exact = kind if apart or not how.group else "tl.float32"  # with a factor of its own a number has more digits
        loop = f"for ahead in tl.static_range(0, BLOCK_K, {how.group}):"
        with writer.block(loop) if apart else nullcontext():
            begin, depth = ("(k0 + ahead)", str(how.group)) if apart else ("k0", "BLOCK_K")
            writer.line(f"word = {begin} // {how.places} + tl.arange(0, {depth} // {how.places})")
            for name, column in sums:
                self.print_words(writer, f"{name}_w", column, ok, across, along)
                if apart:
                    self.print_group_values(writer, name, column, ok, f"{begin} // {how.group}", "", "")
                elif how.group:
                    group = f"word // {how.group // how.places}"
                    self.print_group_values(writer, name, column, ok, group, across, along)
            for place in range(how.places):
                self.print_inputs(writer, place)
                with rows() as given:
                    for name, _ in sums:
                        weight = self.numbers_at(f"{name}_w", place, exact)
                        if how.zeros:
                            weight = f"({weight} - {name}_zeros{across if apart else ''}.to({exact}))"
                        if not apart:
                            weight = f"({weight} * {name}_factors)" if how.group else weight
                            writer.line(f"{name} = {product(weight, given, f'{name}, ')}")
                        elif place == 0:
                            writer.line(f"{name}_part = {product(weight, given, '')}")
                        else:
                            writer.line(f"{name}_part = {product(weight, given, f'{name}_part, ')}")
            if apart:
                for name, _ in sums:
                    writer.line(f"{name} += {name}_part * {name}_factors{across}")
