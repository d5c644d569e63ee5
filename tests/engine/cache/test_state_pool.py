"""The pool of state slots."""

from __future__ import annotations

import pytest

from helexa_engine.cache.state_pool import StatePool


def test_gives_each_slot_once_and_refuses_a_double_free() -> None:
    pool = StatePool(2)
    slots = [pool.allocate(), pool.allocate()]
    assert sorted(slots) == [0, 1] and pool.num_free == 0 and pool.num_used == 2
    with pytest.raises(AssertionError, match="all 2 state slots are taken"):
        pool.allocate()
    pool.release(slots[0])
    assert pool.num_free == 1 and pool.num_used == 1
    with pytest.raises(AssertionError, match="is not held"):
        pool.release(slots[0])
    assert pool.allocate() == slots[0]


def test_slots_may_begin_behind_those_of_another_pool() -> None:
    pool = StatePool(2, first=5)
    assert {pool.allocate(), pool.allocate()} == {5, 6} and pool.num_free == 0
