"""Every block of the KV cache is free or owned, never both, never neither."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fuseline.runtime.pool import BlockPool, PoolError


class PoolMachine(RuleBasedStateMachine):
    """A pool against tables kept by hand: a block handed out twice or lost breaks an invariant."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks, block_size):
        self.pool = BlockPool(num_blocks, block_size)
        self.tables = []

    @rule(n=st.integers(0, 13))
    def allocate(self, n):
        free = self.pool.num_free
        assert self.pool.can_allocate(n) == (n <= free)
        if n > free:
            with pytest.raises(PoolError, match="cannot allocate"):
                self.pool.allocate(n)
            assert self.pool.num_free == free
        else:
            self.tables.append(self.pool.allocate(n))
            assert len(self.tables[-1]) == n

    @rule(which=st.integers(0, 100))
    def free(self, which):
        if self.tables:
            self.pool.free(self.tables.pop(which % len(self.tables)))

    @invariant()
    def accounts_sum(self):
        owned = [block for table in self.tables for block in table]
        assert len(set(owned)) == len(owned)
        assert self.pool.num_free + len(owned) == self.pool.num_blocks
        self.pool.check_integrity(self.tables)

    def teardown(self):
        for table in self.tables:
            self.pool.free(table)
        assert sorted(self.pool.allocate(self.pool.num_blocks)) == list(range(self.pool.num_blocks))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("blocks", [[0, 0], [3], [-1], [4]])
def test_freeing_what_is_not_owned_is_an_error(blocks):
    """Freed twice, never handed out, or no block at all: each would hand one block to two sequences later."""
    pool = BlockPool(4, 2)
    assert pool.allocate(1) == [0]
    with pytest.raises(PoolError, match="freed but not owned"):
        pool.free(blocks)


def test_integrity_sees_each_kind_of_broken_account():
    """A leak, a block in two tables, a live block that is free, a block that does not exist, a stale mark."""
    pool = BlockPool(4, 2)
    first, second = pool.allocate(2), pool.allocate(1)
    pool.check_integrity([first, second])
    for tables in ([first], [first, first, second], [first, second, [3]], [first, second, [9]], [first, second, [-1]]):
        with pytest.raises(PoolError):
            pool.check_integrity(tables)
    pool._owned[3] = 1
    with pytest.raises(PoolError, match="marked as owned"):
        pool.check_integrity([first, second])


def test_blocks_for_rounds_up():
    pool = BlockPool(4, 3)
    assert [pool.blocks_for(n) for n in (0, 1, 3, 4, 6, 7)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (-1, 4)])
def test_empty_pool_is_refused(shape):
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(*shape)
