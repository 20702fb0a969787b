"""The kernel that puts the columns which ranks have next to each other, in the memory that all of them write to."""

from __future__ import annotations

from .exchange import MEETING, UNSPECIALISED
from .signature import file_text

_KERNEL = """\
@triton.jit(do_not_specialize=[$UNSPECIALISED$])
def gather_kernel(
    x_ptr, whole_ptr, $MEETING$,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    line = tl.program_id(1).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    col = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    step = tl.load(steps_ptr, volatile=True)
    tag = step * meetings + number
    turn = ((step & 1) * 2 + (number & 1)).to(tl.int64)
$ADDRESSES$
    x = tl.load(x_ptr + line * WIDTH + col, mask=col < WIDTH, other=0).to(tl.float32)
    send_to_ranks(x, line, line >= 0, col, tag, turn, ($NAMES$,), rank, stride, slot, KIND, WIDTH)
    PER: tl.constexpr = 1 if KIND == tl.float32 else 2
    word = tl.program_id(0) * (BLOCK // PER) + tl.arange(0, BLOCK // PER)[None, :]
    wanted = word * PER < WIDTH
    for source in tl.static_range(RANKS):
        pointers = mine_ptr + (turn * RANKS + source) * stride + line * slot + word
        found = tl.load(pointers, mask=wanted, other=0, volatile=True)
        while tl.max((wanted & ((found >> 32).to(tl.int32) != tag)).to(tl.int32)) > 0:
            found = tl.load(pointers, mask=wanted, other=0, volatile=True)
        part = unpacked(found.to(tl.int32), KIND)
        tl.store(whole_ptr + line * (RANKS * WIDTH) + source * WIDTH + col, part, mask=col < WIDTH)
"""

_LAUNCH = """\
KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def variant(width, dtype, block=2048):
    types = {"x_ptr": POINTERS[dtype], "whole_ptr": POINTERS[dtype], **$TYPES$}
    constants = {"WIDTH": width, "RANKS": $RANKS$, "KIND": KINDS[dtype], "BLOCK": block, "PDL": False}
    return {"kernel": gather_kernel, "signature": types, "constexprs": constants, "num_warps": 8, "num_stages": 1}


VARIANTS = [variant(16000, torch.bfloat16), variant(301, torch.float32)]


def launch(x, whole, ranks):
    \"\"\"Fill whole [R, ranks * W] with the rows x [R, W] of all ranks. False, and nothing done, if they are too many.\"\"\"
    x, (rows, width) = x.contiguous(), x.shape
    words = width if x.dtype == torch.float32 else triton.cdiv(width, 2)
    if x.dtype not in KINDS or not ranks.holds(rows * words):
        return False
    if rows:
        ranks.next()
        chosen = variant(width, x.dtype)
        grid = (triton.cdiv(width, chosen["constexprs"]["BLOCK"]), rows)
        run(chosen, grid, x, whole, **{**ranks.meeting, "slot": words})
    return True
"""


def gather_source(ranks: int) -> str:
    """The text of a kernel file whose ``launch(x, whole, ranks)`` gathers columns by an ``Exchange`` of so many ranks."""
    words = {
        "MEETING": ", ".join(MEETING),
        "UNSPECIALISED": ", ".join(f'"{name}"' for name in UNSPECIALISED),
        "ADDRESSES": "\n".join(f"    at_{rank} = tl.load(ranks_ptr + {rank})" for rank in range(ranks)),
        "NAMES": ", ".join(f"at_{rank}" for rank in range(ranks)),
        "TYPES": str(MEETING),
        "RANKS": str(ranks),
    }
    kernel, launch = _KERNEL, _LAUNCH
    for name, value in words.items():
        kernel, launch = kernel.replace(f"${name}$", value), launch.replace(f"${name}$", value)
    return file_text([kernel], launch)
