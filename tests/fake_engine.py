"""An engine whose model is a stand-in: its logits are a hash of what it reads back from a simulated KV cache.

It reads through the block tables, so a wrong slot, table entry, position, length or row changes the tokens.
"""

import hashlib
import random

import numpy as np
import torch

from fuseline.runtime.engine import Engine
from fuseline.runtime.sampler import sample
from fuseline.runtime.sequence import SamplingParams
from fuseline.runtime.vocabulary import Vocabulary

VOCAB = 13


def logits_of(tokens):
    """Logits [V] after ``tokens``, a list of (token, position): any difference in any entry gives others."""
    digest = hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).normal(size=VOCAB)


class Interrupted(Exception):
    """A model that fails."""


class FakeModel:
    """Writes (token, position) of each token to its slot; reads them back for the wanted rows."""

    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.cache = np.full((num_blocks * block_size, 2), -1, np.int64)
        self.failing = False
        self.steps = []

    def forget_free_blocks(self, engine):
        """Poison what no running sequence owns: a stale block that is read again must not look right."""
        owned = [block for sequence in engine.scheduler.running for block in sequence.block_table]
        stale = np.setdiff1d(np.arange(len(self.cache) // self.block_size), owned)
        self.cache.reshape(-1, self.block_size, 2)[stale] = -1

    def __call__(self, step):
        self.steps.append(step)
        total, count = len(step.tokens), len(step.context_lens)
        assert [tensor.dtype for tensor in (step.tokens, step.positions, step.slots, step.rows)] == [torch.int64] * 4
        for tensor in (step.query_starts, step.context_lens, step.block_tables):
            assert tensor.dtype == torch.int32
        assert len(step.positions) == len(step.slots) == len(set(step.slots.tolist())) == total
        starts = step.query_starts.cpu().numpy()
        assert len(starts) == count + 1 == len(step.block_tables) + 1
        assert starts[0] == 0 and starts[-1] == total

        self.cache[step.slots.cpu().numpy()] = torch.stack((step.tokens, step.positions), 1).cpu().numpy()
        if self.failing:
            raise Interrupted
        tables = step.block_tables.cpu().numpy()
        logits = np.zeros((len(step.rows), VOCAB))
        for index, row in enumerate(step.rows.tolist()):
            owner = int(np.searchsorted(starts, row, side="right")) - 1
            length = int(step.context_lens[owner]) - (int(starts[owner + 1]) - 1 - row)
            known = np.arange(length)
            slots = tables[owner, known // self.block_size].astype(np.int64) * self.block_size
            logits[index] = logits_of(self.cache[slots + known % self.block_size])
        return torch.from_numpy(logits).float().to(step.tokens.device)


def expected_logits(tokens):
    return torch.from_numpy(logits_of(list(zip(tokens, range(len(tokens)))))).float()


def expected_output(prompt, params):
    """The request without cache, engine or batch: the model's definition and the sampler, token by token."""
    output = []
    while len(output) < params.max_new_tokens:
        row = expected_logits(list(prompt) + output)[None]
        output += sample(row, [params], [len(output)])
        if output[-1] in params.stop_token_ids:
            return output, "stop"
    return output, "length"


def make_engine(num_blocks=64, block_size=4, max_batch_size=8, max_step_tokens=64, max_seq_len=100, device="cpu"):
    model = FakeModel(num_blocks, block_size)
    engine = Engine(
        model,
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        max_step_tokens=max_step_tokens,
        vocabulary=Vocabulary(VOCAB, device),
        device=device,
    )
    return engine, model


def some_requests(count=9, seed=0):
    """Greedy and sampled, short and long, with and without stop tokens."""
    source = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = [source.randrange(VOCAB) for _ in range(source.choice([1, 2, 3, 7, 11, 19]))]
        sampled = {"temperature": 1.5, "seed": number, "top_k": source.choice([None, 5])} if number % 2 else {}
        stop = (number,) if number % 3 == 0 else ()
        requests.append((prompt, SamplingParams(source.randrange(1, 24), stop_token_ids=stop, **sampled)))
    return requests


def assert_all_as_alone(engine, ids, requests, results):
    assert sorted(results) == sorted(ids)
    for number, (prompt, params) in zip(ids, requests):
        sequence = results[number]
        assert (sequence.output, sequence.finish_reason) == expected_output(prompt, params)
        assert sequence.prompt == prompt
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine.has_work
