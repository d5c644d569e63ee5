"""What rows are sampled by, as one table in memory, and what comes of it: the layouts that ``csrc/cuda/sample.h`` has in C."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Ids = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]

#: ``SampleRow``: temperature, top_p, min_p, uniform; the penalties for repetition, frequency and presence; top_k; where among the entries
#: the biases, the seen, the generated and the masked tokens begin, and the end; mask, forced and num_logprobs, -1 for None.
ROW = struct.Struct("=4d3f9i")
#: ``SampleEntry``.
ENTRY = np.dtype([("id", "i4"), ("value", "f4")])

OK, NOT_FINITE, NOTHING_ALLOWED = range(3)


_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_LARGEST_INT = 2**31 - 1

_NO_IDS: Ids = np.empty(0, np.int64)
_NO_NUMBERS: Numbers = np.empty(0, np.float32)


def _no_ids() -> Ids:
    return _NO_IDS


def _no_numbers() -> Numbers:
    return _NO_NUMBERS


@dataclass(slots=True)
class SampleRow:
    """How one row is sampled, in the words of :class:`~helexa_engine.sampling_params.SamplingParams`.

    Attributes:
        uniform: the draw, in [0, 1).
        bias_ids, bias: added to these tokens' logits.
        seen_ids: tokens of prompt and answer, for ``repetition_penalty``.
        output_ids, output_counts: tokens of the answer and how often each occurred, for the other two penalties.
        masked_ids: tokens that may not come.
        mask: the row of :attr:`SampleRows.mask` that holds; None: everything is allowed.
        forced: the only token that may come, whatever its logit; None: there is none.
        num_logprobs: how many of the likeliest are reported beside the token's log probability; None: no log probabilities.

    No token occurs twice in one list.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias_ids: Ids = field(default_factory=_no_ids)
    bias: Numbers = field(default_factory=_no_numbers)
    seen_ids: Ids = field(default_factory=_no_ids)
    output_ids: Ids = field(default_factory=_no_ids)
    output_counts: Numbers = field(default_factory=_no_numbers)
    masked_ids: Ids = field(default_factory=_no_ids)
    mask: int | None = None
    forced: int | None = None
    num_logprobs: int | None = None

    @property
    def has_lists(self) -> bool:
        """Whether anything is done to its logits."""
        return any(map(len, (self.bias_ids, self.seen_ids, self.output_ids, self.masked_ids)))


