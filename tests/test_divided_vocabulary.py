"""Ranks that have parts of the logits choose the tokens that are chosen from whole rows, and gather no more than they need."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fuseline
from fuseline import ir, passes
from fuseline.ir.dist import Group
from fuseline.runtime.choices import Choices, Chosen
from fuseline.runtime.groups import simulated
from fuseline.runtime.sampler import sample
from fuseline.runtime.sequence import SamplingParams
from fuseline.runtime.vocabulary import DividedVocabulary, Vocabulary

GREEDY = SamplingParams()
DRAWN = [
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.7, top_k=5, seed=4),
    SamplingParams(temperature=1.3, top_p=0.8, seed=5),
    SamplingParams(temperature=2.0, top_k=9, top_p=0.5, seed=6),
]


@dataclass
class Counted:
    """A rank that notes how many numbers it gathers of the others."""

    group: Group
    numbers: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self.numbers.append(x.numel())
        return self.group.all_gather(x)


def parts_of(logits: Tensor, ranks: int, width: int) -> list[Tensor]:
    """What each rank has: the columns that are added would win, if they counted."""
    padded = logits.new_full((len(logits), ranks * width), 1e6)
    padded[:, : logits.shape[1]] = logits
    return list(padded.split(width, 1))


def chosen_by_ranks(
    logits: Tensor, ranks: int, width: int, params: list[SamplingParams]
) -> tuple[list[Chosen], list[list[int]]]:
    """The choices of ranks that are one each, and of a process that has all; and how many numbers each rank gathers."""
    groups = [Counted(group) for group in simulated(ranks)]
    parts, indices = parts_of(logits, ranks, width), list(range(len(params)))

    def choose(vocabulary: Vocabulary, own: Tensor) -> Chosen:
        choices = Choices(64, torch.device("cpu"), vocabulary)
        choices.greedy(own)
        choices.draw(own, params, indices)
        return choices.send(len(own)).wait()

    def rank(place: int) -> Chosen:
        return choose(DividedVocabulary(logits.shape[1], width, [groups[place]]), parts[place])

    with ThreadPoolExecutor(ranks) as threads:
        found = list(threads.map(rank, range(ranks)))
    numbers = [group.numbers for group in groups]
    found.append(choose(DividedVocabulary(logits.shape[1], width, groups), torch.cat(parts, 1)))
    return found, numbers


def cases(size: int, dtype: torch.dtype) -> Tensor:
    """Rows whose largest logits are equal within a part, in several parts, at either end, and everywhere."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(7, size, generator=generator).to(dtype)
    logits[1, 0] = logits[2, -1] = 9.0
    logits[3] = -2.0
    logits[4, size // 3 :: max(1, size // 7)] = 9.0
    logits[5, size // 2 :] = 7.0
    logits[6, [size // 2, size - 1]] = 8.0
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "ranks", "width"),
    [(96, 2, 48), (97, 2, 64), (97, 3, 48), (17, 4, 16), (5, 4, 16), (1009, 4, 256)],
)
def test_ranks_choose_what_is_chosen_from_whole_rows(size: int, ranks: int, width: int, dtype: torch.dtype) -> None:
    """The lowest id among equals wins across ranks, added columns never do; some ranks may have nothing else."""
    logits = cases(size, dtype)
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1).tolist()
    found, numbers = chosen_by_ranks(logits, ranks, width, [GREEDY] * len(logits))
    assert found == [Chosen(first, [True] * len(logits))] * (ranks + 1)
    assert numbers == [[3 * len(logits)]] * ranks, "three numbers a row"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 40, 50, 96])
def test_what_is_no_number_is_found_whoever_has_it(value: float, column: int) -> None:
    logits = cases(97, torch.float32)
    logits[4, column] = value
    found, _ = chosen_by_ranks(logits, 3, 48, [GREEDY] * len(logits))
    for one in found:
        assert one.finite == [row != 4 for row in range(len(logits))]
        assert one == found[0] and all(0 <= token < 97 for token in one.tokens)


def test_greedy_and_drawn_rows_in_one_batch() -> None:
    """Rows that are drawn are gathered whole, the others are not."""
    logits = torch.randn(9, 97, generator=torch.Generator().manual_seed(1))
    params = [DRAWN[row // 2 % 4] if row % 2 else GREEDY for row in range(9)]
    found, numbers = chosen_by_ranks(logits, 3, 48, params)
    assert found == [Chosen(sample(logits, params, list(range(9))), [True] * 9)] * 4
    assert [sum(items) for items in numbers] == [3 * 9 + 4 * 48] * 3


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=2, initializer_range=0.3, **{"vocab_size": 97, **sizes, **changes})
    return LlamaForCausalLM(config).eval()


OPTIONS: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "max_batch_size": 8}


