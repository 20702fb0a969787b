"""The kernels of an emitted paged-attention file; ``paged_attention`` fills in the words between dollar signs."""

TEMPLATE = '''\
import functools

import torch
import triton
import triton.language as tl

# Every kernel takes the model's numbers as constexprs, so the compiler knows all strides.
SHAPE = $SHAPE$


$PREFETCH_HELPER$

@triton.jit
def first_key(position):
    """The first key that a query at `position` sees ($KIND$)."""
    return $FIRST_KEY$


@triton.jit
def base2_logits(products):
    """Dot products of queries and keys to logits in base 2, since exp2 is what the hardware has."""
$LOGITS$


$ATTEND_FUNCTION$


@triton.jit
def count_not_above(starts_ptr, count, target, DIVISOR: tl.constexpr, STEP: tl.constexpr):
    """How many i < count have starts[i] // DIVISOR + i * STEP <= target, which grows with i.

    One wide load is faster than the dependent loads of a binary search.
    """
    found = 0
    for base in range(0, count, 256):
        i = base + tl.arange(0, 256)
        start = tl.load(starts_ptr + i, mask=i < count, other=0)
        found += tl.sum(((start // DIVISOR + i * STEP <= target) & (i < count)).to(tl.int32), 0)
    return found


@triton.jit
def locate_query(token, starts_ptr, lengths_ptr, num_seqs):
    """The sequence of a query and the keys [begin, end) it sees; none for a row that no sequence owns (padding)."""
    # With one query per sequence, query i is sequence i's; only other layouts need the search.
    seq = token
    ahead = tl.load(starts_ptr + tl.minimum(token, num_seqs))
    after = tl.load(starts_ptr + tl.minimum(token + 1, num_seqs))
    if (ahead != token) | (after != token + 1):
        seq = count_not_above(starts_ptr, num_seqs + 1, token, 1, 0) - 1
    owned = seq < num_seqs
    seq = tl.minimum(seq, num_seqs - 1)
    from_last = tl.load(starts_ptr + seq + 1) - token
    position = tl.load(lengths_ptr + seq) - from_last
    return seq, tl.where(owned, first_key(position), 0), tl.where(owned, position + 1, 0)


@triton.jit
def keys_per_split(begin, end, num_splits, BLOCK_N: tl.constexpr):
    """Whole tiles for each split; the last splits may have none."""
    return tl.cdiv(tl.cdiv(end - begin, num_splits), BLOCK_N) * BLOCK_N


@triton.jit
def join_splits(
    partial_ptr, lse_ptr, rows, row_live, live_splits, num_splits,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, V_HEAD_DIM: tl.constexpr, PAD_DV: tl.constexpr,
):
    """The partials of some rows, weighted by their log-sum-exps. Other programs wrote them: they are not in this L1."""
    dv = tl.arange(0, PAD_DV)
    acc = tl.zeros((BLOCK_M, PAD_DV), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, live_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        live = row_live[:, None] & (split < live_splits)[None, :]
        place = rows[:, None] * num_splits + split[None, :]
        lse = tl.load(lse_ptr + place, mask=live, other=-float("inf"), cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(lse, 1))
        # Rows that are none keep -inf; shifting by 0 instead keeps -inf - -inf from being NaN.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(lse - shift[:, None])
        decay = tl.exp2(top - shift)
        mask = live[:, :, None] & (dv < V_HEAD_DIM)[None, None, :]
        source = partial_ptr + place[:, :, None] * V_HEAD_DIM + dv[None, None, :]
        parts = tl.load(source, mask=mask, other=0.0, cache_modifier=".cg")
        acc = acc * decay[:, None] + tl.sum(parts * weights[:, :, None], 1)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["num_seqs", "table_width", "num_splits"])
def decode(
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, lengths_ptr,$SINKS_ARG$$FACTORS_ARG$ out_ptr, partial_ptr, lse_ptr, arrived_ptr,
    num_seqs, table_width, num_splits,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    CACHE_BLOCK: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,$PACKED_PARAMETER$ PDL: tl.constexpr,
):
    """One query, HEADS query heads of one KV head, one split of the keys.

    The heads are the rows of the dot, so a key is loaded once for all of them. With SPLIT, each split leaves its fp32
    partial [T, NUM_HEADS, num_splits, V_HEAD_DIM] and its base-2 log-sum-exp, and the last one to arrive joins them.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Heads vary fastest: programs that run together read neighbouring rows of the cache.
    kv_head = tl.program_id(0) // PARTS
    token = tl.program_id(1)
    split = tl.program_id(2)
    # Tables and lengths are there before the first kernel of a step: only queries, keys and values are waited for.
    seq, first, last = locate_query(token, starts_ptr, lengths_ptr, num_seqs)
    begin, end, live_splits = first, last, 1
    if SPLIT:
        length = keys_per_split(first, last, num_splits, BLOCK_N)
        live_splits = tl.maximum(tl.cdiv(last - first, tl.maximum(length, 1)), 1)
        begin = first + split * length
        end = tl.minimum(last, begin + length)
    if PDL:
        if PREFETCH:
            # The keys and values of earlier steps do not change: they can be on their way to the L2 cache already.
            if begin < end:
                early = tl.minimum(begin + tl.arange(0, 128), end - 1)
                where = tl.load(tables_ptr + seq.to(tl.int64) * table_width + early // CACHE_BLOCK).to(tl.int64)
                where = (where * CACHE_BLOCK + early % CACHE_BLOCK) * NUM_KV_HEADS + kv_head
                prefetch(k_ptr + where * HEAD_DIM, HEAD_DIM * k_ptr.dtype.element_ty.primitive_bitwidth // 8)
                prefetch(v_ptr + where * V_HEAD_DIM, V_HEAD_DIM * v_ptr.dtype.element_ty.primitive_bitwidth // 8)
        tl.extra.cuda.gdc_wait()
    if split >= live_splits:
        return

    in_group = tl.program_id(0) % PARTS * HEADS + tl.arange(0, BLOCK_M)
    row_live = (tl.arange(0, BLOCK_M) < HEADS) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    dv = tl.arange(0, PAD_DV)
    row = token.to(tl.int64) * NUM_HEADS + head
$LOAD_Q$
$DECODE_INIT$
    table_ptr = tables_ptr + seq.to(tl.int64) * table_width
    $ACC$, top, total = attend(
        $Q$, head, $ACC$, top, total, kv_head, begin, end, table_ptr, k_ptr, v_ptr,$FACTORS_ARG$
        NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, CACHE_BLOCK, BLOCK_N, PAD_D, PAD_DV, False, False,$PACKED_ARG$
    )
$JOIN$    acc = acc / tl.where(total == 0.0, 1.0, total$LIFT_END$)[:, None]
    out_mask = row_live[:, None] & (dv < V_HEAD_DIM)[None, :]
    if SPLIT:
        if live_splits > 1:
            place = row * num_splits + split
            tl.store(lse_ptr + place, top + tl.log2(total), mask=row_live)
            tl.store(partial_ptr + place[:, None] * V_HEAD_DIM + dv[None, :], acc, mask=out_mask)
            # One thread announces what all have written.
            tl.debug_barrier()
            counter = arrived_ptr + token * tl.num_programs(0) + tl.program_id(0)
            before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if before + 1 < live_splits:
                return
            tl.debug_barrier()
            tl.store(counter, 0)  # as the next launch expects it
            acc = join_splits(
                partial_ptr, lse_ptr, row, row_live, live_splits, num_splits, BLOCK_M, BLOCK_S, V_HEAD_DIM, PAD_DV
            )
    tl.store(
        out_ptr + row[:, None] * V_HEAD_DIM + dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask
    )


@triton.jit(do_not_specialize=["num_seqs", "table_width"])
def prefill(
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, lengths_ptr,$SINKS_ARG$$FACTORS_ARG$ out_ptr,
    num_seqs, table_width,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    CACHE_BLOCK: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,$PACKED_PARAMETER$ PDL: tl.constexpr,
):
    """BLOCK_M // HEADS neighbouring queries of one sequence, times HEADS query heads of one KV head."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Late queries see most keys: they come first, so that the last to end are short.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // PARTS
    # Counting one partly filled block for each sequence before it, sequence s begins at program starts[s]//BLOCK_Q + s.
    # That leaves programs without queries, but needs no table of blocks and no size from the device.
    seq = count_not_above(starts_ptr, num_seqs, program, BLOCK_Q, 1) - 1
    seq_start = tl.load(starts_ptr + seq)
    num_queries = tl.load(starts_ptr + seq + 1) - seq_start
    first_query = (program - (seq_start // BLOCK_Q + seq)) * BLOCK_Q
    if first_query >= num_queries:
        return

    lane = tl.arange(0, BLOCK_M)
    query = first_query + lane // HEADS
    in_group = tl.program_id(1) % PARTS * HEADS + lane % HEADS
    row_live = (lane < BLOCK_Q * HEADS) & (query < num_queries) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    dv = tl.arange(0, PAD_DV)
    row = (seq_start + query).to(tl.int64) * NUM_HEADS + head
$LOAD_Q$
$PREFILL_INIT$
    # Keys before the first query's window, or after the last query, are seen by no row of this program.
    past = tl.load(lengths_ptr + seq) - num_queries
    begin = first_key(past + first_query)
    end = past + tl.minimum(first_query + BLOCK_Q, num_queries)
    table_ptr = tables_ptr + seq.to(tl.int64) * table_width
$ATTEND$
$JOIN$    acc = acc / tl.where(total == 0.0, 1.0, total$LIFT_END$)[:, None]
    out_mask = row_live[:, None] & (dv < V_HEAD_DIM)[None, :]
    tl.store(out_ptr + row[:, None] * V_HEAD_DIM + dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_mask)


$LAUNCH$'''
