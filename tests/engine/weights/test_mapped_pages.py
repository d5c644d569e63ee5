"""Only pages that lie wholly in a tensor are given back: its neighbours' bytes stay in memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from helexa_engine.weights.mapped_pages import release

PAGE = mmap.ALLOCATIONGRANULARITY


class Advised:
    """Notes what a map is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []

    def madvise(self, advice: int, start: int, length: int) -> None:
        self.calls.append((advice, start, length))


@pytest.mark.parametrize(
    ("start", "nbytes", "pages"),
    [
        (0, 3 * PAGE, (0, 3)),
        (0, 3 * PAGE - 1, (0, 2)),
        (1, 3 * PAGE, (1, 2)),
        (1, 3 * PAGE - 1, (1, 2)),
        (PAGE - 1, PAGE + 1, (1, 1)),
        (PAGE, PAGE, (1, 1)),
    ],
)
def test_whole_pages_are_released(start: int, nbytes: int, pages: tuple[int, int]) -> None:
    mapped = Advised()
    release(mapped, start, nbytes)  # type: ignore[arg-type]
    first, count = pages
    assert mapped.calls == [(mmap.MADV_DONTNEED, first * PAGE, count * PAGE)]


@pytest.mark.parametrize(("start", "nbytes"), [(0, PAGE - 1), (1, PAGE), (PAGE // 2, PAGE), (5, 0)])
def test_parts_of_pages_stay(start: int, nbytes: int) -> None:
    mapped = Advised()
    release(mapped, start, nbytes)  # type: ignore[arg-type]
    assert not mapped.calls


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    data = bytes(range(256)) * (4 * PAGE // 256)
    path.write_bytes(data)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == data
        release(mapped, 0, len(data))
        assert mapped[:] == data
