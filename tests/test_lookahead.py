"""An engine that launches each step before it knows the tokens of the last: everything that holds without it holds.

``ahead`` looks ahead, ``padded`` pads steps that only decode, ``both`` does both. The model is that of ``fake_engine``.
"""

import math
import random

import fake_engine
import pytest
import torch
from fake_engine import VOCAB, FakeModel, Interrupted, assert_all_as_alone, expected_output, some_requests
from hypothesis import settings
from hypothesis.stateful import rule
from test_engine import EngineMachine

from fuseline.ir.errors import VerificationError
from fuseline.runtime.choices import Pending
from fuseline.runtime.decode import DecodeSteps
from fuseline.runtime.engine import Engine
from fuseline.runtime.events import Stats
from fuseline.runtime.sequence import SamplingParams
from fuseline.runtime.static_step import StaticStep
from fuseline.runtime.step import StepInput
from fuseline.runtime.tables import table_width
from fuseline.runtime.vocabulary import Vocabulary

MODES = ("ahead", "padded", "both")


def without_padding(model, scratch, block_size):
    """The model on static inputs: rows of padding must be where they do no harm, and get NaN."""

    def forward(step, logits):
        real = int((step.slots < scratch).sum())
        assert (step.slots[real:] == scratch).all() and (step.slots[:real] < scratch).all()
        assert (step.context_lens[real:] == 1).all() and (step.block_tables[real:, 0] == scratch // block_size).all()
        rows = {name: value[: real + (name == "query_starts")] for name, value in vars(step).items()}
        logits[real:] = math.nan
        logits[:real] = model(StepInput(**{name: value.clone() for name, value in rows.items()}))

    return forward


def make_engine(
    num_blocks=64, block_size=4, max_batch_size=8, max_step_tokens=64, max_seq_len=100, *, mode="both", device="cpu"
):
    model = FakeModel(num_blocks, block_size)
    decode, vocabulary = None, Vocabulary(VOCAB, device)
    if mode != "ahead":
        width = table_width(max_seq_len, block_size)
        static = StaticStep(max_batch_size, width, block_size, num_blocks, torch.device(device), vocabulary)
        logits = torch.full((max_batch_size, VOCAB), math.nan, device=device)
        decode = DecodeSteps(
            without_padding(model, num_blocks * block_size, block_size), static, max_batch_size, logits
        )
    engine = Engine(
        model,
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        max_step_tokens=max_step_tokens,
        vocabulary=vocabulary,
        device=device,
        decode=decode,
        lookahead=mode != "padded",
    )
    return engine, model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("max_step_tokens", [1, 2, 3, 8, 64])
def test_any_chunking_gives_the_same_tokens(block_size, max_step_tokens, mode):
    engine, _ = make_engine(400 // block_size, block_size, 4, max_step_tokens, mode=mode)
    requests = some_requests()
    ids = [engine.add(*request) for request in requests]
    assert_all_as_alone(engine, ids, requests, engine.run())
    assert engine.stats.preemptions == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [1, 2, 5])
@pytest.mark.parametrize("max_step_tokens", [2, 7, 64])
def test_preemption_with_a_token_under_way_gives_the_same_tokens(block_size, max_step_tokens, mode):
    requests = some_requests(12)
    largest = max(len(prompt) + params.max_new_tokens - 1 for prompt, params in requests)
    engine, model = make_engine(-(-largest // block_size), block_size, 6, max_step_tokens, mode=mode)
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


class AheadMachine(EngineMachine):
    make = staticmethod(make_engine)

    @rule()
    def fail(self):
        """A step that was launched already is not hurt; the next one that is launched ends every request."""
        self.model.failing = True
        try:
            while self.engine.has_work:
                self.take(self.engine.step())
        except Interrupted:
            assert not self.engine.has_work
        self.model.failing = False
        assert self.engine.pool.num_free == self.engine.pool.num_blocks
        self.requests = {number: self.requests[number] for number in self.ended if number in self.requests}


TestAheadMachine = AheadMachine.TestCase
TestAheadMachine.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)


def test_a_step_is_launched_before_the_tokens_of_the_last_are_waited_for(monkeypatch):
    """And no more than one: the host is one step ahead, never two."""
    engine, model = make_engine()
    launched, wait = [], Pending.wait
    monkeypatch.setattr(Pending, "wait", lambda self: (launched.append(len(model.steps)), wait(self))[1])
    engine.add([1, 2, 3], SamplingParams(5))
    engine.run()
    assert launched == [2, 3, 4, 5, 5]


@pytest.mark.parametrize("new", [1, 2, 7])
def test_the_most_new_tokens_are_never_overrun(new):
    """How long a request may be is known ahead: it takes as many steps as without looking ahead."""
    engine, model = make_engine()
    engine.add([1, 2, 3], SamplingParams(new))
    engine.run()
    assert len(model.steps) == new
    assert engine.stats == Stats(steps=new, tokens=new, preemptions=0, prefill_tokens=3, decode_tokens=new - 1)


def test_a_stop_token_is_found_one_step_late_and_nothing_shows():
    """The surplus token is dropped and not counted, and its blocks are free as soon as the stop is known."""
    output, _ = expected_output([1, 2, 3], SamplingParams(20))
    stop = output[4]
    count = output.index(stop) + 1
    engine, model = make_engine(block_size=1)
    number = engine.add([1, 2, 3], SamplingParams(20, stop_token_ids=(stop,)))
    events = []
    while engine.has_work:
        events += engine.step()
    assert [event.token for event in events] == output[:count]
    assert [event.finish_reason for event in events] == [None] * (count - 1) + ["stop"]
    assert len(model.steps) == count + 1
    assert engine.stats == Stats(count + 1, count, 0, prefill_tokens=3, decode_tokens=count - 1)
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine.abort(number)
    assert engine.step() == []


def test_logits_of_a_surplus_token_may_be_anything():
    """What a model makes of the tokens after the end is nobody's business; what it makes of others is."""
    output, _ = expected_output([1, 2, 3], SamplingParams(20))
    engine, model = make_engine(mode="ahead")
    after = output.index(output[3]) + 1
    engine._runner.model = lambda step: model(step) * (math.nan if len(model.steps) > after else 1)
    number = engine.add([1, 2, 3], SamplingParams(20, stop_token_ids=(output[3],)))
    other = engine.add([4] * 20, SamplingParams(1))
    assert sorted(engine.run()) == [number, other]
    engine.add([1], SamplingParams(2))
    with pytest.raises(VerificationError, match="NaN or infinity"):
        engine.run()
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine.has_work


def test_an_abort_drops_the_token_under_way_and_leaves_the_others_alone():
    engine, model = make_engine(10, 4, 4)
    requests = [([1, 2, 3], SamplingParams(9)), ([4], SamplingParams(9)), ([5, 6], SamplingParams(9))]
    ids = [engine.add(*request) for request in requests]
    engine.step()
    assert engine.abort(ids[1]) and not engine.abort(ids[1])
    engine.check_integrity()
    model.forget_free_blocks(engine)
    late = ([7, 8, 9], SamplingParams(6))
    ids[1], requests[1] = engine.add(*late), late
    results = engine.run(lambda event: engine.check_integrity())
    assert_all_as_alone(engine, ids, requests, results)
    only = engine.add([1], SamplingParams(9))
    engine.step()
    assert engine.abort(only)
    assert not engine.has_work and engine.step() == []


def test_a_request_whose_last_token_is_under_way_can_be_aborted():
    """It is out of the scheduler by then, and its blocks may be others' already."""
    engine, _ = make_engine()
    number = engine.add([1, 2], SamplingParams(2))
    engine.step()
    assert engine.pool.num_free == engine.pool.num_blocks
    engine.check_integrity()
    assert engine.abort(number)
    assert not engine.has_work
    engine.check_integrity()


@pytest.mark.parametrize("steps_before", [0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_a_failing_model_ends_the_requests_and_leaves_the_engine_usable(steps_before, mode):
    engine, model = make_engine(12, 4, 3, 5, mode=mode)
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


@pytest.mark.parametrize("max_step_tokens", [1, 4, 64])
def test_scores_with_a_step_under_way(max_step_tokens):
    """The tokens under way are still taken from the device when their sequences are computed again."""
    engine, _ = make_engine(8, 4, 3, max_step_tokens)
    requests = some_requests(3, seed=4)
    ids = [engine.add(*request) for request in requests]
    for _ in range(3):
        engine.step()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [3], [4, 5], [9] * 32]
    for prompt, scores in zip(prompts, engine.score(prompts), strict=True):
        expected = torch.stack([fake_engine.expected_logits(prompt[: stop + 1]) for stop in range(len(prompt))])
        assert torch.equal(scores, expected)
    assert_all_as_alone(engine, ids, requests, engine.run())


@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_those_of_one_step_after_the_other(mode):
    """Without preemptions: the same tokens, computed the same way, whatever stops when."""
    counts = []
    for make in (fake_engine.make_engine, lambda: make_engine(mode=mode)):
        engine, _ = make()
        for request in some_requests(8, seed=2):
            engine.add(*request)
        engine.run()
        counts.append((engine.stats.tokens, engine.stats.prefill_tokens, engine.stats.decode_tokens))
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_steps_reach_a_gpu_whole(mode):
    """Copies to and from pinned memory are not waited for: none may be read, or reused, before it has landed."""
    engine, _ = make_engine(14, 3, 5, 7, mode=mode, device="cuda")
    requests = some_requests(12)
    ids = [engine.add(*request) for request in requests]
    assert_all_as_alone(engine, ids, requests, engine.run())
