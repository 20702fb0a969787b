"""What differs in an emitted paged-attention file between caches of numbers and caches of codes with factors."""

import torch

from .paged_attention_loop import CODES, NUMBERS

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Pointers to codes, and a power of two near the largest of them.
_CODES = {torch.int8: ("*i8", 128.0), torch.float8_e4m3fn: ("*fp8e4nv", 512.0)}

_LOAD_Q = """\
    d = tl.arange(0, PAD_D)
    q_mask = row_live[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + row[:, None] * HEAD_DIM + d[None, :], mask=q_mask, other=0.0)
    acc = tl.zeros((BLOCK_M, PAD_DV), tl.float32)"""
_LOAD_PAIRS = """\
    d = tl.arange(0, PAD_D // 2) * 2
    q_mask = row_live[:, None] & (d < HEAD_DIM)[None, :]
    q_even = tl.load(q_ptr + row[:, None] * HEAD_DIM + d[None, :], mask=q_mask, other=0.0).to(tl.$TARGET$)
    q_odd = tl.load(q_ptr + row[:, None] * HEAD_DIM + d[None, :] + 1, mask=q_mask, other=0.0).to(tl.$TARGET$)
    even = tl.zeros((BLOCK_M, PAD_DV // 2), tl.float32)
    odd = tl.zeros((BLOCK_M, PAD_DV // 2), tl.float32)"""
_PACKED_RUN = """\
    # The interpreter knows no instructions.
    constants = {**constants, "PACKED": arguments["q_ptr"].device.type == "cuda"}
"""
# Two pairs at a time become the four numbers; $0 and $1 take the first and the second ones, $2 are the pairs.
_INSTRUCTIONS = {
    # A byte b behind 0x64 is the narrow float 1024 + b.
    torch.int8: """\
            { .reg .b32 codes, middle;
            xor.b32 codes, $2, 0x80808080;
            mov.b32 middle, 0x64806480;
            prmt.b32 $0, codes, 0x64646464, 0x4240;
            prmt.b32 $1, codes, 0x64646464, 0x4341;
            sub.rn.f16x2 $0, $0, middle;
            sub.rn.f16x2 $1, $1, middle; }""",
    torch.float8_e4m3fn: """\
            { .reg .b32 codes; .reg .b16 first, second;
            prmt.b32 codes, $2, $2, 0x3120;
            mov.b32 {first, second}, codes;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second; }""",
}


def _halves(codes: torch.dtype, target: str) -> str:
    """The body of ``halves``."""
    cast = ".to(tl.float8e4nv, bitcast=True)" if codes == torch.float8_e4m3fn else ""
    plain = [
        f"first = pairs.to(tl.int8){cast}.to(tl.{target})",
        f"second = (pairs >> 8).to(tl.int8){cast}.to(tl.{target})",
    ]
    if target != "float16":
        return "\n".join(f"    {line}" for line in [*plain, "return first, second"])
    return "\n".join(
        [
            "    if PACKED:",
            "        first, second = tl.inline_asm_elementwise(",
            f'            """\n{_INSTRUCTIONS[codes]}',
            '            """,',
            '            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,',
            "        )",
            "    else:",
            *(f"        {line}" for line in plain),
            "    return first, second",
        ]
    )


def cache_words(dtype: torch.dtype, codes: torch.dtype | None) -> dict[str, str]:
    """The words that differ between caches of numbers and of codes."""
    if codes is None:
        names = "FACTORS_ARG JOIN LIFT_END FACTORS_TYPE FACTORS_PARAMETER FACTORS_DOC FACTORS_VALUE"
        packed = "PACKED_ARG PACKED_PARAMETER PACKED_VALUE PACKED_RUN"
        return {
            **dict.fromkeys(f"{names} {packed}".split(), ""),
            "ATTEND_FUNCTION": NUMBERS.rstrip(),
            "Q": "q",
            "ACC": "acc",
            "LOAD_Q": _LOAD_Q,
            "CACHE_TYPE": f"*{TYPES[dtype]}",
        }
    target = "float32" if dtype == torch.float32 else "float16"
    pointer, lift = _CODES[codes]
    return {
        "ATTEND_FUNCTION": CODES.rstrip(),
        "HALVES": _halves(codes, target),
        "FACTORS_ARG": " k_factors_ptr, v_factors_ptr,",
        "LIFT": str(lift),
        "LIFT_END": f" * {lift}",
        "Q": "q_even, q_odd",
        "ACC": "even, odd",
        "LOAD_Q": _LOAD_PAIRS.replace("$TARGET$", target),
        "JOIN": "    acc = tl.interleave(even, odd)\n",
        "CACHE_TYPE": pointer,
        "FACTORS_TYPE": ', "k_factors_ptr": "*bf16", "v_factors_ptr": "*bf16"',
        "FACTORS_PARAMETER": " k_factors, v_factors,",
        "FACTORS_DOC": ", k_factors and v_factors bf16 [slots, NUM_KV_HEADS, 1]",
        "FACTORS_VALUE": ', "k_factors_ptr": k_factors, "v_factors_ptr": v_factors',
        "PACKED_ARG": " PACKED,",
        "PACKED_PARAMETER": " PACKED: tl.constexpr,",
        "PACKED_VALUE": '"PACKED": True, ',
        "PACKED_RUN": _PACKED_RUN,
    }
