"""Instructions that Triton does not choose by itself: codes that become numbers two at a time, and four products at once.

Where a kernel does not run on a GPU that has them (``PDL`` says so), the helpers compute the same in the ordinary way.
"""

from __future__ import annotations

from itertools import product

# The type of a number: the bits of the number from which the whole ones follow each other, and how many bits of fraction.
PAIRED = {"tl.bfloat16": (0x4300, 7), "tl.float16": (0x6400, 10)}


def codes_name(kind: str, bits: int, place: int, middle: int) -> str:
    """The name of the helper below."""
    return f"{kind[3:]}_codes_{bits}_{place}" + ("" if middle else "_from_0")


def codes_helpers() -> dict[str, str]:
    """Helpers ``(words, PDL)`` by name: the codes of one place of words of 16 bits, less the middle, in a type of 16 bits.

    A code becomes the last bits of a number whose exponent lets the lowest of them count 1; what that number counts without
    them is taken off, which is exact. Words lie in pairs in registers, so each instruction makes two. The fraction of a
    bf16 has a bit less than a code of 8: that bit says how much is taken off.
    """
    found = {}
    for kind, (bits, middle) in product(PAIRED, ((8, 128), (4, 8), (4, 0))):
        for place in range(16 // bits):
            name = codes_name(kind, bits, place, middle)
            found[name] = _helper(name, kind, bits, place, middle)
    return found


def _helper(name: str, kind: str, bits: int, place: int, middle: int) -> str:
    one, fraction = PAIRED[kind]
    source = "$1" if place == 0 else "moved"
    lines = [".reg .b32 moved, code, off;"]
    if place:
        lines.append(f"shr.b32 moved, $1, {bits * place};")
    low = (1 << min(bits, fraction)) - 1
    lines.append(f"lop3.b32 code, {source}, {_twice(low)}, {_twice(one)}, 0xEA;")
    if bits > fraction:
        # 256 is taken off where the highest bit is not set, else 128, as codes count from the middle.
        lines.append(f"lop3.b32 off, {source}, {_twice(1 << fraction)}, {_twice(one | 0x8000)}, 0xAE;")
    else:
        lines.append(f"mov.b32 off, {_twice(one | middle | 0x8000)};")
    lines.append(f"add.rn.{'bf16x2' if kind == 'tl.bfloat16' else 'f16x2'} $0, code, off;")
    shift = bits * place
    rest = 23 - shift
    number = f"((words.to(tl.int32) & {(1 << bits) - 1 << shift}) | {127 + rest << 23}).to(tl.float32, bitcast=True)"
    text = " ".join(lines)
    return f"""@triton.jit
def {name}(words, PDL: tl.constexpr):
    if PDL:
        codes = tl.inline_asm_elementwise(
            "{{ {text} }}", "=r,r", [words], dtype={kind}, is_pure=True, pack=2
        )
    else:
        codes = ({number} - {float((1 << rest) + middle)}).to({kind})
    return codes
"""


def _twice(bits: int) -> str:
    return f"0x{bits << 16 | bits:08x}"


HELPERS = {
    **codes_helpers(),
    "add_fours": """@triton.jit
def add_fours(words, others, sums, PDL: tl.constexpr):
    # Each word holds four whole numbers of a byte, with their signs.
    if PDL:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [words, others, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for place in tl.static_range(4):
            sums += ((words << (24 - 8 * place)) >> 24) * ((others << (24 - 8 * place)) >> 24)
    return sums
""",
}
"""Helper functions by name, as texts."""
