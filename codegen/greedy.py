"""The kernel that chooses the most likely token of each row of logits, of which each of several ranks may have a part."""

from __future__ import annotations

from .exchange import MEETING, UNSPECIALISED
from .signature import COUNTERS, file_text

_KERNEL = """\
@triton.jit(do_not_specialize=[$UNSPECIALISED$])
def greedy_kernel(
    logits_ptr, tokens_ptr, finite_ptr, top_ptr, place_ptr, arrived_ptr,$MEETING$
    WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, VOCAB: tl.constexpr,
    PDL: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    col = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(logits_ptr + row * WIDTH + col, mask=col < WIDTH, other=-float("inf")).to(tl.float32)
$OWN$    # The lowest id among equals. What a comparison with NaN gives does not matter: such a row counts as not finite.
    top, place = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    strange = tl.sum(((tl.abs(x) < float("inf")) | (col >= count)).to(tl.int32), 0) < BLOCK
    tl.store(top_ptr + row * PARTS + part, top)
    tl.store(place_ptr + row * PARTS + part, tl.where(strange, -1, part * BLOCK + place))
    # The thread that wrote announces it. The last program of a row looks at what all of them found.
    before = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu")
    if before + 1 < PARTS:
        return
    tl.debug_barrier()
    tl.store(arrived_ptr + row, 0)  # as the next launch expects it
    parts = tl.arange(0, PADDED)
    tops = tl.load(top_ptr + row * PARTS + parts, mask=parts < PARTS, other=-float("inf"), cache_modifier=".cg")
    places = tl.load(place_ptr + row * PARTS + parts, mask=parts < PARTS, other=0, cache_modifier=".cg")
    top, best = tl.max(tops, 0, return_indices=True, return_indices_tie_break_left=True)
    token, least = tl.sum(tl.where(parts == best, places, 0), 0), tl.min(places, 0)
$MEET$    tl.store(tokens_ptr + row, tl.maximum(token, 0).to(tl.int64))
    tl.store(finite_ptr + row, least >= 0)
"""

_OWN = """\
    # Columns that were added so that ranks could divide them do not count.
    count = tl.minimum(WIDTH, VOCAB - rank * WIDTH)
    x = tl.where(col < count, x, -float("inf"))
"""

# Two words a row go to all ranks: the largest logit, and its id, which is negative if something is no number.
_MEET = """\
    step = tl.load(steps_ptr, volatile=True)
    tag = step * meetings + number
    turn = ((step & 1) * 2 + (number & 1)).to(tl.int64)
$ADDRESSES$
    pair = tl.arange(0, 2)[None, :]
    own = tl.where(least < 0, -1, rank * WIDTH + token).to(tl.float32, bitcast=True)
    line = row + tl.zeros((1, 1), tl.int64)
    send_to_ranks(
        tl.where(pair == 0, top, own), line, line >= 0, pair, tag, turn, ($NAMES$,), rank, stride, 2, tl.float32, 2
    )
    source = tl.arange(0, $PADDED$)
    wanted = (source[:, None] < $RANKS$) & (pair >= 0)
    pointers = mine_ptr + (turn * $RANKS$ + source[:, None]) * stride + row * 2 + pair
    found = tl.load(pointers, mask=wanted, other=0, volatile=True)
    while tl.max((wanted & ((found >> 32).to(tl.int32) != tag)).to(tl.int32)) > 0:
        found = tl.load(pointers, mask=wanted, other=0, volatile=True)
    bits, ids = tl.split(found.to(tl.int32))
    tops = tl.where(source < $RANKS$, bits.to(tl.float32, bitcast=True), -float("inf"))
    token, least = tl.min(tl.where(tops == tl.max(tops, 0), ids, VOCAB - 1), 0), tl.min(ids, 0)
"""

_LAUNCH = """\
def variant(width, vocab, kind="bf16", block=2048):
    parts = triton.cdiv(width, block)
    pointers = {"logits_ptr": f"*{kind}", "tokens_ptr": "*i64", "finite_ptr": "*i1", "top_ptr": "*fp32", "place_ptr": "*i32"}
    constants = {"WIDTH": width, "PARTS": parts, "PADDED": triton.next_power_of_2(parts), "BLOCK": block, "VOCAB": vocab}
    return {
        "kernel": greedy_kernel, "signature": {**pointers, "arrived_ptr": "*i32", **$TYPES$},
        "constexprs": {**constants, "PDL": False}, "num_warps": 4, "num_stages": 1,
    }


def choose(logits, tokens, finite, vocab, **meeting):
    logits, (rows, width) = logits.contiguous(), logits.shape
    chosen, device = variant(width, vocab), logits.device
    parts = chosen["constexprs"]["PARTS"]
    top = torch.empty(rows * parts, dtype=torch.float32, device=device)
    place = torch.empty(rows * parts, dtype=torch.int32, device=device)
    arrived = counters(device, triton.next_power_of_2(rows))
    run(chosen, (parts, rows), logits, tokens, finite, top, place, arrived, **meeting)
"""

_ALONE = '''\
VARIANTS = [variant(width, width, kind) for width, kind in ((32000, "bf16"), (128256, "bf16"), (50257, "fp16"), (300, "fp32"))]


def launch(logits, tokens, finite):
    """The most likely token of each row of logits [R, V], and whether all of the row is finite: i64[R], bool[R]."""
    choose(logits, tokens, finite, logits.shape[1])
'''

_TOGETHER = '''\
VARIANTS = [variant(16000, 32000), variant(12576, 25143, "fp16"), variant(300, 597, "fp32")]


def launch(logits, tokens, finite, vocab, ranks):
    """The most likely of vocab tokens for each row, of whose logits each rank has a part, [R, W], and whether all of the row
    is finite: i64[R], bool[R]. False, and nothing done, if the rows are too many."""
    if not ranks.holds(2 * len(logits)):
        return False
    if len(logits):
        ranks.next()
        choose(logits, tokens, finite, vocab, **ranks.meeting)
    return True
'''


def greedy_source(ranks: int = 1) -> str:
    """The text of a kernel file whose ``launch(logits, tokens, finite)`` fills ``tokens i64[R]`` and ``finite bool[R]``.

    For several ``ranks`` it is ``launch(logits, tokens, finite, vocab, exchange)``, and they choose together.
    """
    words = {"OWN": "    count = WIDTH\n", "MEET": "", "UNSPECIALISED": "", "MEETING": "", "TYPES": "{}"}
    if ranks > 1:
        words = {
            "OWN": _OWN,
            "MEET": _MEET,
            "UNSPECIALISED": ", ".join(f'"{name}"' for name in UNSPECIALISED),
            "MEETING": f" {', '.join(MEETING)},",
            "TYPES": str(MEETING),
            "ADDRESSES": "\n".join(f"    at_{rank} = tl.load(ranks_ptr + {rank})" for rank in range(ranks)),
            "NAMES": ", ".join(f"at_{rank}" for rank in range(ranks)),
            "RANKS": str(ranks),
            "PADDED": str(1 << (ranks - 1).bit_length()),
        }
    kernel, launch = _KERNEL, _LAUNCH
    for name, value in words.items():
        kernel, launch = kernel.replace(f"${name}$", value), launch.replace(f"${name}$", value)
    return file_text([kernel], COUNTERS, launch, _TOGETHER if ranks > 1 else _ALONE)
