"""What models may take together."""

from __future__ import annotations

import pytest

from helexa_engine.errors import InvalidRequest
from helexa_server.config import ServerConfig
from helexa_server.lifecycle.budget import Budget


def test_what_is_reserved_is_taken_also_where_the_system_has_not_handed_it_out() -> None:
    budget = Budget(available=lambda: 1000)
    assert budget.total_bytes == 1000 and budget.free(0) == 1000
    assert budget.free(700) == 300 and budget.free(1200) == 0


def test_what_others_have_taken_is_not_free() -> None:
    available = [1000]
    budget = Budget(available=lambda: available[0])
    available[0] = 200
    assert budget.free(700) == 200
    assert budget.total_bytes == 1000


def test_where_nothing_is_reserved_the_total_is_what_there_is_now() -> None:
    available = [1000]
    budget = Budget(available=lambda: available[0])
    available[0] = 5000
    assert budget.free(10) == 990, "the system calls free what is promised already"
    assert budget.free(0) == 5000 and budget.total_bytes == 5000


def test_a_limit_holds_whatever_there_is() -> None:
    budget = Budget(600, lambda: 1000)
    assert budget.free(0) == 600 and budget.free(400) == 200 and budget.total_bytes == 600


def test_the_limit_is_a_size() -> None:
    assert ServerConfig(memory_budget="1.5GiB").memory_budget_bytes() == 3 * 2**29
    assert ServerConfig().memory_budget_bytes() is None
    for bad in ("much", "0", "-1GiB"):
        with pytest.raises(InvalidRequest, match="memory_budget: expected a size such as 20GiB"):
            ServerConfig(memory_budget=bad)
