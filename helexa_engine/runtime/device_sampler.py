"""Sampling where the logits lie: a batch of :class:`~.sampler.Sampler` over ``ops.sample``.

What a sampler knows (settings, counts of tokens, what its grammar allows) goes to the device in one table and one array of masks, the
logits stay there, and a few words of each row come back. The tokens themselves are on the device before that, so that the next step may
begin with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..ops.sample import sample
from ..ops.sample.rows import NOTHING_ALLOWED, OK, Sampled, SampleRow, SampleRows, pack, read
from .sampler import Logprobs, Outcome, Sampler, failure


@dataclass(slots=True)
class Pending:
    """A batch whose tokens are being chosen.

    Attributes:
        token_ids: [N] int64 where the logits lie; a row that fails has a token of no meaning, but of the vocabulary.
    """

    token_ids: torch.Tensor
    _words: torch.Tensor  # as ops.sample gives them
    _samplers: Sequence[Sampler]
    _num_logprobs: list[int | None]
    _errors: dict[int, Exception]

    def outcomes(self) -> list[Outcome]:
        """Waits for the device, advances the samplers, and says what came of each row. To be called once."""
        sampled = read(self._words.cpu().numpy(), self._num_logprobs)
        return [self._outcome(i, sampler, sampled[i]) for i, sampler in enumerate(self._samplers)]

    def _outcome(self, i: int, sampler: Sampler, sampled: Sampled) -> Outcome:
        if i in self._errors:
            return self._errors[i]
        if sampled.status != OK:
            return failure(-math.inf if sampled.status == NOTHING_ALLOWED else sampled.peak)
        try:
            sampler.accept(sampled.token_id)
        except Exception as error:  # a grammar may raise anything; the others in the batch are not to blame
            return error
        if sampled.logprob is None:
            return sampled.token_id, None
        return sampled.token_id, Logprobs(sampled.token_id, sampled.logprob, sampled.top)


class DeviceSampler:
    """Samples from logits on one device.

    Args:
        device: type of the device that logits will lie on, as ops know it (``"cuda"``).
    """

    def __init__(self, device: str) -> None:
        self._kernels = sample.choose(device)

    def sample(self, samplers: Sequence[Sampler], logits: torch.Tensor) -> Pending:
        """Queues the choice of a token for each row; waits for nothing.

        Args:
            samplers: one a row; none of them may be sampled again before :meth:`Pending.outcomes` is called.
            logits: [N, V] float32 on the device; overwritten.
        """
        vocab_size = logits.shape[1]
        rows: list[SampleRow] = []
        masks: list[npt.NDArray[np.int32]] = []
        errors: dict[int, Exception] = {}
        for i, sampler in enumerate(samplers):
            try:
                row = sampler.row()
                _hold(row, sampler, vocab_size, masks)
            except Exception as error:  # as above
                errors[i], row = error, SampleRow()
            if row.num_logprobs is not None:
                row.num_logprobs = min(row.num_logprobs, vocab_size)
            rows.append(row)
        num_logprobs = [row.num_logprobs for row in rows]
        table = SampleRows(
            table=_moved(pack(rows), logits.device),
            num_rows=len(rows),
            adjusts=any(row.has_lists for row in rows),
            num_logprobs=max((count for count in num_logprobs if count is not None), default=None),
            mask=_moved(np.stack(masks), logits.device) if masks else None,
        )
        with torch.inference_mode():
            words = self._kernels.sample(logits, table)
        return Pending(words[0], words, samplers, num_logprobs, errors)


def _hold(row: SampleRow, sampler: Sampler, vocab_size: int, masks: list[npt.NDArray[np.int32]]) -> None:
    """Tells ``row`` what the grammar allows, by a mask that joins ``masks`` where it takes one. Raises whatever a grammar raises."""
    if sampler.grammar is None:
        return
    row.forced = sampler.grammar.forced_token()
    if row.forced is None:
        mask = np.empty((vocab_size + 31) // 32, np.int32)
        if sampler.grammar.fill_mask(mask):
            row.mask = len(masks)
            masks.append(mask)


def _moved(array: npt.NDArray[np.uint8] | npt.NDArray[np.int32], device: torch.device) -> torch.Tensor:
    """A copy on ``device``, queued from memory that the device can read by itself."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