@dataclass(frozen=True, slots=True)
class SampleRows:
    """How rows are sampled, where their logits lie.

    Attributes:
        table: uint8: ``num_rows`` of :data:`ROW`, then their :data:`ENTRY`.
        adjusts: whether any row has lists, so that logits are changed in place.
        num_logprobs: the most of :attr:`SampleRow.num_logprobs`; None: no row wants log probabilities.
        mask: int32 [M, at least ceil(V / 32)]: bit i % 32 of word i // 32 says whether token i may come; None where no row has one.
    """

    table: torch.Tensor
    num_rows: int
    adjusts: bool = False
    num_logprobs: int | None = None
    mask: torch.Tensor | None = None

    @property
    def num_words(self) -> int:
        """Words of each row's result."""
        return 2 if self.num_logprobs is None else 3 + self.num_logprobs


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came of one row.

    Attributes:
        token_id: the token; of no meaning unless ``status`` is :data:`OK`.
        status: :data:`OK`, :data:`NOT_FINITE` or :data:`NOTHING_ALLOWED`.
        peak: the largest logit, where it is not finite.
        logprob: of the token, where it was asked for.
        top: the likeliest tokens with their log probabilities, likeliest first.
    """

    token_id: int
    status: int = OK
    peak: float = 0.0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def pack(rows: Sequence[SampleRow]) -> npt.NDArray[np.uint8]:
    """The table of ``rows``."""
    settings = bytearray(len(rows) * ROW.size)
    ids: list[Ids] = []
    values: list[Numbers] = []
    size = 0
    for i, row in enumerate(rows):
        ends = [size, size, size, size, size]
        if row.has_lists:
            lists: list[tuple[Ids, Numbers | None]] = [
                (row.bias_ids, row.bias),
                (row.seen_ids, None),
                (row.output_ids, row.output_counts),
                (row.masked_ids, None),
            ]
            for k, (tokens, numbers) in enumerate(lists):
                size += len(tokens)
                ends[k + 1] = size
                ids.append(tokens)
                values.append(np.zeros(len(tokens), np.float32) if numbers is None else numbers)
        ROW.pack_into(
            settings,
            i * ROW.size,
            row.temperature,
            row.top_p,
            row.min_p,
            row.uniform,
            min(row.repetition_penalty, _LARGEST_FLOAT),
            row.frequency_penalty,
            row.presence_penalty,
            min(row.top_k, _LARGEST_INT),
            *ends,
            -1 if row.mask is None else row.mask,
            -1 if row.forced is None else row.forced,
            -1 if row.num_logprobs is None else row.num_logprobs,
        )
    packed = np.frombuffer(settings, np.uint8)
    if not size:
        return packed
    entries = np.empty(size, ENTRY)
    entries["id"] = np.concatenate(ids)
    entries["value"] = np.concatenate(values)
    return np.concatenate([packed, entries.view(np.uint8)])


def unpack(table: npt.NDArray[np.uint8], num_rows: int) -> list[SampleRow]:
    """What :func:`pack` was given."""
    entries = table[num_rows * ROW.size :].view(ENTRY)
    rows = []
    for numbers in ROW.iter_unpack(table[: num_rows * ROW.size].tobytes()):
        ends = numbers[8:13]
        parts = [entries[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
        ids = [part["id"].astype(np.int64) for part in parts]
        mask, forced, num_logprobs = (None if number < 0 else number for number in numbers[13:])
        rows.append(
            SampleRow(
                temperature=numbers[0],
                top_p=numbers[1],
                min_p=numbers[2],
                uniform=numbers[3],
                repetition_penalty=numbers[4],
                frequency_penalty=numbers[5],
                presence_penalty=numbers[6],
                top_k=numbers[7],
                bias_ids=ids[0],
                bias=parts[0]["value"].copy(),
                seen_ids=ids[1],
                output_ids=ids[2],
                output_counts=parts[2]["value"].copy(),
                masked_ids=ids[3],
                mask=mask,
                forced=forced,
                num_logprobs=num_logprobs,
            )
        )
    return rows


def write(sampled: Sequence[Sampled], num_words: int) -> npt.NDArray[np.int64]:
    """The result [num_words, N] that says ``sampled``: token; status and the largest logit's bits; the log probability's bits; the
    likeliest tokens, each with its log probability's bits in the upper half."""
    words = np.zeros((num_words, len(sampled)), np.int64)
    for column, row in zip(words.T, sampled, strict=True):
        column[0] = row.token_id
        column[1] = row.status | _bits(row.peak) << 32
        if row.logprob is not None:
            column[2] = _bits(row.logprob)
            column[3 : 3 + len(row.top)] = [np.int64(token | _bits(value) << 32) for token, value in row.top]
    return words


def read(words: npt.NDArray[np.int64], num_logprobs: Sequence[int | None]) -> list[Sampled]:
    """What the result [num_words, N] says of rows that asked for ``num_logprobs``, each at most V."""
    low = words & 0xFFFFFFFF
    high = (words >> 32).astype(np.int32).view(np.float32)
    bits = low.astype(np.uint32).view(np.float32)
    rows = []
    for i, count in enumerate(num_logprobs):
        token_id, status = int(words[0, i]), int(low[1, i])
        if status != OK:
            rows.append(Sampled(0, status, float(high[1, i])))
        elif count is None:
            rows.append(Sampled(token_id))
        else:
            top = zip(low[3 : 3 + count, i].tolist(), high[3 : 3 + count, i].tolist(), strict=True)
            rows.append(Sampled(token_id, logprob=float(bits[2, i]), top=tuple(top)))
    return rows


def _bits(value: float) -> int:
    """A float32's bits as a signed number."""
    return int(np.float32(value).view(np.int32))
