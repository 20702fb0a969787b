"""Attention over a paged KV cache: split-KV decode and ragged prefill, one emitted file per ``AttentionSpec``.

Online softmax after Milakov and Gimelshein (2018); the keys of one query are split after Flash-Decoding (Dao et al.,
2023).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..ir.tiles import WIDEST_HEAD
from .expressions import HELPERS
from .paged_attention_cache import TYPES, cache_words
from .paged_attention_launch import HOPPER_CHOICE, LAUNCH, ONE_CHOICE
from .paged_attention_template import TEMPLATE
from .signature import COUNTERS, OVERLAPS


@dataclass(frozen=True)
class AttentionSpec:
    """One kind of attention layer; two layers of equal spec share a kernel file.

    ``window`` is for ``sliding`` (a query at p sees keys j with p - window < j <= p) and ``chunked`` (j <= p in the
    same window-sized chunk). ``softcap`` c turns a scaled logit s into c * tanh(s / c). ``sinks`` adds one logit per
    head to the softmax denominator. ``codes`` is the element type of caches that hold codes, with a factor in ``factors``
    for each head of each token. ``block_size`` counts the KV positions of one cache block.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    block_size: int
    scale: float
    kind: Literal["causal", "sliding", "chunked"] = "causal"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    codes: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise ValueError(f"attention kernels exist for {[str(dtype) for dtype in TYPES]}, not {self.dtype}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not divide into {self.num_kv_heads} KV heads")
        if max(self.head_dim, self.v_head_dim) > WIDEST_HEAD:
            raise ValueError(f"head dims {self.head_dim} and {self.v_head_dim}: at most {WIDEST_HEAD} fit a tile")
        if self.codes and (self.head_dim % 2 or self.v_head_dim % 2):
            raise ValueError(f"head dims {self.head_dim} and {self.v_head_dim}: codes are read in pairs")
        if self.kind not in ("causal", "sliding", "chunked") or (self.window is None) != (self.kind == "causal"):
            raise ValueError(f"kind {self.kind!r} with window {self.window}: sliding and chunked have one, causal none")


