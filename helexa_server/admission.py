"""Who is let in: how many requests a model holds, how many of them are one key's, and how fast and how much a key may ask.

A request that is let in waits for a seat in the engine, which gives seats by memory (``docs/decisions/0015-who-comes-first.md``). What
is bounded here is how many wait: a model holds as many answers as it has seats and ``max_queued_requests`` more, however long they are.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from helexa_engine.errors import Overloaded
from helexa_engine.generate_request import GenerateRequest

from .auth import fingerprint
from .config import KeyLimits, Keys, ServerConfig
from .errors import InsufficientQuota
from .served_model import RETRY_AFTER_SECONDS, ServedModel

#: The longest wait that a client is told: by then the measured rates say nothing any more.
MAX_RETRY_AFTER_SECONDS = 600.0


class Window:
    """An allowance of so much a minute, which may be used at once and fills up again evenly. It may be overdrawn."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute = per_minute
        self._left = per_minute
        self._filled_at = now

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until ``amount`` is left; 0 if it is."""
        self._left = min(self._per_minute, self._left + (now - self._filled_at) * self._per_minute / 60.0)
        self._filled_at = now
        return max(0.0, (min(amount, self._per_minute) - self._left) * 60.0 / self._per_minute)

    def use(self, amount: float) -> None:
        self._left -= amount


class Account:
    """What one key has used of its limits."""

    def __init__(self, limits: KeyLimits, now: float) -> None:
        self.limits = limits
        self._requests = None if limits.requests_per_minute is None else Window(limits.requests_per_minute, now)
        self._tokens = None if limits.tokens_per_minute is None else Window(limits.tokens_per_minute, now)
        self._used = 0

    def enter(self, now: float) -> None:
        """Counts a request. Raises :class:`Overloaded`, :class:`InsufficientQuota`."""
        budget = self.limits.token_budget
        if budget is not None and self._used >= budget:
            raise InsufficientQuota(
                f"this key has used {self._used} of its {budget} tokens", used=self._used, token_budget=budget
            )
        for window, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if window is not None and (seconds := window.seconds_until(1, now)) > 0:
                limit = getattr(self.limits, f"{what}_per_minute")
                raise Overloaded(
                    f"this key may use {limit} {what} a minute and has; try again in {seconds:.0f} seconds",
                    max(1.0, seconds),
                    reason=f"{what}_per_minute",
                    limit=limit,
                )
        if self._requests is not None:
            self._requests.use(1)

    def use(self, tokens: int) -> None:
        self._used += tokens
        if self._tokens is not None:
            self._tokens.use(tokens)


class Place:
    """A call that was let in, for as long as the context is open."""

    def __init__(
        self, admission: Admission, model_id: str, owner: str | None, answers: int, account: Account | None
    ) -> None:
        self._admission = admission
        self._model_id = model_id
        self._owner = owner
        self._answers = answers
        self._account = account

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._admission.leave(self._model_id, self._owner, self._answers)

    def spend(self, tokens: int) -> None:
        """Counts tokens of prompts, cached or not, and of answers, as they come: a stream that is cut has paid for what it got."""
        if self._account is not None:
            self._account.use(tokens)

    def marked(self, request: GenerateRequest) -> GenerateRequest:
        """``request`` with what the engine has to know of who asks and how long it may wait."""
        priority = request.priority
        if self._account is not None and self._account.limits.priority is not None:
            priority = max(priority, self._account.limits.priority)
        return replace(
            request, owner=self._owner, priority=priority, max_queue_seconds=self._admission.max_queue_seconds
        )


class Admission:
    """The places of every model and the accounts of every key that has limits."""

    def __init__(self, config: ServerConfig, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_queued = config.max_queued_requests
        self.max_queue_seconds = config.max_queue_seconds
        self._shares = len(keys.clients) + (keys.admin is not None) > 1
        self._clock = clock
        self._inside: Counter[str] = Counter()
        self._inside_of: Counter[tuple[str, str | None]] = Counter()
        self._accounts = {fingerprint(key): Account(limits, clock()) for key, limits in keys.limits.items()}

    def enter(self, model: ServedModel, owner: str | None, requests: Sequence[GenerateRequest]) -> Place:
        """A place for all answers of a call.

        Raises:
            Overloaded: the places are taken, the key has its share of them, or it asks too fast.
            InsufficientQuota: the key's tokens are used up.
        """
        answers = sum(request.sampling_params.n for request in requests)
        inside, own = self._inside[model.id], self._inside_of[model.id, owner]
        stats = None if model.engine is None else model.engine.stats()
        places = self._max_queued + (stats.max_num_seqs if stats is not None else 0)
        if inside and inside + answers > places:
            raise self._full(model, f"{inside} answers run or wait, and there are {places} places", "queue_full")
        if self._shares and own and own + answers > places - inside:
            message = (
                f"{own} answers of this key run or wait, and {places - inside} of {places} places are left for all keys"
            )
            raise self._full(model, message, "key_share")
        account = None if owner is None else self._accounts.get(owner)
        if account is not None:
            account.enter(self._clock())
        self._inside[model.id] += answers
        self._inside_of[model.id, owner] += answers
        return Place(self, model.id, owner, answers, account)

    def leave(self, model_id: str, owner: str | None, answers: int) -> None:
        """The places of a call are free."""
        self._inside[model_id] -= answers
        self._inside_of[model_id, owner] -= answers
        if not self._inside_of[model_id, owner]:
            del self._inside_of[model_id, owner]

    def inside(self, model_id: str) -> int:
        """Answers of the model that run or wait."""
        return self._inside[model_id]

    def _full(self, model: ServedModel, message: str, reason: str) -> Overloaded:
        if model.engine is None:
            wait = model.life.retry_after_seconds
        elif (seconds := model.engine.stats().queue_seconds) is None:
            wait = RETRY_AFTER_SECONDS
        else:
            wait = min(max(1.0, seconds), MAX_RETRY_AFTER_SECONDS)
        return Overloaded(
            f"model {model.id!r} is busy: {message}; try again in {wait:.0f} seconds", wait, reason=reason
        )
