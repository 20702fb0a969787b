"""Types of graph values: an element type, a shape with named dynamic dims, and a placement."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from .schemes import scheme_of

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "f8e4m3": torch.float8_e4m3fn,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "c64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {value: key for key, value in DTYPES.items()}


@dataclass(frozen=True)
class Dim:
    """An affine expression over named dynamic dims, such as ``T``, ``4*T`` or ``T+1``.

    ``terms`` maps dim names to non-zero factors, sorted by name; ``offset`` is the constant part.
    """

    terms: tuple[tuple[str, int], ...]
    offset: int = 0

    @staticmethod
    def named(name: str) -> Dim:
        return Dim(((name, 1),))

    @staticmethod
    def build(terms: Mapping[str, int], offset: int = 0) -> Dim | int:
        """The simplest value for the expression: a plain ``int`` if no named dim is left in it."""
        kept = tuple(sorted((name, factor) for name, factor in terms.items() if factor))
        return Dim(kept, offset) if kept else offset

    def substitute(self, values: Mapping[str, int]) -> int:
        """The size under concrete values of the named dims. Raises ``KeyError`` for a dim without a value."""
        return sum(values[name] * factor for name, factor in self.terms) + self.offset

    def __str__(self) -> str:
        if len(self.terms) == 1 and self.terms[0][1] == 1 and not self.offset:
            return self.terms[0][0]
        parts = [f"{factor:+d}*{name}" for name, factor in self.terms]
        text = re.sub(r"([+-])1\*", r"\1", "".join(parts)).removeprefix("+")
        return text if not self.offset else f"{text}{self.offset:+d}"

    __repr__ = __str__


Size = int | Dim


@dataclass(frozen=True)
class TensorType:
    """The type of one value, printed ``bf16[T, 4096] @ shard(0)``.

    ``placement`` is empty for a value that every rank holds whole. A matrix whose ``dtype`` is a quantisation scheme
    (``int4g128[4096, 4096]``) has the shape of the numbers it stands for, and is held in bytes.
    """

    dtype: str
    shape: tuple[Size, ...]
    placement: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type of the tensor that holds the value."""
        return torch.uint8 if scheme_of(self.dtype) else DTYPES[self.dtype]

    @property
    def rank(self) -> int:
        return len(self.shape)

    def concrete(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape as integers, with the named dims replaced by their values."""
        return tuple(size if isinstance(size, int) else size.substitute(dims) for size in self.shape)

    @property
    def stored(self) -> TensorType:
        """The type of the tensor that holds the value: itself, or rows of bytes."""
        scheme, depth = scheme_of(self.dtype), self.shape[-1] if self.shape else 0
        if scheme is None or not isinstance(depth, int):
            return self
        return TensorType("u8", (*self.shape[:-1], scheme.row_bytes(depth)), self.placement)

    def nbytes(self, dims: Mapping[str, int]) -> int:
        """The bytes of the tensor that holds the value."""
        return prod(self.stored.concrete(dims)) * self.torch_dtype.itemsize

    def with_shape(self, shape: Iterable[Size]) -> TensorType:
        return TensorType(self.dtype, tuple(shape), self.placement)

    def with_dtype(self, dtype: str) -> TensorType:
        return TensorType(dtype, self.shape, self.placement)

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(map(str, self.shape)) or '()'}]"
        return f"{text} @ {self.placement}" if self.placement else text

    __repr__ = __str__


Type = TensorType | tuple[TensorType, ...]

_AFFINE_TERM = re.compile(r"([+-]?)\s*(?:(\d+)\*)?([A-Za-z_]\w*)|([+-]?\s*\d+)")


def parse_size(text: str) -> Size:
    """Read one size of a shape: ``4096``, ``T``, ``4*T`` or ``T+1``.

    Raises:
        ValueError: the text is no affine expression of named dims.
    """
    terms: dict[str, int] = {}
    offset, at = 0, 0
    source = text.replace(" ", "")
    while at < len(source):
        match = _AFFINE_TERM.match(source, at)
        if match is None or (at and source[at] not in "+-"):
            raise ValueError(f"not a size: {text!r}")
        sign, factor, name, number = match.groups()
        if name:
            terms[name] = terms.get(name, 0) + int(factor or 1) * (-1 if sign == "-" else 1)
        else:
            offset += int(number.replace(" ", ""))
        at = match.end()
    if not source:
        raise ValueError("an empty size")
    return Dim.build(terms, offset)


def parse_placement(text: str, rank: int) -> str:
    """The placement that a type of ``rank`` dims states after ``@``: ``shard(dim)``, ``partial``, or replicated (empty).

    ``shard(d)``: each rank holds its part of dim ``d``; ``partial``: the value is the sum of what the ranks hold;
    ``routed``: a rank holds the rows of the pairs of a token and an expert that go to its experts.
    Raises ``ValueError`` for any other word and for a dim that the type does not have.
    """
    if text in ("replicated", "partial", "routed"):
        return "" if text == "replicated" else text
    match = re.fullmatch(r"shard\((\d+)\)", text)
    if match is None:
        raise ValueError(f"unknown placement {text}; write shard(dim), partial, routed or replicated")
    if int(match[1]) >= rank:
        raise ValueError(f"{text} names no dim of a type of {rank}; dims count from 0")
    return text


def type_text(value: Type) -> str:
    """The text of a type; several results stand in parentheses."""
    if isinstance(value, tuple):
        return f"({', '.join(map(str, value))},)" if len(value) == 1 else f"({', '.join(map(str, value))})"
    return str(value)


def concrete_args(value: object, dims: Mapping[str, int]) -> object:
    """``value`` with every ``Dim`` inside lists and tuples replaced by its size."""
    if isinstance(value, Dim):
        return value.substitute(dims)
    if isinstance(value, (list, tuple)):
        return [concrete_args(item, dims) for item in value]
    return value
