"""The host's part of an emitted paged-attention file: its variants and ``launch``."""

LAUNCH = '''\
# maxnreg: left to choose (None), the assembler may spill a little for the sake of more resident warps.
QKV = {
    "q_ptr": "$TYPE$", "k_ptr": "$CACHE_TYPE$", "v_ptr": "$CACHE_TYPE$",
    "tables_ptr": "*i32", "starts_ptr": "*i32", "lengths_ptr": "*i32"$SINKS_TYPE$$FACTORS_TYPE$,
}
DECODE = {
    "kernel": decode,
    "signature": {**QKV, "out_ptr": "$TYPE$", "num_seqs": "i32", "table_width": "i32", "num_splits": "i32"},
    "constexprs": {
        **SHAPE, $DECODE_TILE$, "BLOCK_S": $BLOCK_S$, "SPLIT": False, "PREFETCH": $PREFETCH$, $PACKED_VALUE$"PDL": False,
        "partial_ptr": None, "lse_ptr": None, "arrived_ptr": None,
    },
    $DECODE_OPTIONS$,
}
DECODE_SPLIT = {
    **DECODE,
    "signature": {**DECODE["signature"], "partial_ptr": "*fp32", "lse_ptr": "*fp32", "arrived_ptr": "*i32"},
    "constexprs": {
        **SHAPE, $DECODE_TILE$, "BLOCK_S": $BLOCK_S$, "SPLIT": True, "PREFETCH": $PREFETCH$, $PACKED_VALUE$"PDL": False,
    },
}
PREFILL = {
    "kernel": prefill,
    "signature": {**QKV, "out_ptr": "$TYPE$", "num_seqs": "i32", "table_width": "i32"},
    "constexprs": {**SHAPE, $PREFILL_TILE$, $PACKED_VALUE$"PDL": False},
    $PREFILL_OPTIONS$,
}
$CHOICE$


$OVERLAPS$

def run(variant, grid, **arguments):
    """Launch what VARIANTS describes."""
    options = {name: variant[name] for name in ("num_warps", "num_stages", "maxnreg")}
    constants = variant["constexprs"]
$PACKED_RUN$    if overlaps(arguments["q_ptr"].device):
        constants, options = {**constants, "PDL": True}, {**options, "launch_pdl": True}
    variant["kernel"][grid](**{**constants, **arguments}, **options, enable_fp_fusion=True)


$COUNTERS$

@functools.cache
def processors(device):
    """Streaming multiprocessors of a GPU; the interpreter's one program at a time counts as a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def programs(variant):
    """Programs per token or block of tokens: one for each KV head, more if a group of query heads takes several."""
    group = SHAPE["NUM_HEADS"] // SHAPE["NUM_KV_HEADS"]
    return SHAPE["NUM_KV_HEADS"] * triton.cdiv(group, variant["constexprs"]["HEADS"])


def choose_splits(device, tokens, table_width):
    """Splits per query: about four programs for each processor, but no split of less than a tile of keys.

    The span is what the block table can hold, not what the sequences hold: asking the device would make the host wait.
    """
    span = $SPAN$
    whole = tokens * programs(DECODE)
    wanted = (4 * processors(device) + whole // 2) // whole
    return max(1, min(wanted, triton.cdiv(span, $DECODE_BLOCK_N$)))


def launch(q, k_cache, v_cache, block_tables, query_starts, context_lens, out,$SINKS_PARAMETER$$FACTORS_PARAMETER$ num_splits=None):
    """Attention of T queries from S sequences, all tensors contiguous and 16-byte aligned.

    q [T, NUM_HEADS, HEAD_DIM], k_cache [slots, NUM_KV_HEADS, HEAD_DIM], v_cache [slots, NUM_KV_HEADS, V_HEAD_DIM],
    block_tables i32 [S, width], query_starts i32 [S + 1], context_lens i32 [S] (keys, this step's included),
    out [T, NUM_HEADS, V_HEAD_DIM]$SINKS_DOC$$FACTORS_DOC$.
    T == S is taken to be decoding, one query per sequence: other layouts of as many queries are right too, only slower,
    and rows that no sequence owns become zero.
    """
    tokens, num_seqs, table_width = q.shape[0], context_lens.shape[0], block_tables.shape[1]
    if tokens == 0:
        return
    inputs = {
        "q_ptr": q, "k_ptr": k_cache, "v_ptr": v_cache, "tables_ptr": block_tables, "starts_ptr": query_starts,
        "lengths_ptr": context_lens$SINKS_VALUE$$FACTORS_VALUE$, "num_seqs": num_seqs, "table_width": table_width,
    }
    if tokens != num_seqs:
        variant = prefill_variant(q.device)
        queries = variant["constexprs"]["BLOCK_M"] // variant["constexprs"]["HEADS"]
        # Each sequence may have one block that is not full.
        run(variant, (tokens // queries + num_seqs, programs(variant)), **inputs, out_ptr=out)
        return
    if num_splits is None:
        num_splits = choose_splits(q.device, tokens, table_width)
    grid = (programs(DECODE), tokens, num_splits)
    if num_splits == 1:
        run(DECODE, grid, **inputs, out_ptr=out, num_splits=1)
        return
    rows = (tokens, SHAPE["NUM_HEADS"], num_splits)
    partial = torch.empty(*rows, SHAPE["V_HEAD_DIM"], dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    arrived = counters(q.device, triton.next_power_of_2(tokens * programs(DECODE)))
    run(
        DECODE_SPLIT, grid, **inputs, out_ptr=out, partial_ptr=partial, lse_ptr=lse, arrived_ptr=arrived,
        num_splits=num_splits,
    )
'''

ONE_CHOICE = """\
VARIANTS = [DECODE, DECODE_SPLIT, PREFILL]


def prefill_variant(device):
    return PREFILL
"""
HOPPER_CHOICE = """\
# Hopper reads operands of a product from shared memory, which leaves registers for larger tiles.
PREFILL_HOPPER = {
    **PREFILL,
    "constexprs": {**SHAPE, $HOPPER_TILE$, $PACKED_VALUE$"PDL": False},
    $HOPPER_OPTIONS$,
    "capabilities": (90,),
}
VARIANTS = [DECODE, DECODE_SPLIT, PREFILL, PREFILL_HOPPER]


@functools.cache
def prefill_variant(device):
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return PREFILL_HOPPER if hopper else PREFILL
"""
