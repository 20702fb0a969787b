"""The engine: a request's tokens are the same alone, batched, in chunks, preempted, in any company and order."""

import math
import random

import numpy as np
import pytest
import torch
from fake_engine import (
    VOCAB,
    Interrupted,
    assert_all_as_alone,
    expected_logits,
    expected_output,
    make_engine,
    some_requests,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fuseline.ir.errors import InvalidRequestError, VerificationError
from fuseline.runtime.events import Stats
from fuseline.runtime.pool import PoolError
from fuseline.runtime.sequence import SamplingParams


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("max_step_tokens", [1, 2, 3, 5, 8, 64])
def test_any_chunking_gives_the_same_tokens(block_size, max_step_tokens):
    """Also with fewer tokens a step than there are sequences."""
    engine, _ = make_engine(400 // block_size, block_size, 4, max_step_tokens)
    requests = some_requests()
    ids = [engine.add(*request) for request in requests]
    assert_all_as_alone(engine, ids, requests, engine.run())
    assert engine.stats.preemptions == 0


@pytest.mark.parametrize("block_size", [1, 2, 5])
@pytest.mark.parametrize("max_step_tokens", [2, 7, 64])
def test_preemption_gives_the_same_tokens(block_size, max_step_tokens):
    """A pool for little more than the largest request: some lose their blocks and are computed again."""
    requests = some_requests(12)
    largest = max(len(prompt) + params.max_new_tokens - 1 for prompt, params in requests)
    engine, model = make_engine(-(-largest // block_size), block_size, 6, max_step_tokens)
    ids = [engine.add(*request) for request in requests]
    results = engine.run(lambda event: (model.forget_free_blocks(engine), engine.check_integrity()))
    assert engine.stats.preemptions > 0
    assert_all_as_alone(engine, ids, requests, results)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_and_time_of_arrival_gives_the_same_tokens(seed):
    source = random.Random(seed)
    requests = some_requests()
    source.shuffle(requests)
    engine, model = make_engine(14, 3, 5, source.choice([3, 9, 40]))
    ids, outputs, reasons = [], {}, {}
    while len(ids) < len(requests) or engine.has_work:
        if len(ids) < len(requests) and source.random() < 0.3:
            ids.append(engine.add(*requests[len(ids)]))
        for event in engine.step():
            outputs.setdefault(event.sequence_id, []).append(event.token)
            reasons[event.sequence_id] = event.finish_reason
        model.forget_free_blocks(engine)
        engine.check_integrity()
    expected = {number: expected_output(*request) for number, request in zip(ids, requests)}
    assert {number: (outputs[number], reasons[number]) for number in ids} == expected


class EngineMachine(RuleBasedStateMachine):
    """Adds, bad requests, aborts, scores and failures in any order; each request still gets its own tokens."""

    make = staticmethod(make_engine)

    @initialize(
        num_blocks=st.integers(1, 12), block_size=st.integers(1, 4), batch=st.integers(1, 5), budget=st.integers(1, 12)
    )
    def start(self, num_blocks, block_size, batch, budget):
        self.engine, self.model = self.make(num_blocks, block_size, batch, budget, max_seq_len=24)
        self.room = num_blocks * block_size
        self.requests, self.outputs, self.ended = {}, {}, {}

    def take(self, events):
        for event in events:
            assert event.sequence_id not in self.ended, "nothing comes after the end"
            self.outputs[event.sequence_id].append(event.token)
            if event.finish_reason is not None:
                self.ended[event.sequence_id] = event.finish_reason

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14),
        new=st.integers(1, 10),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        stops=st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
    )
    def add(self, prompt, new, temperature, seed, stops):
        params = SamplingParams(new, temperature, seed=seed, stop_token_ids=stops)
        if len(prompt) + new - 1 > self.room or len(prompt) + new > 24:
            with pytest.raises(InvalidRequestError):
                self.engine.add(prompt, params)
            return
        number = self.engine.add(prompt, params)
        assert number not in self.requests
        self.requests[number] = (prompt, params)
        self.outputs[number] = []

    @rule(prompt=st.sampled_from([[], [VOCAB], [-1], [True], [0, 1.0], "12", None, [1] * 25]))
    def add_bad(self, prompt):
        with pytest.raises(InvalidRequestError):
            self.engine.add(prompt, SamplingParams(1))

    @rule(times=st.integers(1, 5))
    def step(self, times):
        for _ in range(times):
            self.take(self.engine.step())
            self.accounts_sum()

    @rule(which=st.integers(0, 100))
    def abort(self, which):
        if not self.requests:
            assert not self.engine.abort(which)
            return
        number = sorted(self.requests)[which % len(self.requests)]
        assert self.engine.abort(number) == (number not in self.ended)
        assert not self.engine.abort(number)
        if number not in self.ended:
            # What it had generated is the beginning of what it would have.
            output, _ = expected_output(*self.requests[number])
            assert self.outputs[number] == output[: len(self.outputs[number])]
            del self.requests[number]

    @rule(prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), max_size=3))
    def score(self, prompts):
        if max(map(len, prompts), default=0) > self.room:
            with pytest.raises(InvalidRequestError):
                self.engine.score(prompts)
            return
        for prompt, scores in zip(prompts, self.engine.score(prompts), strict=True):
            expected = torch.stack([expected_logits(prompt[: stop + 1]) for stop in range(len(prompt))])
            assert torch.equal(scores, expected)

    @rule()
    def fail(self):
        if not self.engine.has_work:
            return
        self.model.failing = True
        with pytest.raises(Interrupted):
            self.engine.step()
        self.model.failing = False
        assert not self.engine.has_work
        assert self.engine.pool.num_free == self.engine.pool.num_blocks
        self.requests = {number: self.requests[number] for number in self.ended if number in self.requests}

    @invariant()
    def accounts_sum(self):
        self.engine.check_integrity()
        self.model.forget_free_blocks(self.engine)

    def teardown(self):
        self.engine.run(lambda event: self.take([event]))
        self.engine.check_integrity()
        assert self.engine.pool.num_free == self.engine.pool.num_blocks
        for number, request in self.requests.items():
            assert (self.outputs[number], self.ended[number]) == expected_output(*request)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_a_stop_token_is_the_last_token_returned():
    engine, _ = make_engine()
    output, _ = expected_output([1, 2, 3], SamplingParams(20))
    stop = output[4]
    number = engine.add([1, 2, 3], SamplingParams(20, stop_token_ids=(stop, VOCAB + 5)))
    sequence = engine.run()[number]
    assert sequence.output == output[: output.index(stop) + 1]
    assert sequence.finish_reason == "stop"