def served(compiled: fuseline.CompiledModel) -> list[list[int]]:
    """The answers to requests of every kind, side by side."""
    engine = compiled.engine
    ids = []
    for number, params in enumerate([GREEDY, *DRAWN, GREEDY]):
        params = SamplingParams(9, params.temperature, params.top_k, params.top_p, params.seed)
        ids.append(engine.add([3 + number, 5, 96][: 1 + number % 3], params))
    done = engine.run()
    return [list(done[identity].output) for identity in ids]


@pytest.fixture(scope="module")
def whole() -> fuseline.CompiledModel:
    return fuseline.compile(model(), **OPTIONS)


@pytest.mark.parametrize("more", [{}, {"graphs": True, "lookahead": True}, {"skip": ["LogitsInParts"]}])
def test_mixed_batches_are_served_like_by_the_whole_model(whole: fuseline.CompiledModel, more: dict[str, Any]) -> None:
    divided = fuseline.compile(model(), tensor_parallel=3, simulate=True, **OPTIONS, **more)
    assert isinstance(divided.engine.vocabulary, DividedVocabulary) == ("skip" not in more)
    assert served(divided) == served(whole)
    assert len({tuple(answer) for answer in served(whole)}) > 3
    prompts = [[3, 5, 96], [7]]
    logits = divided(prompts).logits
    assert logits.shape == (2, 3, 97)
    torch.testing.assert_close(logits, whole(prompts).logits, rtol=1e-4, atol=1e-4)
    assert divided.decode_step_ms(2, 8, repeats=1) > 0


def test_the_graph_says_what_is_in_parts() -> None:
    compiled = fuseline.compile(model(), tensor_parallel=2, simulate=True, **OPTIONS)
    text = str(compiled.graph)
    assert "vocabulary: option(97)" in text and "lm_head: f32[R, 64] = " in text
    assert text.rstrip().endswith("return lm_head") and "dist.all_gather" not in text


GATHERED = """\
def decoder(x: f32[T, 8], *, T: dim(1, 64), tensor_parallel: option(2)):
    head: f32[12, 8] = weight("head")
    head_part: f32[12, 8] @ shard(0) = dist.shard(head, 0, [12])
    logits: f32[T, 12] @ shard(1) = aten.linear(x, head_part)
    logits_gathered: f32[T, 12] = dist.all_gather(logits, 1)
    {more}
    return {result}
"""
UNPADDED = "logits_unpadded: f32[T, 11] = aten.slice.Tensor(logits_gathered, -1, 0, 11)"
TAIL = "logits_unpadded: f32[T, 11] = aten.slice.Tensor(logits_gathered, -1, 1, 12)"
CAPPED = "logits_capped: f32[T, 12] = aten.tanh(logits_gathered)"


def gathered(more: str) -> ir.Graph:
    result = more.partition(":")[0] or "logits_gathered"
    return ir.parse(GATHERED.format(more=more, result=result).replace("    \n", ""))


@pytest.mark.parametrize(("more", "size"), [("", 12), (UNPADDED, 11), (TAIL, None), (CAPPED, None)])
def test_only_what_is_put_together_to_be_returned_stays_in_parts(more: str, size: int | None) -> None:
    graph = gathered(more)
    (step,) = passes.steps(graph, ["LogitsInParts"], check=True)
    text = ir.dump(step.graph)
    assert ir.dump(passes.run(ir.parse(text), ["LogitsInParts"])) == text, "what is in parts stays so"
    if size is None:
        assert text == ir.dump(graph) and not step.report.fused
        return
    assert f"vocabulary: option({size})" in text and text.rstrip().endswith("return logits")
    assert step.report.fused == ["logits_gathered"]
    assert "logits: f32[T, 6] = " in ir.dump(passes.run(step.graph, ["Localize"]))
    wrong = text.replace(f", vocabulary: option({size})", "")
    assert wrong != text
    with pytest.raises(fuseline.VerificationError, match="logits must be whole there: the graph returns it"):
        ir.verify(ir.parse(wrong))