@dataclass(frozen=True)
class _Tile:
    """Rows (queries times heads) and keys per program, query heads among the rows, and how to compile it."""

    block_m: int
    block_n: int
    heads: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def paged_attention_source(spec: AttentionSpec) -> str:
    """The text of a kernel file with ``launch`` and ``VARIANTS``; equal specs give equal texts."""
    pad_d, pad_dv = (_pad(dim, spec.codes is not None) for dim in (spec.head_dim, spec.v_head_dim))
    shape = {
        "NUM_HEADS": spec.num_heads,
        "NUM_KV_HEADS": spec.num_kv_heads,
        "HEAD_DIM": spec.head_dim,
        "V_HEAD_DIM": spec.v_head_dim,
        "CACHE_BLOCK": spec.block_size,
        "PAD_D": pad_d,
        "PAD_DV": pad_dv,
    }
    decode, prefill, hopper = _decode_tile(spec), _prefill_tile(spec), _hopper_prefill_tile(spec)
    whole = all(width * (spec.codes or spec.dtype).itemsize % 16 == 0 for width in (spec.head_dim, spec.v_head_dim))
    words = {
        "LAUNCH": LAUNCH,
        "PREFETCH_HELPER": HELPERS["prefetch"],
        "OVERLAPS": OVERLAPS,
        "COUNTERS": COUNTERS,
        "PREFETCH": str(whole),
        "CHOICE": (ONE_CHOICE if prefill == hopper else HOPPER_CHOICE).rstrip(),
        "SHAPE": repr(shape).replace("'", '"'),
        "KIND": spec.kind if spec.window is None else f"{spec.kind}, window {spec.window}",
        "FIRST_KEY": _first_key(spec),
        "LOGITS": _logits(spec),
        "DECODE_INIT": _DECODE_INIT[spec.sinks],
        "PREFILL_INIT": _PREFILL_INIT[spec.sinks],
        "ATTEND": _attend(spec),
        "SINKS_ARG": " sinks_ptr," if spec.sinks else "",
        "SINKS_PARAMETER": " sinks," if spec.sinks else "",
        "SINKS_VALUE": ', "sinks_ptr": sinks' if spec.sinks else "",
        "SINKS_TYPE": f', "sinks_ptr": "*{TYPES[spec.dtype]}"' if spec.sinks else "",
        "SINKS_DOC": ", sinks [NUM_HEADS]" if spec.sinks else "",
        "TYPE": f"*{TYPES[spec.dtype]}",
        **cache_words(spec.dtype, spec.codes),
        "DECODE_BLOCK_N": str(decode.block_n),
        # A tile of partials that leaves room for the rows.
        "BLOCK_S": str(max(1, (8192 if decode.block_m <= 32 else 4096) // (decode.block_m * pad_dv))),
        "SPAN": 'table_width * SHAPE["CACHE_BLOCK"]'
        if spec.window is None
        else f'min(table_width * SHAPE["CACHE_BLOCK"], {spec.window})',
    }
    for name, tile in (("DECODE", decode), ("PREFILL", prefill), ("HOPPER", hopper)):
        words[f"{name}_TILE"] = f'"HEADS": {tile.heads}, "BLOCK_M": {tile.block_m}, "BLOCK_N": {tile.block_n}'
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.maxnreg}
        words[f"{name}_OPTIONS"] = ", ".join(f'"{option}": {value}' for option, value in options.items())
    text = TEMPLATE
    for name, value in words.items():
        text = text.replace(f"${name}$", value)
    return text


def _pad(dim: int, codes: bool = False) -> int:
    """tl.dot wants powers of two, 16 at least; codes are halved first."""
    return max(32 if codes else 16, 1 << (dim - 1).bit_length())


def _decode_tile(spec: AttentionSpec) -> _Tile:
    group = spec.num_heads // spec.num_kv_heads
    width = max(_pad(spec.head_dim), _pad(spec.v_head_dim))
    most = 16 if spec.dtype == torch.float32 or width > 128 else 32 if width > 64 else 64
    block_m = min(most, _pad(group))
    heads = _even_share(group, block_m)
    if width > 256:
        return _wide_tile(spec, 16)
    if spec.dtype == torch.float32:
        block_n, num_warps = 32 if width <= 64 else 16, 4 if width <= 128 else 8
        return _Tile(block_m, block_n, heads, num_warps, num_stages=3, maxnreg=255 if spec.codes else 168)
    if width == 128:
        # The fourth resident program that the assembler makes room for is worth a quarter of the bandwidth on an H200.
        return _Tile(block_m, 64, heads, num_warps=4, num_stages=3, maxnreg=None if block_m == 16 else 255)
    return _Tile(block_m, 64 if width < 128 else 32, heads, num_warps=4, num_stages=3, maxnreg=168)


def _wide_tile(spec: AttentionSpec, rows: int) -> _Tile:
    """Heads of more than 256 numbers fill the registers of eight warps; in fp32 some spill however many warps there are."""
    plain = spec.dtype == torch.float32 and spec.codes is None
    group = spec.num_heads // spec.num_kv_heads
    return _Tile(rows, 16, _even_share(group, rows), num_warps=8, num_stages=2, maxnreg=None if plain else 255)


def _prefill_tile(spec: AttentionSpec) -> _Tile:
    group = spec.num_heads // spec.num_kv_heads
    width = max(_pad(spec.head_dim), _pad(spec.v_head_dim))
    if width > 256:
        return _wide_tile(spec, 16 if spec.dtype == torch.float32 else 32)
    if spec.dtype == torch.float32:
        block_m = 32 if width <= 64 else 16
        return _Tile(block_m, 16, _even_share(group, block_m), num_warps=8, num_stages=2, maxnreg=255)
    if width <= 64:
        # Narrow heads need few registers; left alone, some assemblers spill for the sake of a third resident program.
        maxnreg = 128 if width <= 32 and spec.codes is None else None
        return _Tile(128, 64, _even_share(group, 128), num_warps=8, num_stages=3, maxnreg=maxnreg)
    if width <= 128:
        return _Tile(64, 32, _even_share(group, 64), num_warps=4, num_stages=3, maxnreg=255)
    rows = 64 if spec.codes is None else 32  # codes take registers on their way to the products
    return _Tile(rows, 32, _even_share(group, rows), num_warps=8, num_stages=2)


def _hopper_prefill_tile(spec: AttentionSpec) -> _Tile:
    group, width = spec.num_heads // spec.num_kv_heads, max(_pad(spec.head_dim), _pad(spec.v_head_dim))
    if spec.dtype == torch.float32 or width <= 64 or width > 256 or (width > 128 and spec.codes):
        return _prefill_tile(spec)
    if width <= 128:
        return _Tile(64, 64, _even_share(group, 64), num_warps=4, num_stages=3)
    return _Tile(128, 32, _even_share(group, 128), num_warps=8, num_stages=2)


def _even_share(group: int, block_m: int) -> int:
    """Heads per program: the whole group, or equal shares of a group of more than block_m heads."""
    return math.ceil(group / math.ceil(group / block_m))


def _attend(spec: AttentionSpec) -> str:
    """The ranges of keys of a tile of queries: whole tiles that all rows see need no mask."""
    call = """\
    $ACC$, top, total = attend(
        $Q$, past + query, $ACC$, top, total, kv_head, {begin}, {end}, table_ptr, k_ptr, v_ptr,$FACTORS_ARG$
        NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, CACHE_BLOCK, BLOCK_N, PAD_D, PAD_DV, {masked}, {whole},$PACKED_ARG$
    )"""
    lines = ["    # The tiles of keys that all of these queries see whole.", "    first_seen = begin"]
    if spec.kind != "causal":
        lines.append("    first_seen += tl.cdiv(first_key(end - 1) - begin, BLOCK_N) * BLOCK_N")
    lines.append("    all_seen = tl.maximum(past + first_query + 1 - first_seen, 0) // BLOCK_N * BLOCK_N + first_seen")
    if spec.kind != "causal":
        lines.append(call.format(begin="begin", end="tl.minimum(first_seen, end)", masked=True, whole=False))
    lines.append(call.format(begin="first_seen", end="all_seen", masked=False, whole=True))
    lines.append(call.format(begin="all_seen", end="end", masked=True, whole=False))
    return "\n".join(lines)


def _first_key(spec: AttentionSpec) -> str:
    if spec.kind == "sliding":
        return f"tl.maximum(position - {spec.window} + 1, 0)"
    if spec.kind == "chunked":
        return f"position // {spec.window} * {spec.window}"
    return "position * 0"


def _logits(spec: AttentionSpec) -> str:
    log2_e = math.log2(math.e)
    if spec.softcap is None:
        return f"    return products * {spec.scale * log2_e!r}  # {spec.scale!r} * log2(e)"
    lines = [
        f"# {spec.softcap!r} * tanh(x): the identity with exp2 for large x, its Taylor series where that would cancel",
        f"x = products * {spec.scale / spec.softcap!r}  # {spec.scale!r} / {spec.softcap!r}",
        "square = x * x",
        "series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))",
        f"tanh = 1 - 2 / (1 + tl.exp2(x * {2 * log2_e!r}))  # 2 * log2(e)",
        f"return tl.where(square < 0.01, series, tanh) * {spec.softcap * log2_e!r}  # {spec.softcap!r} * log2(e)",
    ]
    return "\n".join("    " + line for line in lines)


_DECODE_INIT = {
    False: """\
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)""",
    True: """\
    # The sink is a logit seen before any key, its value zero. Only the first split counts it.
    sink = tl.load(sinks_ptr + head, mask=row_live, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
    top = tl.where(split == 0, sink, -float("inf"))
    total = tl.where(split == 0, 1.0, 0.0) + tl.zeros((BLOCK_M,), tl.float32)""",
}
_PREFILL_INIT = {
    False: _DECODE_INIT[False],
    True: """\
    # The sink is a logit seen before any key, its value zero.
    top = tl.load(sinks_ptr + head, mask=row_live, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
    total = tl.full((BLOCK_M,), 1.0, tl.float32)""",
}
