"""Pages of a mapped file."""

from __future__ import annotations

import mmap


def release(mapped: mmap.mmap, start: int, nbytes: int) -> None:
    """Gives the whole pages under ``nbytes`` bytes from ``start`` back to the system; they are read again when touched."""
    page = mmap.ALLOCATIONGRANULARITY
    first = -(-start // page) * page
    length = (start + nbytes) // page * page - first
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, first, length)
