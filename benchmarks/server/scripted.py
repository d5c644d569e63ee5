"""The server under measurement, over an engine that answers from a script."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

from helexa_engine.events import ContentDelta, Finished, PromptProcessed, Timings, Usage
from helexa_engine.generate_request import GenerateRequest
from helexa_engine.testing.fake_engine import FakeEngine, Step
from helexa_server.app import Server, create_app, listen
from helexa_server.config import ServerConfig
from helexa_server.served_model import ServedModel

PAUSE_SECONDS = 0.001  # between chunks, so that each is a write of its own, as with a real engine


def serve(port: Connection) -> None:
    """Serves on a free port, which goes to ``port``, on one processor and until the process is ended."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    asyncio.run(_serve(port))


async def _serve(port: Connection) -> None:
    config = ServerConfig(port=0)
    model = ServedModel("fake")
    model.life.loaded(FakeEngine(_script))  # type: ignore[arg-type]
    with listen(config.host, config.port) as listener:
        port.send(listener.getsockname()[1])
        await Server(create_app([model], config), config).serve(sockets=[listener])


def _script(request: GenerateRequest) -> Iterator[Step]:
    """As many words as the request's seed says."""
    count = request.sampling_params.seed or 1
    yield PromptProcessed((1, 2, 3))
    for i in range(count):
        if i:
            yield PAUSE_SECONDS
        yield ContentDelta(0, " word", (i,))
    yield Finished(0, "stop", Usage(3, count), Timings(0.0, 0.0, 0.0))
