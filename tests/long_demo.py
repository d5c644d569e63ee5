"""The demo model with room for longer answers than it was trained to give."""

from __future__ import annotations

from pathlib import Path

from helexa_engine import demo


def demo_with_context(output: Path, tokens: int) -> Path:
    """A copy of the demo whose file says that it reads ``tokens``. Far in, what it writes is noise."""
    data = bytearray(demo.path().read_bytes())
    key = b"qwen35.context_length"
    place = data.index(key) + len(key)
    kind, value = (int.from_bytes(data[place + i : place + i + 4], "little") for i in (0, 4))
    assert (kind, value) == (4, 2048), "expected an unsigned integer of 32 bits"
    data[place + 4 : place + 8] = tokens.to_bytes(4, "little")
    output.write_bytes(data)
    return output
