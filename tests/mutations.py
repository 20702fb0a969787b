"""Seeded compiler bugs, each modelled on one that compilers and serving engines have had, to be switched on one at a time.

``MUTATIONS`` maps a name to a bug: ``family`` is a tiny model that it shows on, ``blamed`` the pass that is to blame
(``"codegen"`` for a kernel), ``switch`` turns it on for as long as a ``pytest.MonkeyPatch`` lasts.
"""

from __future__ import annotations

from mutated_rules import IN_RULES
from mutation_switches import (
    Mutation,
    edited,
    in_attention,
    in_experts,
    in_helper,
    in_kernels,
    in_pass,
    in_printer,
)

from fuseline.codegen import coordinates, grouped_linear, kernels, matmul_tile, paged_attention, rows, tile
from fuseline.passes import batch_dim, duplicates, grouping, merge, paging, scales, select_rows, transposes

_IN_PASSES = {
    "equal calls told apart by their operands alone": Mutation(
        "llama",
        "MergeDuplicates",
        in_pass(
            "MergeDuplicates",
            duplicates,
            "return (type(value).__name__, value)",
            "return value if isinstance(value, Node) else type(value).__name__",
        ),
    ),
    "weights of one shape merged": Mutation(
        "llama",
        "MergeDuplicates",
        in_pass(
            "MergeDuplicates",
            duplicates,
            "(node.target, _key(node.args), _key(node.kwargs))",
            '(node.target, str(node.meta["type"]) if not node.all_input_nodes else _key(node.args), _key(node.kwargs))',
        ),
    ),
    "a number of tokens baked in": Mutation(
        "llama",
        "DropBatchDim",
        in_pass(
            "DropBatchDim",
            batch_dim,
            "target_shape = list(shape[1:]) if leading else list(shape)",
            "target_shape = [19 if isinstance(size, Dim) else size for size in (shape[1:] if leading else shape)]",
        ),
    ),
    "a reshape where a transpose is meant": Mutation(
        "llama",
        "SinkTransposes",
        in_pass(
            "SinkTransposes",
            transposes,
            'back = add(aten("transpose.int"), (moved, -rank, 1 - rank))',
            'back = add(aten("reshape"), (moved, list(type_of(node).shape)))',
        ),
    ),
    "weights merged in another order than they are sliced": Mutation(
        "llama",
        "MergeQKV",
        in_pass(
            "MergeQKV",
            merge,
            "[node.args[1] for node in ordered]",
            "[node.args[1] for node in sorted(ordered, key=lambda node: node.name)]",
        ),
    ),
    "biases merged in another order": Mutation(
        "qwen2",
        "MergeQKV",
        in_pass(
            "MergeQKV",
            merge,
            "[_bias(node) for node in ordered]",
            "[_bias(node) for node in ordered[:1] + ordered[:0:-1]]",
        ),
    ),
    "bias lost in a merge": Mutation(
        "qwen2",
        "MergeQKV",
        in_pass("MergeQKV", merge, "if _bias(first) is not None:", "if len(first.args) > 3:"),
    ),
    "gate twice": Mutation(
        "llama",
        "MergeGateUp",
        in_pass("MergeGateUp", merge, "        start += width\n", "        start += 0\n"),
    ),
    "the scale of a norm applied in the weight as well": Mutation(
        "llama",
        "FoldNormScales",
        in_pass("FoldNormScales", scales, "(norm.args[0], None, ", "(norm.args[0], norm.args[1], "),
    ),
    "all layers share a cache": Mutation(
        "llama",
        "PageAttention",
        in_pass("PageAttention", paging, "(role, layer), name=", "(role, 0), name="),
    ),
    "values in the cache of the keys": Mutation(
        "llama",
        "PageAttention",
        in_pass("PageAttention", paging, '("v", v))', '("k", v))'),
    ),
    "positions used as slots": Mutation(
        "llama",
        "PageAttention",
        in_pass("PageAttention", paging, "(store, rows, slots)", '(store, rows, graph.input("positions"))'),
    ),
    "window off by one": Mutation(
        "gpt_oss",
        "PageAttention",
        in_pass(
            "PageAttention", paging, "args = (q,", "rest[2:3] = [item + 1 for item in rest[2:3]]\n        args = (q,"
        ),
    ),
    "window dropped": Mutation(
        "gpt_oss",
        "PageAttention",
        in_pass("PageAttention", paging, "args = (q,", "rest = [rest[0], 'causal', 0, *rest[3:]]\n        args = (q,"),
    ),
    "softcap dropped": Mutation(
        "gemma2",
        "PageAttention",
        in_pass("PageAttention", paging, "args = (q,", "rest = rest[:3]\n        args = (q,"),
    ),
    "sinks dropped": Mutation(
        "gpt_oss",
        "PageAttention",
        in_pass("PageAttention", paging, "args = (q,", "rest = rest[:4]\n        args = (q,"),
    ),
    "scale applied twice": Mutation(
        "llama",
        "PageAttention",
        in_pass("PageAttention", paging, "args = (q,", "rest[0] = rest[0] ** 2\n        args = (q,"),
    ),
    "a stale constant": Mutation(
        "gpt2-inverse-layer",
        "PageAttention",
        in_pass("PageAttention", paging, "args = (q,", "rest = list(layers[0].args[4:])\n        args = (q,"),
    ),
    "a block size baked in": Mutation(
        "llama",
        "PageAttention",
        in_pass("PageAttention", paging, 'graph.options.get("kv_block", 16)', "16"),
        block=8,
    ),
    "the first rows in place of those asked for": Mutation(
        "llama",
        "SelectRows",
        in_pass(
            "SelectRows",
            select_rows,
            'aten("index_select"), (source, 0, rows)',
            'aten("slice.Tensor"), (source, 0, 0, Dim.named("R"))',
        ),
    ),
    "rows selected twice": Mutation(
        "llama",
        "SelectRows",
        in_pass(
            "SelectRows",
            select_rows,
            "    user.replace_input_with(source, made)\n",
            "    made = insert_before(graph, user, aten('index_select'), (source, 0, "
            "insert_before(graph, user, aten('flip'), (rows, [0]))), name='sampled')\n"
            "    user.replace_input_with(source, made)\n",
        ),
    ),
    "kernels torn apart": Mutation(
        "llama",
        "GroupKernels",
        in_pass("GroupKernels", grouping, "    make_contiguous(graph)\n", ""),
    ),
    "a copied norm without its scale": Mutation(
        "cohere2",
        "GroupKernels",
        in_pass(
            "GroupKernels",
            grouping,
            "                user.replace_input_with(node, twin)\n\n\ndef _row",
            "                twin.update_arg(1, None)\n                user.replace_input_with(node, twin)\n\n\ndef _row",
        ),
    ),
}

