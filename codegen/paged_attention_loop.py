"""The loop over the keys of an emitted paged-attention file: over numbers, and over codes with factors."""

NUMBERS = '''\
@triton.jit
def attend(
    q, q_position, acc, top, total, kv_head, begin, end, table_ptr, k_ptr, v_ptr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, CACHE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
):
    """Online softmax of the rows of q over the keys [begin, end) of one sequence.

    acc, top and total are each row's weighted values, largest logit and sum of weights so far. MASKED is for rows at
    different positions: each then sees only its own part of the range. WHOLE is for a range of whole tiles.
    """
    d = tl.arange(0, PAD_D)
    dv = tl.arange(0, PAD_DV)
    for start in tl.range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # A slot past the end may hold anything, NaN too, and 0 * NaN is NaN: it is not loaded at all.
        live = (key < end) | WHOLE
        block = tl.load(table_ptr + key // CACHE_BLOCK, mask=live, other=0)
        row = (block.to(tl.int64) * CACHE_BLOCK + key % CACHE_BLOCK) * NUM_KV_HEADS + kv_head
        k_mask = live[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + row[:, None] * HEAD_DIM + d[None, :], mask=k_mask, other=0.0)
        logits = base2_logits(tl.dot(q, tl.trans(k), input_precision="ieee"))
        visible = live[None, :]
        if MASKED:
            visible = visible & (key[None, :] <= q_position[:, None]) & (key[None, :] >= first_key(q_position)[:, None])
        if MASKED or not WHOLE:
            logits = tl.where(visible, logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = new_top
        if MASKED or not WHOLE:
            # A row that has seen no key yet has top = -inf; shifting by 0 instead keeps -inf - -inf from being NaN.
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        v_mask = live[:, None] & (dv < V_HEAD_DIM)[None, :]
        v = tl.load(v_ptr + row[:, None] * V_HEAD_DIM + dv[None, :], mask=v_mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        top = new_top
    return acc, top, total
'''

CODES = '''\
@triton.jit
def factors_at(factors_ptr, row, live, PACKED: tl.constexpr):
    """Factors of some rows; with PACKED they are in bf16."""
    if PACKED:
        # Each with its neighbour: two bytes alone cannot be copied ahead of their use.
        pair = tl.load(factors_ptr.to(tl.pointer_type(tl.int32)) + row // 2, mask=live, other=0)
        factors = tl.where(row % 2 == 0, pair << 16, pair & -65536).to(tl.float32, bitcast=True)
    else:
        factors = tl.load(factors_ptr + row, mask=live, other=0.0).to(tl.float32)
    return factors


@triton.jit
def halves(pairs, PACKED: tl.constexpr):
    """The first and the second codes of pairs, as numbers that products are made of."""
$HALVES$


@triton.jit
def attend(
    q_even, q_odd, q_position, even, odd, top, total, kv_head, begin, end, table_ptr, k_ptr, v_ptr,
    k_factors_ptr, v_factors_ptr,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, CACHE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Online softmax of some queries over the keys [begin, end) of one sequence, whose keys and values are codes.

    Codes are read in pairs, as numbers of 16 bits: operands of 8 would come from shared memory byte by byte. q_even and
    q_odd are the places of q that the first and the second of a pair belong to; even and odd are each row's weighted
    values so far, top and total its largest logit and sum of weights. A key's factor is one for its logits, a value's
    for its weights. MASKED is for rows at different positions: each then sees only its own part of the range. WHOLE is
    for a range of whole tiles.
    """
    d = tl.arange(0, PAD_D // 2)
    dv = tl.arange(0, PAD_DV // 2)
    for start in tl.range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # A slot past the end may hold anything, NaN too, and 0 * NaN is NaN: it is not loaded at all.
        live = (key < end) | WHOLE
        block = tl.load(table_ptr + key // CACHE_BLOCK, mask=live, other=0)
        row = (block.to(tl.int64) * CACHE_BLOCK + key % CACHE_BLOCK) * NUM_KV_HEADS + kv_head
        k_factor = factors_at(k_factors_ptr, row, live, PACKED)
        # Times $LIFT$, which is taken off at the end: narrow floats would lose digits of small weights.
        v_factor = factors_at(v_factors_ptr, row, live, PACKED) * $LIFT$
        k_mask = live[:, None] & (d < HEAD_DIM // 2)[None, :]
        k_pairs = k_ptr.to(tl.pointer_type(tl.int16)) + row[:, None] * (HEAD_DIM // 2) + d[None, :]
        k_even, k_odd = halves(tl.load(k_pairs, mask=k_mask, other=0), PACKED)
        products = tl.dot(q_even, tl.trans(k_even), input_precision="ieee")
        products = tl.dot(q_odd, tl.trans(k_odd), products, input_precision="ieee")
        logits = base2_logits(products * k_factor[None, :])
        visible = live[None, :]
        if MASKED:
            visible = visible & (key[None, :] <= q_position[:, None]) & (key[None, :] >= first_key(q_position)[:, None])
        if MASKED or not WHOLE:
            logits = tl.where(visible, logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = new_top
        if MASKED or not WHOLE:
            # A row that has seen no key yet has top = -inf; shifting by 0 instead keeps -inf - -inf from being NaN.
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        v_mask = live[:, None] & (dv < V_HEAD_DIM // 2)[None, :]
        v_pairs = v_ptr.to(tl.pointer_type(tl.int16)) + row[:, None] * (V_HEAD_DIM // 2) + dv[None, :]
        v_even, v_odd = halves(tl.load(v_pairs, mask=v_mask, other=0), PACKED)
        scaled = (weights * v_factor[None, :]).to(v_even.dtype)
        even = tl.dot(scaled, v_even, even * decay[:, None], input_precision="ieee")
        odd = tl.dot(scaled, v_odd, odd * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        top = new_top
    return even, odd, top, total
'''