def test_a_request_without_seed_is_random_but_survives_preemption():
    """Its seed is fixed when it is added: what was generated before a preemption stays what it was."""
    engine, _ = make_engine(8, 2, 4)
    params = SamplingParams(12, temperature=5.0)
    ids = [engine.add([1, 2, 3], params) for _ in range(4)]
    results = engine.run()
    assert engine.stats.preemptions > 0
    assert len({tuple(results[number].output) for number in ids}) == 4
    for sequence in results.values():
        assert sequence.params.seed is not None
        assert sequence.output == expected_output(sequence.prompt, sequence.params)[0]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, r"prompt is empty: pass"),
        ([1, 2, 2.0], {}, r"prompt\[2\] is 2\.0 of type float: pass"),
        ([1, True], {}, r"prompt\[1\] is True of type bool: pass"),
        ([np.int64(3)], {}, r"prompt\[0\] .* of type int64: pass"),
        ([0, VOCAB], {}, r"prompt\[1\] is 13, outside the vocabulary: pass ids in \[0, 13\)"),
        ([-1], {}, r"prompt\[0\] is -1, outside the vocabulary"),
        ("hello", {}, r"prompt is of type str: pass"),
        (torch.tensor([1, 2]), {}, r"prompt is of type Tensor: pass"),
        ([1] * 90, {"max_new_tokens": 11}, r"90 tokens and max_new_tokens=11 make 101, but max_seq_len is 100"),
        ([1] * 30, {"max_new_tokens": 12}, r"needs 11 blocks .* for 41 tokens, but the pool has 10"),
        ([1], {"temperature": math.nan}, r"SamplingParams\.temperature is nan: pass"),
        ([1], {"max_new_tokens": 0}, r"SamplingParams\.max_new_tokens is 0: pass"),
    ],
)
def test_a_bad_request_is_refused_and_leaves_the_others_alone(prompt, params, message):
    """In the middle of other requests' work: their tokens, the ids and the pool are as if it had never come."""
    engine, _ = make_engine(num_blocks=10, max_step_tokens=3)
    good = ([5, 6, 7, 8, 9], SamplingParams(30, temperature=1.0, seed=3))
    first = engine.add(*good)
    for _ in range(4):
        engine.step()
    free, stats = engine.pool.num_free, engine.stats
    with pytest.raises(InvalidRequestError, match=message):
        engine.add(prompt, SamplingParams(**params))
    assert (engine.pool.num_free, engine.stats) == (free, stats)
    second = engine.add([4], SamplingParams(3))
    assert second == first + 1
    assert_all_as_alone(engine, [first, second], [good, ([4], SamplingParams(3))], engine.run())


