"""The text of an emitted grouped linear file; ``grouped_linear`` fills in the words between dollar signs."""

TEMPLATE = '''\
import functools

import torch
import triton
import triton.language as tl

# Every kernel takes the layer's numbers as constexprs, so the compiler knows all strides.
SHAPE = $SHAPE$


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel begin, and wait for the one in front."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def experts_of(ids_ptr, pair, num_pairs, NUM_EXPERTS: tl.constexpr):
    """The expert of each pair: NUM_EXPERTS if it goes to none of them, and one more past the last pair."""
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=0)
    known = tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS)
    return tl.where(pair < num_pairs, known, NUM_EXPERTS + 1)


@triton.jit(do_not_specialize=["num_pairs"])
def sort_by_expert(
    ids_ptr, order_ptr, starts_ptr, num_pairs, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program per expert, and one for the pairs that go to none: where they begin in the sorted order, and which they
    are, in their old order.

    Each program reads all ids for itself, so none waits for another and the result does not depend on timing.
    """
    begin(PDL)
    expert = tl.program_id(0)
    place = 0
    for base in range(0, num_pairs, BLOCK):
        pair = base + tl.arange(0, BLOCK)
        place += tl.sum((experts_of(ids_ptr, pair, num_pairs, NUM_EXPERTS) < expert).to(tl.int32), 0)
    tl.store(starts_ptr + expert, place)
    if expert == NUM_EXPERTS:
        tl.store(starts_ptr + NUM_EXPERTS + 1, num_pairs)
    for base in range(0, num_pairs, BLOCK):
        pair = base + tl.arange(0, BLOCK)
        mine = (experts_of(ids_ptr, pair, num_pairs, NUM_EXPERTS) == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine, 0) - 1, pair, mask=mine != 0)
        place += tl.sum(mine, 0)


@triton.jit
def write_zeros(out_ptr, pair, live, n, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What pairs that go to no expert get."""
    zeros = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
    places = out_ptr + (pair.to(tl.int64) * OUT)[:, None] + n[None, :]
    tl.store(places, zeros, mask=live[:, None] & (n < OUT)[None, :])


@triton.jit
def write_products(
    x_ptr, weight_ptr,$BIAS_ARG$ out_ptr, expert, pair, live, n, TOP_K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """BLOCK_M pairs times the output features n of one expert; only live ones are written."""
    x_row = ($X_ROW$).to(tl.int64) * $X_STRIDE$
    expert_ptr = weight_ptr + expert.to(tl.int64) * ($W_EXPERT$)
    $ACC$ = tl.zeros((BLOCK_M, BLOCK_N), $SUMS$)
$LOOP$$BIAS_ADD$
    out_row = pair.to(tl.int64) * OUT
    mask = live[:, None] & (n < OUT)[None, :]
    tl.store(out_ptr + out_row[:, None] + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pair_linear(
    x_ptr, weight_ptr, ids_ptr,$BIAS_ARG$ out_ptr,
    NUM_EXPERTS: tl.constexpr, PAD_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):
    """One pair times BLOCK_N output features of its expert. Nothing is sorted; all rows of the tile are the same."""
    pair = tl.program_id(0) + tl.zeros((BLOCK_M,), tl.int32)
    live = tl.arange(0, BLOCK_M) == 0
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin(PDL)
    expert = tl.load(ids_ptr + tl.program_id(0))
    if (expert < 0) | (expert >= NUM_EXPERTS):
        write_zeros(out_ptr, pair, live, n, OUT, BLOCK_M, BLOCK_N)
        return
    write_products(
        x_ptr, weight_ptr,$BIAS_ARG$ out_ptr, expert, pair, live, n, TOP_K, IN, OUT, BLOCK_M, BLOCK_N, BLOCK_K
    )


@triton.jit
def write_expert(
    x_ptr, weight_ptr,$BIAS_ARG$ out_ptr, expert, pair, live, n,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The products of pairs that go to an expert, or zeros if it is none."""
    if expert == NUM_EXPERTS:
        write_zeros(out_ptr, pair, live, n, OUT, BLOCK_M, BLOCK_N)
    else:
        write_products(
            x_ptr, weight_ptr,$BIAS_ARG$ out_ptr, expert, pair, live, n, TOP_K, IN, OUT, BLOCK_M, BLOCK_N, BLOCK_K
        )


@triton.jit(do_not_specialize=["num_pairs"])
def seek_linear(
    x_ptr, weight_ptr, ids_ptr,$BIAS_ARG$ out_ptr, num_pairs,
    NUM_EXPERTS: tl.constexpr, PAD_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr,
):
    """The pairs of one expert times BLOCK_N of its output features, BLOCK_M at a time. Of up to PAIRS pairs each program
    finds its own, sooner than another kernel would have sorted them."""
    begin(PDL)
    expert = tl.program_id(0)
    every = tl.arange(0, PAIRS)
    mine = experts_of(ids_ptr, every, num_pairs, NUM_EXPERTS) == expert
    count = tl.sum(mine.to(tl.int32), 0)
    rank = tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1, -1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    for first in range(0, count, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        # A row past the expert's pairs is that of pair 0 and is not stored.
        pair = tl.sum(tl.where(rank[None, :] == row[:, None], every[None, :], 0), 1)
        write_expert(
            x_ptr, weight_ptr,$BIAS_ARG$ out_ptr, expert, pair, row < count, n,
            NUM_EXPERTS, TOP_K, IN, OUT, BLOCK_M, BLOCK_N, BLOCK_K,
        )


@triton.jit
def expert_linear(
    x_ptr, weight_ptr, order_ptr, starts_ptr,$BIAS_ARG$ out_ptr,
    NUM_EXPERTS: tl.constexpr, PAD_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):
    """The same for pairs that are sorted: most experts have no more than BLOCK_M, and few read their weight again. Those of
    none may be most of all: all programs past the last expert take turns with them."""
    begin(PDL)
    expert = tl.minimum(tl.program_id(0), NUM_EXPERTS)
    start, end = tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1)
    turns = tl.where(expert == NUM_EXPERTS, tl.num_programs(0) - NUM_EXPERTS, 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    for first in range(start + (tl.program_id(0) - expert) * BLOCK_M, end, turns * BLOCK_M):
        rank = first + tl.arange(0, BLOCK_M)
        live = rank < end
        pair = tl.load(order_ptr + rank, mask=live, other=0)
        write_expert(
            x_ptr, weight_ptr,$BIAS_ARG$ out_ptr, expert, pair, live, n,
            NUM_EXPERTS, TOP_K, IN, OUT, BLOCK_M, BLOCK_N, BLOCK_K,
        )


@triton.jit
def grouped_linear(
    x_ptr, weight_ptr, order_ptr, starts_ptr,$BIAS_ARG$ out_ptr,
    NUM_EXPERTS: tl.constexpr, PAD_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):
    """BLOCK_M pairs of one expert times BLOCK_N of its output features. Those of no expert come last, and are zeros."""
    # Only the device knows how many pairs each expert has: count blocks expert by expert up to this program's.
    begin(PDL)
    block = tl.program_id(0)
    experts = tl.arange(0, PAD_EXPERTS)
    starts = tl.load(starts_ptr + experts, mask=experts <= NUM_EXPERTS, other=0)
    ends = tl.load(starts_ptr + experts + 1, mask=experts <= NUM_EXPERTS, other=0)
    block_ends = tl.cumsum(tl.cdiv(ends - starts, BLOCK_M), 0)
    expert = tl.sum((block_ends <= block).to(tl.int32), 0)
    # The grid is an upper bound: the programs past the last block have nothing to do.
    if expert > NUM_EXPERTS:
        return
    earlier_blocks = tl.max(tl.where(block_ends <= block, block_ends, 0), 0)
    rank = tl.load(starts_ptr + expert) + (block - earlier_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rank < tl.load(starts_ptr + expert + 1)
    # A row past the expert's pairs reads pair 0 and is not stored: no mask in the loop.
    pair = tl.load(order_ptr + rank, mask=live, other=0)

    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert == NUM_EXPERTS:
        write_zeros(out_ptr, pair, live, n, OUT, BLOCK_M, BLOCK_N)
        return
    write_products(
        x_ptr, weight_ptr,$BIAS_ARG$ out_ptr, expert, pair, live, n, TOP_K, IN, OUT, BLOCK_M, BLOCK_N, BLOCK_K
    )


def sort(block, num_warps):
    """The variant of sort_by_expert with these tiles."""
    return {
        "kernel": sort_by_expert,
        "signature": {"ids_ptr": "*i64", "order_ptr": "*i32", "starts_ptr": "*i32", "num_pairs": "i32"},
        "constexprs": {"NUM_EXPERTS": SHAPE["NUM_EXPERTS"], "BLOCK": block, "PDL": False},
        "num_warps": num_warps, "num_stages": 1, "maxnreg": 128,
    }


SORTED = {"order_ptr": "*i32", "starts_ptr": "*i32"}


def tile(
    block_m, block_n, block_k, num_warps, num_stages, maxnreg, capabilities=$CAPABILITIES$, kernel=grouped_linear,
    pairs=SORTED, more={},
):
    """The variant of a kernel with these tiles: ``pairs`` and ``more`` are the types and constants of its own."""
    numbers = {"num_pairs": "i32"} if more else {}
    return {
        "kernel": kernel,
        "signature": {
            "x_ptr": "$X_TYPE$", "weight_ptr": "$W_TYPE$", **pairs$BIAS_TYPE$, "out_ptr": "$TYPE$", **numbers,
        },
        "constexprs": {**SHAPE, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, **more, "PDL": False},
        "num_warps": num_warps, "num_stages": num_stages, "capabilities": capabilities, "maxnreg": maxnreg,
    }


SORT_FEW, SORT_MANY = sort(1024, num_warps=4), sort(8192, num_warps=16)
# For pairs that hardly ever go to the same expert.
APART = tile($APART$, kernel=pair_linear, pairs={"ids_ptr": "*i64"})
# For so few pairs that programs find those of their expert.
SOUGHT = tile($FEW$, kernel=seek_linear, pairs={"ids_ptr": "*i64"}, more={"PAIRS": 64})
# For few, some and many pairs per expert.
FEW = tile($FEW$, kernel=expert_linear)
SOME = tile($SOME$)
MANY = tile($MANY$)
$CHOICE$


$OVERLAPS$

def run(variant, grid, *tensors):
    """Launch what VARIANTS describes."""
    constants = dict(variant["constexprs"])
    options = {name: variant[name] for name in ("num_warps", "num_stages", "maxnreg")}
    if overlaps(tensors[0].device):
        constants["PDL"] = options["launch_pdl"] = True
    variant["kernel"][grid](*tensors, **constants, **options, enable_fp_fusion=True)


def choose_tile(device, tokens):
    """Rows per program near the pairs that an expert has on average, of $CHOSEN_FROM$; a token chooses one at most once."""
    few, some, many = tiles(device)
    pairs_per_expert = tokens * SHAPE["TOP_K"] / $CHOSEN_FROM$
    if tokens == 1 or pairs_per_expert <= 0.25:
        return APART
    if tokens <= 16 or pairs_per_expert <= 16:
        return SOUGHT if tokens * SHAPE["TOP_K"] <= 64 else few
    return some if pairs_per_expert <= 64 else many


def sort_pairs(ids):
    """Pair numbers sorted by expert, i32 [T * TOP_K], those of none last, and where each's begin, i32 [NUM_EXPERTS + 2]."""
    order = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    starts = torch.empty(SHAPE["NUM_EXPERTS"] + 2, dtype=torch.int32, device=ids.device)
    variant = SORT_FEW if ids.numel() <= 4096 else SORT_MANY
    run(variant, (SHAPE["NUM_EXPERTS"] + 1,), ids, order, starts, ids.numel())
    return order, starts


def launch(x, ids, weight, out,$BIAS_PARAMETER$ routing=None):
    """out[t, j] = weight[ids[t, j]] applied to the input of pair (t, j), or zeros where ids[t, j] is no expert; all tensors
    contiguous and 16-byte aligned.

    x $X_SHAPE$, ids i64 [T, TOP_K], weight $W_SHAPE$, out [T, TOP_K, OUT]$BIAS_DOC$.
    routing: the result of sort_pairs(ids), if another layer of the same block has it already.
    """
    pairs = ids.numel()
    if pairs == 0:
        return
    variant = choose_tile(ids.device, ids.shape[0])
    columns = triton.cdiv(SHAPE["OUT"], variant["constexprs"]["BLOCK_N"])
    if variant is APART:
        run(variant, (pairs, columns), x, weight, ids,$BIAS_VALUE$ out)
        return
    if variant is SOUGHT:
        run(variant, (SHAPE["NUM_EXPERTS"] + 1, columns), x, weight, ids,$BIAS_VALUE$ out, pairs)
        return
    order, starts = sort_pairs(ids) if routing is None else routing
    if variant is FEW:
        # As many programs as there are experts anywhere, and one: those past the last one here write zeros.
        run(variant, ($CHOSEN_FROM$ + 1, columns), x, weight, order, starts,$BIAS_VALUE$ out)
        return
    # Each expert with pairs, and those of none, may have one block that is not full.
    blocks = pairs // variant["constexprs"]["BLOCK_M"] + min(pairs, SHAPE["NUM_EXPERTS"] + 1)
    run(variant, (blocks, columns), x, weight, order, starts,$BIAS_VALUE$ out)
'''

ONE_CHOICE = """\
VARIANTS = [SORT_FEW, SORT_MANY, APART, SOUGHT, FEW, SOME, MANY]


def tiles(device):
    return FEW, SOME, MANY
"""
HOPPER_CHOICE = """\
# Hopper reads operands of a product from shared memory, which leaves registers for larger tiles.
SOME_HOPPER = tile($SOME$, capabilities=(90,))
MANY_HOPPER = tile($MANY$, capabilities=(90,))
VARIANTS = [SORT_FEW, SORT_MANY, APART, SOUGHT, FEW, SOME, MANY, SOME_HOPPER, MANY_HOPPER]


def tiles(device):
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return (FEW, SOME_HOPPER, MANY_HOPPER) if hopper else (FEW, SOME, MANY)
"""
