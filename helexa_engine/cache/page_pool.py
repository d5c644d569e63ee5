"""Which pages of KV memory are taken. Ids only: the model runner holds the tensors."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Reference-counted page ids ``0 .. num_pages-1``, shared by running sequences and the prefix cache.

    A page that only the prefix cache holds is *idle*: free space that happens to be useful. It is counted as available, and the
    cache gives it up when it is needed.

    Taking more than is free and releasing what is not held are errors of the caller, hence assertions: the scheduler asks
    :attr:`num_available` first.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0, f"a pool needs at least one page, got {num_pages}"
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page released last is warm in the caches
        self._references = [0] * num_pages
        self._is_cached = bytearray(num_pages)
        self._num_idle = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Pages that only the prefix cache holds."""
        return self._num_idle

    @property
    def num_available(self) -> int:
        return len(self._free) + self._num_idle

    @property
    def num_used(self) -> int:
        """Pages that a sequence holds."""
        return self.num_pages - self.num_available

    def allocate(self, count: int) -> list[int]:
        """``count`` pages with one reference each."""
        assert 0 <= count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, page: int) -> None:
        """One more reference to a page in use, or to an idle one."""
        assert self._references[page] > 0, f"page {page} is not in use"
        self._num_idle -= self.is_idle(page)
        self._references[page] += 1

    def references(self, page: int) -> int:
        return self._references[page]

    def is_idle(self, page: int) -> bool:
        return self._references[page] == 1 and bool(self._is_cached[page])

    def release(self, pages: Iterable[int]) -> None:
        """One reference less for each page; a page without references is free again."""
        for page in pages:
            assert self._references[page] > self._is_cached[page], f"page {page} released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
            else:
                self._num_idle += self.is_idle(page)

    def cache(self, page: int) -> None:
        """The prefix cache's own reference to a page that a sequence holds."""
        assert not self._is_cached[page], f"page {page} is cached already"
        self.share(page)
        self._is_cached[page] = True

    def uncache(self, page: int) -> None:
        """The prefix cache lets go of a page: an idle one is free again."""
        assert self._is_cached[page], f"page {page} is not cached"
        self._num_idle -= self.is_idle(page)
        self._is_cached[page] = False
        self.release([page])
