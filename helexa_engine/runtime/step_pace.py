"""How fast steps have been lately: what the scheduler cuts prompts by, and what the server tells clients to wait."""

from __future__ import annotations

#: What was measured over so many prompt tokens ago counts half.
_HALF_LIFE_TOKENS = 2048

#: The weight of the newest step among those that only decode.
_NEWEST_DECODE = 0.1


class StepPace:
    """Rates of the steps measured so far, the newest weighing most.

    A step costs what its decoding sequences cost, known from steps with nothing else, and so much more for each prompt token. A step
    of both that took less than expected says that the decoding costs less by now, one that took more that the prompt tokens cost
    more: so a bound on a step's seconds is met whatever the parts cost in truth.

    Attributes:
        prompt_tokens_per_second: of steps with prompts; 0 until there was one.
        decode_tokens_per_second: of all sequences together, of steps that only decode; 0 until there was one.
    """

    def __init__(self) -> None:
        self.decode_tokens_per_second = 0.0
        self._decode_seconds = 0.0  # of a step
        self._prompt_seconds = 0.0
        self._prompt_tokens = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self._prompt_tokens / self._prompt_seconds if self._prompt_seconds else 0.0

    def observe(self, num_prompt_tokens: int, num_decodes: int, seconds: float) -> None:
        """A step of so many prompt tokens beside so many decoding sequences took ``seconds``."""
        if seconds <= 0.0:
            return
        if not num_prompt_tokens:
            share = _NEWEST_DECODE if self._decode_seconds else 1.0
            self._decode_seconds += share * (seconds - self._decode_seconds)
            self.decode_tokens_per_second += share * (num_decodes / seconds - self.decode_tokens_per_second)
            return
        if num_decodes:
            others = num_prompt_tokens / self.prompt_tokens_per_second if self._prompt_seconds else 0.0
            self._decode_seconds = min(self._decode_seconds, max(0.0, seconds - others))
            seconds -= self._decode_seconds
        kept = 0.5 ** (num_prompt_tokens / _HALF_LIFE_TOKENS)
        self._prompt_seconds = kept * self._prompt_seconds + seconds
        self._prompt_tokens = kept * self._prompt_tokens + num_prompt_tokens

    def prompt_tokens_within(self, seconds: float) -> int:
        """Prompt tokens that a step may hold beside its decoding sequences to end within ``seconds``; 0 before any was measured."""
        return max(0, int((seconds - self._decode_seconds) * self.prompt_tokens_per_second))