def test_limits_are_met_exactly():
    """The largest request that each limit allows is served: the last token generated needs no room in the cache."""
    engine, _ = make_engine(num_blocks=10, block_size=4, max_seq_len=50)
    exact = ([1] * 30, SamplingParams(11))
    number = engine.add(*exact)
    assert_all_as_alone(engine, [number], [exact], engine.run())
    engine, _ = make_engine(num_blocks=64, max_seq_len=50)
    exact = ([1] * 39, SamplingParams(11))
    number = engine.add(*exact)
    assert_all_as_alone(engine, [number], [exact], engine.run())
    with pytest.raises(InvalidRequestError, match="params is of type dict"):
        engine.add([1], {"max_new_tokens": 3})


def test_the_prompt_is_copied():
    """A caller who reuses the list must not change a request in flight."""
    engine, _ = make_engine(max_step_tokens=2)
    prompt = [1, 2, 3, 4, 5]
    number = engine.add(prompt, SamplingParams(4))
    engine.step()
    prompt[:] = [0, 0]
    assert_all_as_alone(engine, [number], [([1, 2, 3, 4, 5], SamplingParams(4))], engine.run())


@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_a_failing_model_ends_the_requests_and_leaves_the_engine_usable(steps_before):
    engine, model = make_engine(12, 4, 3, 5)
    for request in some_requests(4, seed=8):
        engine.add(*request)
    for _ in range(steps_before):
        engine.step()
    model.failing = True
    with pytest.raises(Interrupted):
        engine.run()
    assert not engine.has_work
    assert engine.pool.num_free == engine.pool.num_blocks
    engine.check_integrity()
    model.failing = False
    requests = some_requests(4, seed=9)
    ids = [engine.add(*request) for request in requests]
    assert_all_as_alone(engine, ids, requests, engine.run())


def test_logits_that_are_not_finite_raise_and_release_everything():
    engine, model = make_engine()
    engine._runner.model = lambda step: model(step) * math.nan
    engine.add([1, 2], SamplingParams(3))
    with pytest.raises(VerificationError, match="NaN or infinity"):
        engine.run()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine.has_work


