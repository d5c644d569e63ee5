"""The tree of cached prefixes: exact tokens, shared pages, least recently used first."""

from __future__ import annotations

import pytest

from helexa_engine.cache.page_pool import PagePool
from helexa_engine.cache.prefix_cache import Node, PrefixCache, extend_keys
from helexa_engine.cache.state_pool import StatePool

PAGE = 4


def keys_of(tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, len(tokens) // PAGE, PAGE)
    return keys


def compute(cache: PrefixCache, tokens: list[int]) -> tuple[Node, list[int]]:
    """What a sequence does: begins with what is there, computes the rest and keeps it. It holds its pages."""
    keys = keys_of(tokens)
    node = cache.match(keys)
    pages = cache.take(node)
    missing = len(keys) - len(pages)
    cache.evict(max(0, missing - cache.pool.num_free))
    pages += cache.pool.allocate(missing)
    return cache.keep(node, keys, pages), pages


def depth_of(cache: PrefixCache, tokens: list[int]) -> int:
    return cache.match(keys_of(tokens)).depth


def save(cache: PrefixCache, node: Node) -> int:
    slot = cache.take_snapshot_slot()
    assert slot is not None
    cache.keep_snapshot(node, slot)
    return slot


def test_a_prefix_is_found_by_its_tokens_alone() -> None:
    cache = PrefixCache(PagePool(8))
    _, pages = compute(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert depth_of(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9]) == 2
    assert depth_of(cache, [1, 2, 3, 4, 5, 6, 7, 9]) == 1, "a page counts whole or not at all"
    assert depth_of(cache, [1, 2, 3]) == 0
    assert depth_of(cache, [5, 6, 7, 8]) == 0, "the same page behind other tokens is another"
    assert depth_of(cache, [1, 2, 3, 4 + 2**16]) == 0
    cache.pool.release(pages)
    assert (cache.pool.num_used, cache.pool.num_idle, cache.pool.num_free, cache.pool.num_available) == (0, 2, 6, 8)


def test_branches_share_the_pages_before_them() -> None:
    cache = PrefixCache(PagePool(8))
    _, first = compute(cache, [1, 1, 1, 1, 2, 2, 2, 2])
    _, second = compute(cache, [1, 1, 1, 1, 3, 3, 3, 3])
    assert first[0] == second[0] and first[1] != second[1]
    assert cache.pool.num_used == 3 and cache.pool.references(first[0]) == 3
    cache.pool.release(first)
    assert (cache.pool.num_used, cache.pool.num_idle) == (2, 1)
    assert cache.num_idle(cache.match(keys_of([1, 1, 1, 1, 2, 2, 2, 2]))) == 1


def test_two_that_computed_the_same_go_on_with_one_page() -> None:
    cache = PrefixCache(PagePool(8))
    keys, pages = keys_of([1] * 8), [cache.pool.allocate(2), cache.pool.allocate(2)]
    kept = [cache.keep(cache.root, keys, own) for own in pages]
    assert kept[0] is kept[1] and pages[0] == pages[1]
    assert (cache.pool.num_used, cache.pool.num_free) == (2, 6)
    for own in pages:
        cache.pool.release(own)
    cache.evict(2)
    assert cache.pool.num_free == 8


def test_the_least_recently_used_page_goes_first_and_no_page_before_those_after_it() -> None:
    cache = PrefixCache(PagePool(6))
    for tokens in ([1] * 8, [2] * 8, [3] * 8):
        cache.pool.release(compute(cache, tokens)[1])
    cache.pool.release(cache.take(cache.match(keys_of([1] * 8))))
    for expected in ([2, 1, 2], [2, 0, 2], [2, 0, 1], [2, 0, 0], [1, 0, 0], [0, 0, 0]):
        cache.evict(1)
        assert [depth_of(cache, [token] * 8) for token in (1, 2, 3)] == expected
    with pytest.raises(AssertionError, match="1 pages to free, 0 idle"):
        cache.evict(1)


def test_what_is_in_use_is_not_evicted() -> None:
    cache = PrefixCache(PagePool(4))
    _, held = compute(cache, [1] * 8)
    cache.pool.release(compute(cache, [1] * 4 + [2] * 4)[1])
    assert cache.pool.num_idle == 1
    _, other = compute(cache, [3] * 8)
    assert depth_of(cache, [1] * 8) == 2 and depth_of(cache, [1] * 4 + [2] * 4) == 1
    cache.pool.release(held + other)
    assert (cache.pool.num_used, cache.pool.num_idle) == (0, 4)


def test_with_states_a_prefix_resumes_at_a_snapshot() -> None:
    cache = PrefixCache(PagePool(8), StatePool(2, first=3))
    node, pages = compute(cache, [1] * 12)
    assert depth_of(cache, [1] * 12) == 0
    assert node.parent is not None
    slot = save(cache, node.parent)
    assert slot in (3, 4) and cache.match(keys_of([1] * 12)) is node.parent
    assert cache.has_snapshot(keys_of([1] * 8))
    assert not cache.has_snapshot(keys_of([1] * 12)) and not cache.has_snapshot(keys_of([2] * 8))
    twice = cache.take_snapshot_slot()
    assert twice is not None
    cache.keep_snapshot(node.parent, twice)  # another sequence saved the same
    assert cache.snapshots is not None and cache.snapshots.num_used == 1
    cache.pool.release(pages)
    cache.evict(2)
    assert cache.snapshots.num_used == 0, "a snapshot goes with its page"


def test_the_least_recently_used_snapshot_gives_its_slot() -> None:
    cache = PrefixCache(PagePool(8), StatePool(2))
    first, second, third = (compute(cache, [token] * 4)[0] for token in (1, 2, 3))
    save(cache, first)
    save(cache, second)
    cache.pool.release(cache.take(first))
    save(cache, third)
    assert [node.snapshot is not None for node in (first, second, third)] == [True, False, True]
    assert depth_of(cache, [2] * 4) == 0


def test_there_is_no_slot_when_all_are_being_written_to() -> None:
    cache = PrefixCache(PagePool(8), StatePool(1))
    slot = cache.take_snapshot_slot()
    assert slot == 0 and cache.take_snapshot_slot() is None
    cache.drop_snapshot_slot(slot)
    assert cache.take_snapshot_slot() == 0
