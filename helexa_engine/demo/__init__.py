"""The small trained model that ships with helexa, so that the first command answers in words.

:func:`path` is where it lies. :mod:`.conversations` writes what it was trained and judged on, :mod:`.train` trains it,
:mod:`.evaluate` and :mod:`.over_http` print its accuracy, :mod:`.perplexity` what quantising costs it, :mod:`.export` writes the GGUF
file. The path and the conversations need no torch.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def path() -> Path:
    """The demo model's GGUF file."""
    return FOLDER / "demo.gguf"
