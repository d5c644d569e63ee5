"""HTTP/1.1 as uvicorn speaks it, with our envelope also for what is no request at all."""

from __future__ import annotations

import sys

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import HeadersTooLarge, NotHttp, status_of
from .wire import openai


class HttpProtocol(H11Protocol):
    """Answers what h11 cannot read: 431 for headers over ``max_header_bytes``, else 400. Then the connection ends."""

    def send_400_response(self, msg: str) -> None:
        problem = sys.exception()
        error = (
            HeadersTooLarge(f"the request line and headers exceed {self.config.h11_max_incomplete_event_size} bytes")
            if isinstance(problem, h11.RemoteProtocolError) and problem.error_status_hint == 431
            else NotHttp(f"no HTTP/1.1 request: {problem or msg}")
        )
        status = status_of(error)
        body = msgspec.json.encode(openai.error_body(error, status))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
