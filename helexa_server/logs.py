"""Log lines on stderr, for people or for programs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec


def log_fields(log: logging.Logger, subject: str, fields: Mapping[str, Any]) -> None:
    """One line ``subject name=value ...`` for people; in JSON the fields keep their names and types beside the message."""
    log.info("%s %s", subject, " ".join(f"{k}={_word(v)}" for k, v in fields.items()), extra={"fields": fields})


def _word(value: Any) -> str:
    """Seconds to the millisecond, None as ``-``; text that is no single word in quotes, and what is long cut."""
    if isinstance(value, float):
        return f"{value:.3f}"
    text = "-" if value is None else str(value)
    return f"{text:.200}" if text.isprintable() and " " not in text else f"{text!r:.200}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC, RFC 3339), ``level``, ``logger``, ``message``, with a traceback ``error``, and the fields
    of a request."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode({**entry, **getattr(record, "fields", {})}).decode()


def configure_logging(log_format: Literal["text", "json"]) -> None:
    """Sends helexa's lines and uvicorn's warnings to stderr, unless the program around us has set up logging already."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if log_format == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    root.addHandler(handler)
    for name in ("helexa_engine", "helexa_server"):
        logging.getLogger(name).setLevel(logging.INFO)
