"""The kernel that chooses the most likely token of each row of logits."""

from __future__ import annotations

from .signature import COUNTERS, file_text

_KERNEL = """\
@triton.jit
def greedy_kernel(
    logits_ptr, tokens_ptr, finite_ptr, top_ptr, place_ptr, arrived_ptr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    col = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(logits_ptr + row * WIDTH + col, mask=col < WIDTH, other=-float("inf")).to(tl.float32)
    # The lowest id among equals. What a comparison with NaN gives does not matter: such a row counts as not finite.
    top, place = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    strange = tl.sum(((tl.abs(x) < float("inf")) | (col >= WIDTH)).to(tl.int32), 0) < BLOCK
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
    _, best = tl.max(tops, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens_ptr + row, tl.sum(tl.where(parts == best, places, 0), 0).to(tl.int64))
    tl.store(finite_ptr + row, tl.min(places, 0) >= 0)
"""

_LAUNCH = '''\
def variant(width, kind="bf16", block=2048):
    parts = triton.cdiv(width, block)
    pointers = {"logits_ptr": f"*{kind}", "tokens_ptr": "*i64", "finite_ptr": "*i1", "top_ptr": "*fp32", "place_ptr": "*i32"}
    padded = triton.next_power_of_2(parts)
    return {
        "kernel": greedy_kernel, "signature": {**pointers, "arrived_ptr": "*i32"},
        "constexprs": {"WIDTH": width, "PARTS": parts, "PADDED": padded, "BLOCK": block, "PDL": False},
        "num_warps": 4, "num_stages": 1,
    }


VARIANTS = [variant(32000), variant(128256), variant(50257, "fp16"), variant(300, "fp32")]


def launch(logits, tokens, finite):
    """The most likely token of each row of logits [R, V], and whether all of the row is finite: i64[R], bool[R]."""
    logits, (rows, width) = logits.contiguous(), logits.shape
    chosen = variant(width)
    parts, device = chosen["constexprs"]["PARTS"], logits.device
    top = torch.empty(rows * parts, dtype=torch.float32, device=device)
    place = torch.empty(rows * parts, dtype=torch.int32, device=device)
    arrived = counters(device, triton.next_power_of_2(rows))
    run(chosen, (parts, rows), logits, tokens, finite, top, place, arrived)
'''


def greedy_source() -> str:
    """The text of a kernel file whose ``launch(logits, tokens, finite)`` fills ``tokens i64[R]`` and ``finite bool[R]``."""
    return file_text([_KERNEL], COUNTERS, _LAUNCH)
