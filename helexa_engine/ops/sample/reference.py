"""``sample`` in plain PyTorch: what ``runtime/sampler.py`` says of one row after the other."""

from __future__ import annotations

import math

import torch

from .rows import NOT_FINITE, NOTHING_ALLOWED, Sampled, SampleRow, SampleRows, unpack, write


def sample(logits: torch.Tensor, rows: SampleRows) -> torch.Tensor:
    """One token for each row.

    Args:
        logits: [N, V] float32; overwritten where ``rows.adjusts``.
        rows: how they are sampled.

    Returns:
        [rows.num_words, N] int64: the tokens first; :func:`~.rows.read` reads the rest.
    """
    settings = unpack(rows.table.cpu().numpy(), rows.num_rows)
    sampled = [_sample(values, row, rows.mask) for values, row in zip(logits, settings, strict=True)]
    return torch.from_numpy(write(sampled, rows.num_words)).to(logits.device)


def adjust(logits: torch.Tensor, row: SampleRow) -> None:
    """Adds biases, applies penalties and masks tokens: logits [V] in place."""
    logits[torch.from_numpy(row.bias_ids)] += torch.from_numpy(row.bias)
    ids, factor = torch.from_numpy(row.seen_ids), torch.tensor(row.repetition_penalty, dtype=torch.float32)
    seen = logits[ids]
    logits[ids] = torch.where(seen > 0, seen / factor, seen * factor)
    frequency = torch.tensor(row.frequency_penalty, dtype=torch.float32)
    presence = torch.tensor(row.presence_penalty, dtype=torch.float32)
    logits[torch.from_numpy(row.output_ids)] -= torch.from_numpy(row.output_counts) * frequency + presence
    logits[torch.from_numpy(row.masked_ids)] = -torch.inf


def allowed(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [V] with -inf for tokens whose bit of ``mask`` [at least ceil(V / 32)] int32 is not set."""
    bits = mask[:, None] >> torch.arange(32, dtype=torch.int32, device=mask.device) & 1
    return logits.masked_fill(bits.flatten()[: logits.numel()] == 0, -torch.inf)


def candidates(logits: torch.Tensor, row: SampleRow) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that survive the filters and their unnormalised probabilities (the likeliest has 1), in the order that they are drawn
    from: likeliest first and the lowest first among equals; without any filter that of ids.

    Args:
        logits: [V] float32, with a finite maximum.
    """
    by_k = 0 < row.top_k < logits.numel()
    rough = ((logits - logits.max()) / torch.tensor(row.temperature, dtype=torch.float32)).exp().double()
    if not by_k and row.top_p >= 1.0 and row.min_p <= 0.0:
        return torch.arange(logits.numel(), device=logits.device), rough
    values, ids = logits.sort(descending=True, stable=True)
    if by_k:
        values, ids = values[: row.top_k], ids[: row.top_k]
    probabilities = ((values.double() - values[0].double()) / row.temperature).exp()
    if row.top_p < 1.0:
        total = probabilities.sum() if by_k else rough.sum()
        kept = int((probabilities.cumsum(0) < row.top_p * total).sum()) + 1
        ids, probabilities = ids[:kept], probabilities[:kept]
    kept = int((probabilities >= row.min_p).sum())
    return ids[:kept], probabilities[:kept]


def _sample(raw: torch.Tensor, row: SampleRow, mask: torch.Tensor | None) -> Sampled:
    log_probs = None
    if row.num_logprobs is not None:
        peak = float(raw.max())  # NaN where there is one
        if not math.isfinite(peak):
            return _failure(peak)
        log_probs = raw - peak
        log_probs -= log_probs.exp().double().sum().log().float()
    adjust(raw, row)
    logits = raw
    if row.mask is not None:
        assert mask is not None
        logits = allowed(raw, mask[row.mask])
    if row.forced is not None:
        token_id = row.forced
    else:
        peak = float(logits.max())
        if not math.isfinite(peak):
            return _failure(peak)
        token_id = int((logits == peak).int().argmax()) if row.temperature == 0.0 else _draw(logits, row)
    if log_probs is None:
        return Sampled(token_id)
    values, ids = log_probs.sort(descending=True, stable=True)
    top = zip(ids[: row.num_logprobs].tolist(), values[: row.num_logprobs].tolist(), strict=True)
    return Sampled(token_id, logprob=float(log_probs[token_id]), top=tuple(top))


def _draw(logits: torch.Tensor, row: SampleRow) -> int:
    ids, probabilities = candidates(logits, row)
    cumulative = probabilities.cumsum(0)
    place = int((cumulative <= row.uniform * cumulative[-1]).sum())
    return int(ids[min(place, len(ids) - 1)])


def _failure(peak: float) -> Sampled:
    return Sampled(0, NOTHING_ALLOWED if peak == -math.inf else NOT_FINITE, peak)