@pytest.mark.parametrize("max_step_tokens", [1, 4, 64])
def test_scores_in_the_middle_of_serving(max_step_tokens):
    """Scores are those of each prefix, and the requests whose blocks they took end as if nothing had happened."""
    engine, model = make_engine(8, 4, 3, max_step_tokens)
    requests = some_requests(3, seed=4)
    ids = [engine.add(*request) for request in requests]
    for _ in range(3):
        engine.step()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [3], [4, 5], [9] * 32]
    for prompt, scores in zip(prompts, engine.score(prompts), strict=True):
        expected = torch.stack([expected_logits(prompt[: stop + 1]) for stop in range(len(prompt))])
        assert torch.equal(scores, expected)
    model.failing = True
    with pytest.raises(Interrupted):
        engine.score(prompts)
    model.failing = False
    assert engine.pool.num_free == engine.pool.num_blocks
    assert engine.score([]) == []
    assert_all_as_alone(engine, ids, requests, engine.run())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], r"prompts\[1\] is empty"),
        ([[1], [2], [VOCAB]], r"prompts\[2\]\[0\] is 13, outside"),
        ([[1] * 101], r"prompts\[0\] has 101 tokens, but max_seq_len is 100"),
        ([[1] * 41], r"prompts\[0\] needs 11 blocks"),
    ],
)
def test_a_bad_prompt_to_score_is_named(prompts, message):
    engine, model = make_engine(num_blocks=10)
    with pytest.raises(InvalidRequestError, match=message):
        engine.score(prompts)
    assert not model.steps


def test_rows_are_asked_for_only_where_a_token_is_chosen():
    """The head of the model runs on those rows: a prefill in three chunks needs one row of it."""
    engine, model = make_engine(max_step_tokens=4)
    engine.add(list(range(10)), SamplingParams(3))
    engine.run()
    assert [len(step.rows) for step in model.steps] == [0, 0, 1, 1, 1]
    assert [len(step.tokens) for step in model.steps] == [4, 4, 2, 1, 1]
    assert engine.stats == Stats(steps=5, tokens=3, preemptions=0, prefill_tokens=10, decode_tokens=2)


def test_block_tables_come_in_few_widths():
    """As wide as the longest of the step needs, rounded up to 8; blocks kept for later chunks do not count."""
    engine, model = make_engine(block_size=1, max_step_tokens=10, max_batch_size=2)
    engine.add([1] * 40, SamplingParams(2))
    engine.run()
    assert [step.block_tables.shape[1] for step in model.steps] == [16, 24, 32, 40, 48]


def test_callbacks_may_add_and_abort():
    engine, _ = make_engine(max_batch_size=2)
    first, victim = engine.add([1], SamplingParams(4)), engine.add([2], SamplingParams(50))
    added = []

    def on_event(event):
        if event.sequence_id == first and event.finish_reason:
            engine.abort(victim)
            added.append(engine.add([3], SamplingParams(2)))

    results = engine.run(on_event)
    assert sorted(results) == [first, *added]
    assert engine.pool.num_free == engine.pool.num_blocks
    assert engine.run() == {}


def test_integrity_check_sees_a_lost_block_and_a_lost_request():
    """The checks that other tests rely on can fail."""
    engine, _ = make_engine()
    engine.add([1] * 9, SamplingParams(5))
    engine.step()
    engine.check_integrity()
    block = engine.scheduler.running[0].block_table.pop()
    with pytest.raises(PoolError, match=f"block {block}"):
        engine.check_integrity()
    engine.pool.free([block])
    with pytest.raises(PoolError, match="too few blocks"):
        engine.check_integrity()
    engine.scheduler.clear()
    with pytest.raises(PoolError, match="order of arrival"):
        engine.check_integrity()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_reach_a_gpu_whole():
    """The copies from pinned memory are not waited for: none may be read, or reused, before it has landed."""
    engine, model = make_engine(14, 3, 5, 7, device="cuda")
    requests = some_requests(12)
    ids = [engine.add(*request) for request in requests]
    assert_all_as_alone(engine, ids, requests, engine.run())
    assert all(step.tokens.is_cuda and step.block_tables.is_cuda for step in model.steps)