_IN_KERNELS = {
    "last column of K dropped": Mutation(
        "llama",
        "codegen",
        in_kernels("matmul_source", ("(k < 48)", "(k < 47)"), ("(k < 64)", "(k < 63)")),
    ),
    "last row not written": Mutation(
        "llama",
        "codegen",
        in_kernels("matmul_source", ("row_ok = row < num_rows", "row_ok = row < num_rows - 1")),
    ),
    "a grid rounded down": Mutation(
        "llama",
        "codegen",
        lambda patch: patch.setattr(
            kernels,
            "rows_source",
            edited(rows, ("(triton.cdiv(num_rows, {block}),)", "(max(1, num_rows // {block}),)")).rows_source,
        ),
    ),
    "a bias of other columns": Mutation(
        "qwen2",
        "codegen",
        in_kernels("matmul_source", ("bias_ptr + n[None, :]", "bias_ptr + cols[None, :]")),
    ),
    "sigmoid of another slope": Mutation("llama", "codegen", in_helper("silu", "tl.exp(-x)", "tl.exp(-1.702 * x)")),
    "constant of gelu mistyped": Mutation("gemma2", "codegen", in_helper("gelu_tanh", "0.044715", "0.0447")),
    "angles of rope in half precision": Mutation(
        "llama",
        "codegen",
        in_helper("quarter_turns", "x.to(tl.float64) * ", "x.to(tl.float16).to(tl.float64) * "),
    ),
    "partner of rope with the wrong sign": Mutation(
        "llama",
        "codegen",
        in_printer(
            tile, "Tile", "_rope", "tl.where({column} < {half}, -1.0, 1.0)", "tl.where({column} < {half}, 1.0, -1.0)"
        ),
    ),
    "tables of rope without their row": Mutation(
        "llama",
        "codegen",
        in_printer(
            tile,
            "Tile",
            "_rope",
            "place = at.at((*at.coords[:-2], column), bounds)",
            "place = at.at(('0', column), bounds)",
        ),
    ),
    "epsilon of a kernel": Mutation(
        "llama",
        "codegen",
        lambda patch: [patch.setattr(m, "norm_epsilon", lambda node: "1e-05") for m in (rows, matmul_tile)] and None,
    ),
    "mean of a layer norm over padded columns": Mutation(
        "gpt2-inverse-layer",
        "codegen",
        in_kernels("matmul_source", ("[:, None] / 48", "[:, None] / 64")),
    ),
    "a slice that begins one early": Mutation(
        "gpt_oss",
        "codegen",
        lambda patch: patch.setitem(
            coordinates._VIEWS,
            "aten.slice.Tensor",
            edited(coordinates, ("+ {start})", "+ {start} - 1)"))._slice,
        ),
    ),
    "keys seen one too few": Mutation(
        "llama", "codegen", in_attention("(key[None, :] <= q_position", "(key[None, :] < q_position")
    ),
    "window of a kernel off by one": Mutation(
        "gpt_oss",
        "codegen",
        lambda patch: patch.setattr(
            paged_attention,
            "_first_key",
            edited(paged_attention, ("{spec.window} + 1, 0)", "{spec.window}, 0)"))._first_key,
        ),
    ),
    "block table ignored": Mutation(
        "llama",
        "codegen",
        in_attention("tl.load(table_ptr + key // CACHE_BLOCK, mask=live, other=0)", "key // CACHE_BLOCK"),
    ),
    "softcap without its scale": Mutation(
        "gemma2",
        "codegen",
        lambda patch: patch.setattr(
            paged_attention,
            "_logits",
            edited(paged_attention, ("spec.scale / spec.softcap!r", "1.0 / spec.softcap!r"))._logits,
        ),
    ),
    "wrong key head of a group": Mutation(
        "llama",
        "codegen",
        in_attention("kv_head = tl.program_id(1) // PARTS", "kv_head = 0 * tl.program_id(1) // PARTS"),
    ),
    "keys written at the rows of the step": Mutation(
        "llama",
        "codegen",
        lambda patch: patch.setattr(
            matmul_tile,
            "store",
            edited(rows, ("tile.looked_up(slots, coords[:1], at)", "coords[0]")).store,
        ),
    ),
    "bias of the first expert": Mutation(
        "gpt_oss",
        "codegen",
        lambda patch: patch.setattr(
            grouped_linear,
            "_BIAS_ADD",
            grouped_linear._BIAS_ADD.replace("expert * OUT + n", "n"),
        ),
    ),
    "an expert's last pair left out": Mutation(
        "gpt_oss",
        "codegen",
        in_experts(
            "live = rank < tl.load(starts_ptr + expert + 1)", "live = rank < tl.load(starts_ptr + expert + 1) - 1"
        ),
    ),
}

MUTATIONS: dict[str, Mutation] = {**IN_RULES, **_IN_PASSES, **_IN_KERNELS}
