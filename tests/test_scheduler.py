"""Scheduling: first come first served, no step over its budget, no sequence starved or stuck."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fuseline.runtime.pool import BlockPool, PoolError
from fuseline.runtime.scheduler import Scheduler
from fuseline.runtime.sequence import SamplingParams, Sequence


def make_sequence(number, prompt, new):
    return Sequence(number, [0] * prompt, SamplingParams(max_new_tokens=new))


def max_cached(sequence):
    """The last token generated is never fed back."""
    return len(sequence.prompt) + sequence.params.max_new_tokens - 1


def compute(scheduler, chunks):
    """What an engine does with the chunks of a step; the sequences that ended."""
    ended = []
    for chunk in chunks:
        sequence, last = chunk.sequence, chunk.reaches_end
        sequence.num_computed += chunk.length
        if last:
            sequence.append(0)
            if sequence.finish_reason is not None:
                scheduler.remove(sequence)
                ended.append(sequence)
    return ended


class SchedulerMachine(RuleBasedStateMachine):
    """Any sequences, any sizes: each step is checked for what the scheduler promises."""

    @initialize(
        num_blocks=st.integers(1, 10), block_size=st.integers(1, 4), batch=st.integers(1, 5), budget=st.integers(1, 12)
    )
    def start(self, num_blocks, block_size, batch, budget):
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, batch, budget)
        self.live = []
        self.count = 0

    @rule(prompt=st.integers(1, 16), new=st.integers(1, 12))
    def add(self, prompt, new):
        sequence = make_sequence(self.count, prompt, new)
        if self.pool.blocks_for(max_cached(sequence)) <= self.pool.num_blocks:
            self.count += 1
            self.live.append(sequence)
            self.scheduler.add(sequence)

    @rule(which=st.integers(0, 100))
    def remove(self, which):
        if self.live:
            self.scheduler.remove(self.live.pop(which % len(self.live)))

    @rule()
    def preempt_all(self):
        self.scheduler.preempt_all()
        assert self.pool.num_free == self.pool.num_blocks

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.one_step()
            self.accounts_sum()

    def one_step(self):
        scheduler = self.scheduler
        before = list(scheduler.running)
        preemptions = scheduler.num_preemptions
        chunks = scheduler.schedule()
        scheduled = [chunk.sequence for chunk in chunks]
        victims = [sequence for sequence in before if sequence not in scheduler.running]

        assert bool(chunks) == bool(self.live), "a step with work does something"
        if chunks:
            assert scheduled[0] is self.live[0], "the first to arrive always advances"
        assert scheduled == scheduler.running[: len(chunks)], "one chunk a sequence, in order of arrival"
        assert len(scheduler.running) <= scheduler.max_batch_size
        used = sum(chunk.length for chunk in chunks)
        assert used <= scheduler.max_step_tokens
        if used < scheduler.max_step_tokens:
            assert scheduled == scheduler.running, "nobody running is left out while there is budget"
            assert all(chunk.reaches_end for chunk in chunks), "nor cut short"
        for chunk in chunks:
            assert chunk.length >= 1
            assert chunk.start == chunk.sequence.num_computed
            assert len(chunk.sequence.block_table) * self.pool.block_size >= chunk.stop
        is_prefill = [chunk.sequence.num_pending > 1 for chunk in chunks if chunk.sequence in before]
        assert is_prefill == sorted(is_prefill), "decodes come first"

        assert scheduler.num_preemptions == preemptions + len(victims)
        for victim in victims:
            assert all(victim.id > sequence.id for sequence in scheduler.running), "only later ones are preempted"
            assert not victim.block_table and not victim.num_computed
        if victims:
            assert set(scheduled) <= set(before), "nobody is admitted while others lose their blocks"
        for sequence in compute(scheduler, chunks):
            self.live.remove(sequence)

    @invariant()
    def accounts_sum(self):
        assert [*self.scheduler.running, *self.scheduler.waiting] == self.live, "order of arrival"
        self.pool.check_integrity(sequence.block_table for sequence in self.live)
        assert not any(sequence.block_table for sequence in self.scheduler.waiting)

    def teardown(self):
        # Each pass over the loop computes at least one token of the first sequence: more would mean no progress.
        limit = sum(max_cached(sequence) for sequence in self.live)
        for _ in range(limit):
            self.one_step()
        assert not self.live and not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


def lengths(chunks):
    return [(chunk.sequence.id, chunk.start, chunk.length) for chunk in chunks]


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks():
    """A long prompt must not stall those who are decoding: it gets what they leave of each step."""
    scheduler = Scheduler(BlockPool(32, 4), 8, 6)
    for number, prompt in enumerate((2, 2, 13)):
        scheduler.add(make_sequence(number, prompt, 8))
    steps = []
    for _ in range(5):
        chunks = scheduler.schedule()
        steps.append(lengths(chunks))
        compute(scheduler, chunks)
    assert steps == [
        [(0, 0, 2), (1, 0, 2), (2, 0, 2)],
        [(0, 2, 1), (1, 2, 1), (2, 2, 4)],
        [(0, 3, 1), (1, 3, 1), (2, 6, 4)],
        [(0, 4, 1), (1, 4, 1), (2, 10, 3)],
        [(0, 5, 1), (1, 5, 1), (2, 13, 1)],
    ]


def test_the_latest_gives_way_and_is_computed_again_with_its_output():
    """Preemption frees the last to arrive, which comes back with prompt and output as one prefill."""
    scheduler = Scheduler(BlockPool(6, 2), 4, 16)
    first, second = make_sequence(0, 4, 8), make_sequence(1, 4, 4)
    scheduler.add(first)
    scheduler.add(second)
    compute(scheduler, scheduler.schedule())
    compute(scheduler, scheduler.schedule())
    compute(scheduler, scheduler.schedule())
    assert lengths(scheduler.schedule()) == [(0, 6, 1)]
    assert list(scheduler.waiting) == [second]
    assert scheduler.num_preemptions == 1
    while first.finish_reason is None:
        compute(scheduler, scheduler.schedule())
    assert lengths(scheduler.schedule()) == [(1, 0, 7)]


def test_admission_leaves_room_for_the_next_decodes():
    """A prefill that exactly fills the pool would be thrown away at the next block a decode needs."""
    scheduler = Scheduler(BlockPool(4, 2), 4, 16)
    scheduler.add(make_sequence(0, 3, 3))
    compute(scheduler, scheduler.schedule())
    scheduler.add(make_sequence(1, 4, 2))
    while scheduler.has_work:
        compute(scheduler, scheduler.schedule())
    assert scheduler.num_preemptions == 0


def test_a_sequence_that_outgrows_the_pool_is_an_error_not_a_hang():
    scheduler = Scheduler(BlockPool(2, 2), 4, 16)
    scheduler.add(make_sequence(0, 5, 1))
    with pytest.raises(PoolError, match="even alone"):
        scheduler.schedule()
    scheduler.clear()
    scheduler.add(make_sequence(1, 4, 4))
    compute(scheduler, scheduler.schedule())
    with pytest.raises(PoolError, match="even alone"):
        scheduler.schedule()


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_empty_steps_are_refused(limits):
    with pytest.raises(ValueError, match="pass >= 1"):
        Scheduler(BlockPool(1, 1), *limits)
