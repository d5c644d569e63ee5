"""The end of thinking, where the model does not come to it by itself: :class:`ThinkingControl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

#: Whether the prompt leaves a think block open, or the model may open one itself.
Thinking = Literal["no", "open", "may_open"]


class Constraint(Protocol):
    """What holds an answer besides: see :class:`~.structured.GrammarState`."""

    def apply(self, logits: npt.NDArray[np.float32]) -> None: ...
    def fill_mask(self, mask: npt.NDArray[np.int32]) -> bool: ...
    def accept(self, token_id: int) -> None: ...
    def is_finished(self) -> bool: ...


class ThinkingControl:
    """Closes the think block of one answer when its budget is spent or when :meth:`stop` asks for it: the closing tokens are then
    the only ones allowed, one after the other, and the model goes on behind them. Every other token is left to ``constraint``.
    """

    def __init__(
        self,
        *,
        thinking: Thinking,
        open_think: int | None,
        close_think: int,
        closing: Sequence[int],
        budget: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """``closing``: the tokens that end a think block in good form, ``close_think`` among them. ``budget`` counts tokens after the
        opening tag."""
        self._phase: Literal["first", "thinking", "closing", "answer"] = "answer"
        if thinking == "open":
            self._phase = "thinking"
        elif thinking == "may_open" and open_think is not None:
            self._phase = "first"
        self._open_think = open_think
        self._close_think = close_think
        self._closing = list(closing)
        self._left = budget
        self._constraint = constraint

    def stop(self) -> None:
        """Ends the thinking with the next token, or as soon as it begins; does nothing once it is over."""
        self._left = 0

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        """Sets the logits [vocab_size] of tokens that may not come next to -inf, in place."""
        forced = self.forced_token()
        if forced is not None:
            logits[:] = -np.inf
            logits[forced] = 0.0
        elif self._constraint is not None:
            self._constraint.apply(logits)

    def forced_token(self) -> int | None:
        """The closing token whose turn it is; None where the thinking is not being closed."""
        if self._phase == "thinking" and self._left is not None and self._left <= 0:
            self._phase = "closing"
        return self._closing[0] if self._phase == "closing" else None

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> bool:
        """Where no token is forced: as the constraint's; False where there is none."""
        return self._constraint is not None and self._constraint.fill_mask(mask)

    def accept(self, token_id: int) -> None:
        """Advances by the sampled token."""
        if self._phase == "closing":
            del self._closing[0]
            if not self._closing:
                self._phase = "answer"
        elif self._phase == "first":
            self._phase = "thinking" if token_id == self._open_think else "answer"
        elif self._phase == "thinking":
            if token_id == self._close_think:
                self._phase = "answer"
            elif self._left is not None:
                self._left -= 1
        if self._constraint is not None:
            self._constraint.accept(token_id)

    def is_finished(self) -> bool:
        """Whether the answer can only be ended."""
        return self._constraint is not None and self._constraint.is_finished()
