"""The requests that are being answered, by name, so that someone else than the client that waits can end them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

#: What the wires put before a request's id in their answers.
_PREFIX = re.compile(r"^(?:chatcmpl-|cmpl-|resp_|msg_)")


class Steerable(Protocol):
    """A request that runs, as far as others may act on it."""

    def cancel(self) -> None:
        """Ends it for everybody who waits for it."""

    def stop_thinking(self) -> None:
        """Ends its reasoning; it goes on with the answer."""


class _Running(NamedTuple):
    owner: str | None
    request: Steerable


class RunningRequests:
    """Names may be shared: a client is free to call all its requests the same."""

    def __init__(self) -> None:
        self._by_name: dict[str, list[_Running]] = {}

    @contextlib.contextmanager
    def entered(self, names: Iterable[str], owner: str | None, request: Steerable) -> Iterator[None]:
        """While the context is open, each of ``names`` leads to ``request``, for ``owner`` and those who may act for all."""
        running = _Running(owner, request)
        names = set(names)
        for name in names:
            self._by_name.setdefault(name, []).append(running)
        try:
            yield
        finally:
            for name in names:
                self._by_name[name].remove(running)
                if not self._by_name[name]:
                    del self._by_name[name]

    def find(self, name: str, owner: str | None, *, everyones: bool = False) -> list[Steerable]:
        """What goes by ``name``: the client's own id, the request's, or that of the answer."""
        found = self._by_name.get(name) or self._by_name.get(_PREFIX.sub("", name)) or []
        return [running.request for running in found if everyones or running.owner == owner]

    def __len__(self) -> int:
        """How many names there are; none when nothing runs."""
        return len(self._by_name)
