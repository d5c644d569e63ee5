"""Git LFS pointers: what a clone without LFS leaves in the place of a large file. Source: the Git LFS specification."""

from __future__ import annotations

from pathlib import Path

from ..errors import UnsupportedCheckpoint

_BEGINNING = b"version https://git-lfs"


def refuse_pointer(head: bytes, path: Path) -> None:
    """Raises :class:`UnsupportedCheckpoint` when a file that begins with ``head`` (at least 23 bytes) is only a pointer."""
    if head.startswith(_BEGINNING):
        raise UnsupportedCheckpoint(
            "it is a Git LFS pointer, the file itself was not downloaded; run `git lfs pull`, or `helexa pull`",
            str(path),
        )
