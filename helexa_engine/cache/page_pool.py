"""Which pages of KV memory are taken. Ids only: the model runner holds the tensors."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Reference-counted page ids ``0 .. num_pages-1``.

    Taking more than is free and releasing what is not held are errors of the caller, hence assertions: the scheduler asks
    :attr:`num_free` first.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0, f"a pool needs at least one page, got {num_pages}"
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page released last is warm in the caches
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` pages with one reference each."""
        assert 0 <= count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, page: int) -> None:
        """One more reference to a page in use."""
        assert self._references[page] > 0, f"page {page} is not in use"
        self._references[page] += 1

    def references(self, page: int) -> int:
        return self._references[page]

    def release(self, pages: Iterable[int]) -> None:
        """One reference less for each page; a page without references is free again."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
