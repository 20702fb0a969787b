"""A kernel that makes numbers of a whole quantised weight, which the library then multiplies: for many rows that is cheap."""

from __future__ import annotations

from ..ir.graph import type_of
from .columns import Plan
from .signature import POINTERS, kernel_text, types_text
from .weights import element, packed_rows, rows_type, scheme
from .writer import Writer

_COLUMNS, _CODES = 16, 512
"""A program's rows of the weight, and its codes of each."""


def numbers_kernel(name: str, layout: Plan) -> tuple[str, str]:
    """The kernel of the region ``name``, and the host's part: its variant, and ``numbers_of(weight)``."""
    how, packed, weight = scheme(layout), packed_rows(layout), layout.weight.name
    width, depth = type_of(layout.weight).shape[0], layout.depth
    assert isinstance(width, int)
    across, along = "[:, None]", "[None, :]"
    writer = Writer({f"{weight}_ptr", "numbers_ptr", "n", "ok", "word", "k"})
    writer.line("n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)")
    writer.line(f"ok = n < {width}")
    writer.line(f"word = tl.program_id(0) * ({packed.words}) + tl.arange(0, {packed.words})")
    packed.print_words(writer, "words", "n", "ok", across, along)
    if how.group:
        packed.print_group_values(writer, "w", "n", "ok", f"word // {how.group // how.places}", across, along)
    else:
        packed.print_column_factors(writer, "w", f"n{across}", f"ok{across}")
    writer.line("if PDL:")
    writer.line("    tl.extra.cuda.gdc_launch_dependents()")
    writer.line("    tl.extra.cuda.gdc_wait()  # others may still read what lies at this address")
    for place in range(how.places):
        packed.print_inputs(writer, place)
        code = packed.codes_at("words", place)
        number = f"({code} - w_zeros) * w_factors" if how.zeros else f"{code} * w_factors"
        where, mask = f"n{across} * {depth} + k{along}", f"ok{across} & (k < {depth}){along}"
        writer.line(f"tl.store(numbers_ptr + {where}, ({number}).to({element(layout)}), mask={mask})")
    kind = rows_type(layout)
    signature = types_text({f"{weight}_ptr": "*u8", "numbers_ptr": POINTERS[kind.dtype]})
    host = f"""\
{name.upper()}_NUMBERS = {{
    "kernel": {name}_numbers_kernel, "signature": {signature},
    "constexprs": {{"BLOCK_N": {_COLUMNS}, "BLOCK_K": {_CODES}, "PDL": False}}, "num_warps": 4, "num_stages": 1,
}}


def numbers_of({weight}):
    \"\"\"The numbers that the codes of a weight stand for.\"\"\"
    numbers = torch.empty({width}, {depth}, dtype={kind.torch_dtype}, device={weight}.device)
    grid = ({-(-depth // _CODES)}, {-(-width // _COLUMNS)})
    run({name.upper()}_NUMBERS, grid, {weight}, numbers)
    return numbers
"""
    constants = "BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr"
    arguments = f"{weight}_ptr, numbers_ptr, {constants}"
    return kernel_text(f"{name}_numbers_kernel", arguments, writer.text()), host
