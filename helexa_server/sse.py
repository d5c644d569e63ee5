"""Server-sent events: the framing of a stream (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from .wire.frame import Frame

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold frames back
]


def encode(frame: Frame) -> bytes:
    """One frame on the wire. ``frame.data`` is a single line, as JSON without indentation always is."""
    name = b"event: " + frame.event.encode() + b"\n" if frame.event else b""
    return name + b"data: " + frame.data + b"\n\n"
