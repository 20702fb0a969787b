"""Models that do not mean what a graph can say are refused with the node or layer and the reason, never compiled wrongly.

Each model is a tiny llama with one thing changed, as a user might change it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import make
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.llama import modeling_llama

import fuseline
from fuseline import UnsupportedModelError


def compile(model: PreTrainedModel, **options: Any) -> fuseline.CompiledModel:
    cache = fuseline.KVCacheConfig(max_tokens=256)
    return fuseline.compile(model, device="cpu", **{"max_seq_len": 64, "kv_cache": cache, **options})


class Changed(torch.nn.Module):
    """An MLP whose input goes through ``change`` first."""

    def __init__(self, inner: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.change(x))


def changed(change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    model = make("llama")
    model.model.layers[1].mlp = Changed(model.model.layers[1].mlp, change)
    return model


def branch(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 4 else x


def branch_for_one(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] == 1 else x


def branch_on_data(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def write_next(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] += x[:, :-1]
    return y


MIXING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cumulative sum": (lambda x: x.cumsum(1), "l1_cumsum: it works along the row of tokens"),
    "cumulative mean": (lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None], "l1_cumsum"),
    "mean over tokens": (lambda x: x - x.mean(1, keepdim=True), r"l1_mean\w*: it works along the row of tokens"),
    "mean over everything": (lambda x: x - x.mean(), r"l1_mean\w*: it reduces over everything"),
    "largest token": (lambda x: x / x.amax((1, 2), keepdim=True), "l1_amax"),
    "softmax over tokens": (lambda x: x * x.softmax(1), "l1_softmax"),
    "token shift by roll": (lambda x: x + x.roll(1, 1), "l1_roll"),
    "token shift by pad": (lambda x: x + F.pad(x, (0, 0, 1, 0))[:, :-1], "l1_pad"),
    "token shift in place": (write_next, "l1_"),
    "first token": (lambda x: x + x[:, :1], "l1_slice"),
    "last token": (lambda x: x + x[:, -1:], "l1_slice"),
    "one token": (lambda x: x + x[:, 0][:, None], "l1_select"),
    "reversed": (lambda x: x.flip(1), "l1_flip"),
    "sorted": (lambda x: x.sort(1).values, "l1_sort"),
    "convolution": (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(48, 48, 1)).transpose(1, 2), "l1_conv1d"),
    "own attention": (lambda x: (x @ x.transpose(1, 2)).tril() @ x, "l1_matmul: it multiplies tokens with tokens"),
    "einsum over tokens": (lambda x: torch.einsum("bsd,bte->bte", x, x), "l1_"),
    "norm over tokens": (lambda x: F.layer_norm(x.transpose(1, 2), x.shape[1:2]).transpose(1, 2), "l1_layer_norm"),
    "batch norm": (lambda x: F.instance_norm(x.transpose(1, 2)).transpose(1, 2), "l1_"),
    "folded tokens": (lambda x: x.transpose(1, 2).reshape(x.shape), "depends on the number of tokens"),
    "masked tokens": (lambda x: x[x.abs().sum(-1) > 1][None], "forward|l1_|traced"),
    "length": (lambda x: x * x.shape[1], r"l1_mul\w*: its result depends on how many tokens there are"),
    "counted backwards": (lambda x: x + torch.arange(x.shape[1], 0, -1)[:, None], "l1_arange: it counts along the row"),
    "counted in twos": (
        lambda x: x + torch.arange(0, 2 * x.shape[1], 2)[:, None],
        "l1_arange: it counts along the row",
    ),
    "table by place": (
        lambda x: x + torch.linspace(0, 1, 96).reshape(96, 1)[: x.shape[1]],
        "depends on the number of tokens",
    ),
    "noise": (lambda x: x + torch.randn_like(x), "l1_randn_like: it draws random numbers"),
    "dropout left on": (lambda x: F.dropout(x, 0.1, training=True), "l1_dropout: it draws random numbers"),
    "branch": (branch, "its code depends on the number of tokens T"),
    "branch for one token": (branch_for_one, "the model itself give other logits for a prompt of 1 tokens"),
    "branch on data": (branch_on_data, "cannot be traced"),
    "memory never written": (lambda x: x + 0 * torch.empty_like(x), "l1_empty_like"),
}


@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_tokens_is_refused_by_name(case: str) -> None:
    change, reason = MIXING[case]
    with pytest.raises(UnsupportedModelError, match=reason):
        compile(changed(change))


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum over features": lambda x: x / x.abs().sum(-1, keepdim=True),
    "outer product of features": lambda x: torch.einsum("btd,bte->btd", x, x),
    "heads apart": lambda x: x.view(*x.shape[:2], 6, 8).transpose(1, 2).softmax(-1).transpose(1, 2).reshape(x.shape),
    "heads mixed": lambda x: (x.view(*x.shape[:2], 6, 8).transpose(-1, -2) @ torch.eye(6)).reshape(x.shape),
    "copies of the row": lambda x: x.view(-1, 48).repeat(3, 1).view(3, *x.shape).sum(0),
    "write to features": lambda x: torch.cat((x[..., :8] * 2, x[..., 8:]), -1),
    "largest features": lambda x: x * (x >= x.topk(5, -1).values[..., -1:]),
    "constant": lambda x: x + torch.ones(x.shape[1], 48),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_work_on_each_token_alone_compiles(case: str) -> None:
    model = changed(ALLOWED[case])
    tokens = torch.randint(3, 99, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
    found = compile(model)(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def with_attention(function: Callable[..., Any]) -> PreTrainedModel:
    """A llama whose attention layers call ``function(forward, hidden_states, **arguments)``."""
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = type(
            "OwnAttention",
            (modeling_llama.LlamaAttention,),
            {"forward": lambda self, *args, **kwargs: function(super(type(self), self).forward, *args, **kwargs)},
        )
    return model


def test_a_changed_mask_is_refused() -> None:
    def biased(forward: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, attention_mask=attention_mask * 1.0, **kwargs)

    with pytest.raises(UnsupportedModelError, match="attention.*changes its attention mask"):
        compile(with_attention(biased))


def test_attention_without_a_mask_is_refused() -> None:
    def unmasked(forward: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, attention_mask=None, **kwargs)

    with pytest.raises(UnsupportedModelError, match="layer 0: OwnAttention: attention without a mask"):
        compile(with_attention(unmasked))


def test_an_argument_of_attention_that_is_not_known_is_refused() -> None:
    def steep(forward: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, position_bias=torch.ones(1), **kwargs)

    with pytest.raises(UnsupportedModelError, match="layer 0: OwnAttention: attention takes position_bias"):
        compile(with_attention(steep))


def test_eager_attention_with_a_bias_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's call looks like any other; only its own eager function adds something."""
    plain = modeling_llama.eager_attention_forward

    def biased(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        slope = torch.arange(key.shape[-2]) * 0.1
        return plain(module, query, key, value, mask + slope, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    with pytest.raises(UnsupportedModelError, match="layer 0: LlamaAttention computes more than"):
        compile(make("llama"))


def test_attention_of_the_users_own_is_refused() -> None:
    AttentionInterface.register("steep", modeling_llama.eager_attention_forward)
    model = make("llama")
    model.set_attn_implementation("steep")
    with pytest.raises(UnsupportedModelError, match="runs with the attention 'steep'"):
        compile(model)


def test_a_prefix_seen_from_both_sides_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="l0_attention: its attention mask is or_masks"):
        compile(make("gemma3_text-bidirectional"))


@pytest.mark.parametrize("name", ["llama-longrope", "phi3-longrope"])
def test_frequencies_by_length_are_refused_above_the_limit(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="rotary_emb: rope_type 'longrope' .*max_seq_len=32 or less"):
        compile(make(name))
    compile(make(name), max_seq_len=32)


def test_hooks_are_refused() -> None:
    model = make("llama")
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1 carries forward hooks"):
        compile(model)


def test_weights_that_were_never_loaded_are_refused() -> None:
    with torch.device("meta"):
        model = make("llama").to("meta")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        compile(model)


def test_logits_of_the_last_token_alone_are_refused() -> None:
    model = make("llama")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x[:, -1:])
    with pytest.raises(UnsupportedModelError, match="row of tokens|lm_head|slice"):
        compile(model)


FAMILIES = {
    "bloom": r"transformer\.h\.0\.self_attention \(BloomAttention\) computes its own",
    "mamba": r"backbone\.layers\.0 has no attention",
    "bert": "l0_attention: its attention mask is bidirectional",
    "roberta-decoder": "the model itself give other logits for a prompt of 1 tokens.*positions of its own",
    "gptj": r"transformer\.h\.0\.attn \(GPTJAttention\) computes its own",
    "falcon-alibi": r"transformer\.h\.0\.self_attention \(FalconAttention\) computes its own",
    "doge": "depends on the number of tokens T; the trace holds only where .*2048",
    "lfm2-conv": "l0_conv1d",
    "jamba": r"depends on the number of tokens.*model\.layers\.0 has no attention",
    "deepseek_v32": "layer 0: DeepseekV32Attention: attention takes indices",
    "jetmoe": "l0_split_with_sizes.*depends on the data",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_a_graph_cannot_express(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"(?s){FAMILIES[name]}"):
        compile(make(name))
