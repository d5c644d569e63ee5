"""Stop strings that may lie across token borders: :class:`StopChecker`."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Passes text on until one of ``stops`` is complete, and holds back only what may still become one.

    The answer ends at the stop string that is *completed first* (of two completed by the same character, the longer), and
    is cut before it. This depends on the characters alone, not on how they were chunked. Each stop string is matched with its
    Knuth-Morris-Pratt table, so a character costs constant time a stop string.

    Attributes:
        hit: the stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string. Empty after :attr:`hit` is set."""
        if self.hit is not None or not self._stops:
            return text if self.hit is None else ""
        for i, char in enumerate(text):
            best = 0
            for s, stop in enumerate(self._stops):
                matched, table = self._matched[s], self._tables[s]
                while matched and stop[matched] != char:
                    matched = table[matched - 1]
                matched += stop[matched] == char
                if matched == len(stop):
                    if matched > best:
                        best, self.hit = matched, stop
                    matched = table[matched - 1]
                self._matched[s] = matched
            if best:
                seen = self._held + text[: i + 1]
                self._held = ""
                return seen[: len(seen) - best]
        seen = self._held + text
        certain = len(seen) - max(self._matched)
        self._held = seen[certain:]
        return seen[:certain]

    def flush(self) -> str:
        """The end of the text: what was held back is text after all."""
        held, self._held = self._held, ""
        return held


def _failure_table(pattern: str) -> list[int]:
    """For each prefix of ``pattern`` the length of its longest proper border."""
    table = [0] * len(pattern)
    border = 0
    for i in range(1, len(pattern)):
        while border and pattern[i] != pattern[border]:
            border = table[border - 1]
        border += pattern[i] == pattern[border]
        table[i] = border
    return table
