"""A live server on a free loopback port, over an engine that answers from a script."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
from starlette.applications import Starlette

from helexa_server.app import Server, create_app, listen, url
from helexa_server.config import ServerConfig
from helexa_server.lifecycle.budget import Budget
from helexa_server.lifecycle.model_life import ModelLife
from helexa_server.served_model import ServedModel


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Returns once ``condition`` holds; fails the test when it does not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


@dataclass
class Live:
    """A running server."""

    url: str
    model: ServedModel
    app: Starlette
    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None]

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options
        )

    def anthropic(self, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(
            base_url=self.url, api_key=options.pop("api_key", "none"), max_retries=0, timeout=20.0, **options
        )

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 10.0, **options})


@contextlib.contextmanager
def live_models(models: Sequence[ServedModel], budget: Budget | None = None, **options: Any) -> Iterator[Live]:
    """Serves ``models`` from a thread, which unloads them at its end."""
    config = ServerConfig(port=0, **{"keep_alive_seconds": 5.0, "shutdown_seconds": 1.0, **options})
    listener = listen(config.host, config.port)
    app = create_app(models, config, budget)
    server = Server(app, config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listener])
        await app.state.manager.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Live(url(listener), models[0], app, loops[0], server.stop)
    finally:
        server.stop()
        thread.join(timeout=10)
        assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def live_server(engine: Any, life: ModelLife | None = None, **options: Any) -> Iterator[Live]:
    """Serves ``engine`` as model "fake" from a thread; None leaves the model loading. With a ``life``, leads that from its start."""
    model = ServedModel("fake", life=life)
    if engine is not None:
        model.life.loaded(engine)
    with live_models([model], **options) as live:
        if life is not None:
            live.loop.call_soon_threadsafe(life.begin)
        yield live


Serve = Callable[..., Live]
