"""From logits to the next token.

Operations on one row of logits, in this order (the filters as HuggingFace orders them):

1. ``logit_bias`` is added;
2. ``repetition_penalty`` over prompt and output (Keskar et al., 2019: divide positive logits, multiply negative ones), then
   ``frequency_penalty`` and ``presence_penalty`` over the output (as in OpenAI's API);
3. while fewer than ``min_tokens`` are generated, end-of-turn and stop token ids are masked, unless the grammar leaves nothing
   else;
4. the grammar's mask;
5. ``temperature`` (0 ends here with the largest logit, the lowest id among equals);
6. ``top_k``: exactly k tokens, lower ids first among equals;
7. ``top_p``: the smallest set, likeliest first, whose probability among what is left reaches it;
8. ``min_p``: tokens at least ``min_p`` times as likely as the likeliest;
9. one draw by inverting the cumulative distribution of what is left, likeliest first.

Log probabilities are of the model's own distribution: before 1.

Everything here is numpy on one thread: a row costs less than waking a thread team does. Probabilities are summed in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from ..errors import HelexaError
from ..ops.sample.rows import SampleRow
from ..sampling_params import SamplingParams

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_BLOCK = 64  # values a partial maximum covers in `largest`
_FIRST_CANDIDATES = 256  # tokens tried first where the filter does not say how many it keeps


#: What a row that is not finite says about the model.
DAMAGED = "the weights may be damaged"


class SamplingFailed(HelexaError):
    """No token could be chosen for one request: its logits are not finite, or no token is allowed."""

    code = "sampling_failed"


class NotFinite(SamplingFailed):
    """What the model computed for one request is not finite. ``what`` names it, as in "the logits (nan) are"."""

    def __init__(self, what: str, more: str = DAMAGED) -> None:
        super().__init__(f"{what} not finite, {more}")
        self.what = what


class Grammar(Protocol):
    """What the sampler needs of a structured-output constraint."""

    def apply(self, logits: Logits) -> None:
        """Sets logits [V] of tokens that may not come next to -inf, in place."""

    def forced_token(self) -> int | None:
        """The only token that may come next, whatever its logit; None where there is no such."""

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> bool:
        """Writes what :meth:`apply` allows into ``mask`` int32 [(V + 31) // 32]: bit i % 32 of word i // 32 says whether token i may
        come next. False, with nothing written, where every token may. Only where no token is forced."""

    def accept(self, token_id: int) -> None:
        """Advances by the sampled token."""

    def is_finished(self) -> bool:
        """Whether nothing but an end-of-turn token can follow."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log probability of a token, and the likeliest tokens with theirs, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


#: What came of sampling one row: the token with its log probabilities if they were asked for, or why there is none.
Outcome = tuple[int, Logprobs | None] | Exception


@dataclass(slots=True)
class _TokenCounts:
    """How often each distinct token occurred, as arrays that grow by one token in constant time."""

    ids: Ids = field(default_factory=lambda: np.empty(64, np.int64))
    counts: Logits = field(default_factory=lambda: np.empty(64, np.float32))
    places: dict[int, int] = field(default_factory=dict)

    def add(self, token_id: int) -> None:
        place = self.places.get(token_id)
        if place is None:
            place = self.places[token_id] = len(self.places)
            if place == len(self.ids):
                self.ids = np.resize(self.ids, 2 * place)
                self.counts = np.resize(self.counts, 2 * place)
            self.ids[place], self.counts[place] = token_id, 0.0
        self.counts[place] += 1.0

    def view(self) -> tuple[Ids, Logits]:
        size = len(self.places)
        return self.ids[:size], self.counts[:size]


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: with defaults filled in (:meth:`SamplingParams.with_defaults`).
        seed: of the request; the draw of token t of answer i depends on (seed, i, t) and nothing else.
        index: which answer of the request this is.
        prompt_token_ids: for the repetition penalty.
        end_token_ids: masked during ``min_tokens``.
        grammar: constraint of this sequence, or None.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        index: int = 0,
        prompt_token_ids: Sequence[int] = (),
        end_token_ids: Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.num_generated = 0
        self._key = (seed & (2**64 - 1)).to_bytes(8, "little") + index.to_bytes(8, "little")
        self._temperature = _set(params.temperature)
        self._repetition = _set(params.repetition_penalty)
        self._frequency = _set(params.frequency_penalty)
        self._presence = _set(params.presence_penalty)
        self._end_ids = np.array(sorted(set(end_token_ids)), np.int64)
        bias = params.logit_bias or {}
        self._bias_ids = np.array(list(bias), np.int64)
        self._bias = np.array(list(bias.values()), np.float32)
        self._output = _TokenCounts() if self._frequency or self._presence else None
        self._seen = _TokenCounts() if self._repetition != 1.0 else None
        if self._seen is not None:
            for token_id in set(prompt_token_ids):
                self._seen.add(token_id)

    @property
    def grammar_is_finished(self) -> bool:
        """Whether a grammar lets nothing but an end-of-turn token follow."""
        return self.grammar is not None and self.grammar.is_finished()

    def sample(self, logits: Logits, largest: int | None = None) -> tuple[int, Logprobs | None]:
        """The next token, and its log probabilities if they were asked for.

        Args:
            logits: [V] float32; overwritten.
            largest: ``logits.argmax()`` if that is known.

        Raises:
            SamplingFailed: NaN or +inf among the logits, or nothing left to choose from.
        """
        raw = log_probabilities(logits) if self.params.logprobs is not None else None
        if self._adjust(logits) or largest is None:
            largest = int(logits.argmax())  # a NaN counts as the largest
        best = largest
        if not math.isfinite(logits[best]):
            raise failure(float(logits[best]))
        token_id = best if self._temperature == 0.0 else self._draw(logits)
        self.accept(token_id)
        return token_id, None if raw is None else logprobs_of(raw, token_id, cast(int, self.params.logprobs))

    def row(self) -> SampleRow:
        """What the next token is chosen by, but for the grammar: for ``ops.sample``, which leaves :meth:`accept` to its caller."""
        row = SampleRow(
            temperature=self._temperature,
            top_k=int(_set(self.params.top_k)),
            top_p=_set(self.params.top_p),
            min_p=_set(self.params.min_p),
            repetition_penalty=self._repetition,
            frequency_penalty=self._frequency,
            presence_penalty=self._presence,
            bias_ids=self._bias_ids,
            bias=self._bias,
            num_logprobs=self.params.logprobs,
        )
        if self._temperature:
            row.uniform = self._uniform()
        if self._seen is not None:
            row.seen_ids, _ = self._seen.view()
        if self._output is not None:
            row.output_ids, row.output_counts = self._output.view()
        if self._masks_ends():
            row.masked_ids = self._end_ids
        return row

    def accept(self, token_id: int) -> None:
        """Advances by a token. Raises whatever a grammar raises."""
        if self.grammar is not None:
            self.grammar.accept(token_id)
        for counts in (self._output, self._seen):
            if counts is not None:
                counts.add(token_id)
        self.num_generated += 1

    def _adjust(self, logits: Logits) -> bool:
        """Steps 1 to 4, in place; whether there was anything to do."""
        adjusted = False
        if self._bias_ids.size:
            logits[self._bias_ids] += self._bias
            adjusted = True
        if self._seen is not None:
            ids, _ = self._seen.view()
            seen = logits[ids]
            logits[ids] = np.where(seen > 0, seen / np.float32(self._repetition), seen * np.float32(self._repetition))
            adjusted = True
        if self._output is not None:
            ids, counts = self._output.view()
            logits[ids] -= counts * np.float32(self._frequency) + np.float32(self._presence)
            adjusted = True
        if self._masks_ends():
            logits[self._end_ids] = -np.inf
            adjusted = True
        if self.grammar is not None:
            self.grammar.apply(logits)
            adjusted = True
        return adjusted

    def _masks_ends(self) -> bool:
        return self.num_generated < self.params.min_tokens and not self.grammar_is_finished

    def _draw(self, logits: Logits) -> int:
        ids, probabilities = candidates(
            logits,
            temperature=self._temperature,
            top_k=int(_set(self.params.top_k)),
            top_p=_set(self.params.top_p),
            min_p=_set(self.params.min_p),
        )
        cumulative = np.cumsum(probabilities)
        place = int(cumulative.searchsorted(self._uniform() * cumulative[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def _uniform(self) -> float:
        """Uniform in [0, 1) from a counter: a keyed hash of the token's number (BLAKE2b as a pseudorandom function)."""
        digest = hashlib.blake2b(self.num_generated.to_bytes(8, "little"), key=self._key, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample_rows(samplers: Sequence[Sampler], logits: Logits, largest: Sequence[int] | None = None) -> list[Outcome]:
    """:meth:`Sampler.sample` of each row of ``logits`` [len(samplers), V]: what goes wrong with one is its own outcome, for a grammar
    may raise anything and the others are not to blame."""
    outcomes: list[Outcome] = []
    for i, (sampler, row) in enumerate(zip(samplers, logits, strict=True)):
        try:
            outcomes.append(sampler.sample(row, None if largest is None else largest[i]))
        except Exception as error:
            outcomes.append(error)
    return outcomes


def candidates(
    logits: Logits, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Ids, npt.NDArray[np.float64]]:
    """Tokens that survive the filters, likeliest first, with unnormalised probabilities (the likeliest has 1).

    Without any filter the order is that of ids: sorting a vocabulary costs more than everything else together.

    Args:
        logits: [V] float32, with a finite maximum.
    """
    size = logits.size
    if 0 < top_k < size:
        ids = largest(logits, top_k)
        probabilities = _probabilities(logits, ids, temperature)
        total = float(probabilities.sum())
    elif top_p < 1.0:
        total = float(_scaled_exp(logits, temperature).sum(dtype=np.float64))
        count = min(_FIRST_CANDIDATES, size)
        while True:
            ids = largest(logits, count)
            probabilities = _probabilities(logits, ids, temperature)
            if count == size or probabilities.sum() >= top_p * total:
                break
            count = min(8 * count, size)
    elif min_p > 0.0:
        floor = logits.max() + temperature * (math.log(min_p) - 1e-3)  # a little low: the test below decides
        ids = np.flatnonzero(logits >= floor)
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        probabilities = _probabilities(logits, ids, temperature)
        total = 0.0
    else:
        return np.arange(size), _scaled_exp(logits, temperature).astype(np.float64)
    if top_p < 1.0:
        kept = int(np.cumsum(probabilities).searchsorted(top_p * total, side="left")) + 1
        ids, probabilities = ids[:kept], probabilities[:kept]
    if min_p > 0.0:
        kept = int((probabilities >= min_p).sum())  # they descend from 1
        ids, probabilities = ids[:kept], probabilities[:kept]
    return ids, probabilities


def largest(values: Logits, count: int) -> Ids:
    """Positions of the ``count`` largest values, largest first, the lowest position first among equals.

    Exact, and a few times faster than a partial sort of the whole: ``count`` blocks have a maximum of at least the count-th largest
    block maximum, so nothing below that can be among the ``count`` largest values.
    """
    whole = values.size // _BLOCK * _BLOCK
    if count * 4 < whole // _BLOCK:
        maxima = values[:whole].reshape(-1, _BLOCK).max(axis=1)
        bound = np.partition(maxima, maxima.size - count)[maxima.size - count]
        positions = np.flatnonzero(values >= bound)
    elif count < values.size:
        bound = np.partition(values, values.size - count)[values.size - count]
        positions = np.flatnonzero(values >= bound)
    else:
        positions = np.arange(values.size)
    order = np.argsort(-values[positions], kind="stable")[:count]
    return positions[order]


def log_probabilities(logits: Logits) -> Logits:
    """Log-softmax of one row [V], float32, summed in float64; a new array. Raises :class:`SamplingFailed` on NaN and inf."""
    peak = float(logits.max())
    if not math.isfinite(peak):
        raise failure(peak)
    shifted = logits - np.float32(peak)
    shifted -= np.float32(math.log(float(np.exp(shifted).sum(dtype=np.float64))))
    return shifted


def logprobs_of(log_probs: Logits, token_id: int, num_top: int) -> Logprobs:
    """The report for one token from log probabilities [V]."""
    top = largest(log_probs, min(num_top, log_probs.size)) if num_top else np.empty(0, np.int64)
    return Logprobs(token_id, float(log_probs[token_id]), tuple((int(i), float(log_probs[i])) for i in top))


def _scaled_exp(logits: Logits, temperature: float) -> Logits:
    scaled = (logits - logits.max()) / np.float32(temperature)
    return cast(Logits, np.exp(scaled, out=scaled))


def _probabilities(logits: Logits, ids: Ids, temperature: float) -> npt.NDArray[np.float64]:
    """exp of the scaled distance to the likeliest, which stands first."""
    values = logits[ids].astype(np.float64)
    return cast(npt.NDArray[np.float64], np.exp((values - values[0]) / temperature))


def _set(value: float | None) -> float:
    assert value is not None, "sampling defaults must be filled in before sampling"
    return value


def failure(peak: float) -> SamplingFailed:
    """What is wrong with a row whose largest logit is ``peak``, which is not finite."""
    if peak == -math.inf:
        return SamplingFailed(
            "no token is allowed: the grammar, logit_bias and min_tokens together leave nothing to choose from"
        )
    return NotFinite(f"the logits ({peak}) are")
