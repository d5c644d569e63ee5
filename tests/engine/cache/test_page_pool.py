"""The pool of KV pages."""

from __future__ import annotations

import pytest

from helexa_engine.cache.page_pool import PagePool


def test_counts_references_and_refuses_a_double_free() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    assert len(set(pages)) == 2 and pool.num_free == 1 and pool.num_used == 2
    pool.share(pages[0])
    pool.release(pages)
    assert pool.num_free == 2 and pool.references(pages[0]) == 1
    pool.release(pages[:1])
    assert pool.num_free == 3
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages[:1])
    with pytest.raises(AssertionError, match="4 pages asked for"):
        pool.allocate(4)
    with pytest.raises(AssertionError, match="not in use"):
        pool.share(pages[0])


def test_a_page_that_only_the_cache_holds_is_available() -> None:
    pool = PagePool(3)
    page, other = pool.allocate(2)
    pool.cache(page)
    assert (pool.num_free, pool.num_idle, pool.num_available, pool.num_used) == (1, 0, 1, 2)
    pool.release([page])
    assert (pool.num_free, pool.num_idle, pool.num_available, pool.num_used) == (1, 1, 2, 1)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([page])
    pool.share(page)
    assert (pool.num_free, pool.num_idle, pool.num_used) == (1, 0, 2)
    pool.uncache(page)
    assert (pool.num_free, pool.num_idle, pool.num_used) == (1, 0, 2)
    pool.release([page, other])
    assert (pool.num_free, pool.num_available, pool.num_used) == (3, 3, 0)
    with pytest.raises(AssertionError, match="not cached"):
        pool.uncache(page)
