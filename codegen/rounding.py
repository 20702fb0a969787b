"""How numbers become codes of a byte, as functions that kernels call.

On a GPU that begins kernels early (``PDL`` says so) a cast to E4M3 rounds to nearest; the interpreter's cuts off, so there
the rounding is written out.
"""

from __future__ import annotations

HELPERS = {
    "quotient": """@triton.jit
def quotient(x, factor, LARGEST: tl.constexpr):
    # The quotient as a division rounds it (Markstein 1990), with one division for a whole row and none for its numbers.
    whole = factor + tl.zeros_like(x)
    # Rows of less than 1e-35 become zeros: the inverse of their factor may not be finite.
    inverse = tl.where(factor > 1e-37, tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor), 0.0) + tl.zeros_like(x)
    near = x * inverse
    scaled = tl.fma(tl.fma(-near, whole, x), inverse, near)
    return tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
""",
    "code": """@triton.jit
def code(x, factor, LARGEST: tl.constexpr, WHOLE: tl.constexpr):
    scaled = quotient(x, factor, LARGEST)
    if WHOLE:
        # So large a number leaves no place for fractions: adding it rounds to the nearest, ties to even.
        return (scaled + 12582912.0) - 12582912.0
    # To three binary places, or (small ones) to whole 512ths. A cast does the same, but not in the interpreter.
    bits = scaled.to(tl.int32, bitcast=True)
    coarse = ((bits + 524287 + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(scaled) < 0.015625, (scaled + 24576.0) - 24576.0, coarse)
""",
    "code_factor": """@triton.jit
def code_factor(x, LARGEST: tl.constexpr, WHOLE: tl.constexpr, TRIES: tl.constexpr):
    most = tl.max(tl.abs(x), 1)[:, None]
    smallest = tl.where(most > 0, tl.div_rn(most, tl.full(most.shape, LARGEST, tl.float32)), 1.0)
    best, least = smallest, tl.full(most.shape, float("inf"), tl.float32)
    for number in tl.static_range(TRIES):
        factor = smallest * (1 + number / TRIES)
        # To bf16, ties to even, bit by bit: the interpreter's cast cuts off.
        bits = factor.to(tl.int32, bitcast=True)
        factor = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        difference = code(x, factor, LARGEST, WHOLE) * factor - x
        distance = tl.sum(difference * difference, 1)[:, None]
        best = tl.where(distance < least, factor, best)
        least = tl.minimum(distance, least)
    return best
""",
    "code_byte": """@triton.jit
def code_byte(x, factor, LARGEST: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr):
    if WHOLE:
        # Of so large a sum the last byte is the nearest whole number, in two's complement.
        codes = (quotient(x, factor, LARGEST) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif PDL:
        codes = quotient(x, factor, LARGEST).to(tl.float8e4nv)
    else:
        codes = code(x, factor, LARGEST, WHOLE).to(tl.float8e4nv)
    return codes.to(tl.uint8, bitcast=True)
""",
}
