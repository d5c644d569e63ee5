"""Trains the demo model on the CPU: ``python -m helexa_engine.demo.train OUTPUT --minutes 60``.

Two data-parallel processes with one thread each (``--processes``), conversations packed into rows of fixed length that are computed
only within themselves, Muon for the matrices and AdamW for the rest, and a learning rate that warms up, stays, and decays to the end.

Time is the time spent on steps: a step much longer than its predecessors counts as an ordinary one, so a process that is stopped
for a while loses nothing of its schedule. A number in ``OUTPUT/minutes`` replaces ``--minutes`` while the training runs; the decay
starts ``--decay-minutes`` before that. Checkpoints are HuggingFace folders; ``--resume`` continues from one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3_5ForCausalLM

from . import conversations, hybrid, tokenizer

ROW = 384  #: tokens in a packed row
WARMUP_STEPS = 60
MUON_LR, MUON_WEIGHT_DECAY = 0.02, 0.01
ADAM_LR = 3e-3

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def packed_batches(encode: tokenizer.Encoder, seed: int, rows: int) -> Iterator[Batch]:
    """Endless (ids, weights, positions, segments), each [rows, ROW].

    Longest first into the first row with room, so that little is padding; what finds no room waits for the next batch.
    """
    samples = conversations.training(seed)
    waiting: list[tuple[list[int], list[float]]] = []
    while True:
        while sum(len(ids) for ids, _ in waiting) < 1.3 * rows * ROW:
            encoded = encode(next(samples))
            if len(encoded[0]) <= ROW:
                waiting.append(encoded)
        # The oldest samples must go, or long ones would always win.
        total = list(itertools.accumulate(len(ids) for ids, _ in waiting))
        due = sum(t <= rows * ROW for t in total)
        order = sorted(range(due), key=lambda i: -len(waiting[i][0])) + list(range(due, len(waiting)))
        ids = torch.zeros(rows, ROW, dtype=torch.int64)
        weights = torch.zeros(rows, ROW)
        positions = torch.zeros(rows, ROW, dtype=torch.int64)
        segments = torch.zeros(rows, ROW, dtype=torch.int64)
        used, count, left = [0] * rows, [0] * rows, []
        for i in order:
            length = len(waiting[i][0])
            row = next((r for r in range(rows) if used[r] + length <= ROW), None)
            if row is None:
                left.append(i)
                continue
            span = slice(used[row], used[row] + length)
            used[row] += length
            count[row] += 1
            ids[row, span] = torch.tensor(waiting[i][0])
            weights[row, span] = torch.tensor(waiting[i][1])
            positions[row, span] = torch.arange(length)
            segments[row, span] = count[row]
        waiting = [waiting[i] for i in sorted(left)]
        yield ids, weights, positions, segments


def token_losses(model: Qwen3_5ForCausalLM, ids: Tensor, positions: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, whether the likeliest token is the right one), both [B, T - 1], of the tokens after the first."""
    logits = model.lm_head(hybrid.hidden_states(model, ids, positions, segments)[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])
    return losses, logits.detach().argmax(-1) == ids[:, 1:]


class ActiveTime:
    """Seconds spent on steps, where a step counts for at most three times the median of the last ones."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._recent: deque[float] = deque(maxlen=25)
        self._last = time.monotonic()

    def step(self) -> None:
        """Call at the end of every step."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        self._recent.append(took)
        self.seconds += min(took, 3 * statistics.median(self._recent))


def learning_rate(step: int, elapsed: float, seconds: float, decay_seconds: float) -> float:
    """Multiplier: linear warm-up by steps, constant, then linear to almost zero over the last ``decay_seconds``."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = (seconds - elapsed) / decay_seconds
    return max(0.01, min(warmup, decay))


def held_out_scores(
    model: Qwen3_5ForCausalLM, encode: tokenizer.Encoder, rows: int, n: int = 16
) -> dict[str, tuple[float, float]]:
    """Per skill (mean loss of the last answer's tokens, share of samples whose greedy answer would be the expected one)."""
    scores = {}
    with torch.no_grad():
        for skill in conversations.SKILLS:
            encoded = (encode(sample) for sample in conversations.held_out(skill, 2 * n, seed=1))
            fitting = [(ids, weights) for ids, weights in encoded if len(ids) <= ROW][:n]
            total = weight = right = 0.0
            for start in range(0, len(fitting), rows):
                ids, answers = torch.zeros(rows, ROW, dtype=torch.int64), torch.zeros(rows, ROW)
                some = fitting[start : start + rows]
                for row, (tokens, weights) in enumerate(some):
                    ids[row, : len(tokens)] = torch.tensor(tokens)
                    counts = [float(w >= 1) for w in weights]
                    end = len(counts) - counts[::-1].index(1.0)
                    begin = end - (counts[:end][::-1] + [0.0]).index(0.0)
                    answers[row, begin:end] = 1.0
                losses, good = token_losses(
                    model, ids, torch.arange(ROW).expand(rows, ROW), torch.ones(rows, ROW, dtype=torch.int64)
                )
                total += float((losses * answers[:, 1:]).sum())
                weight += float(answers.sum())
                right += float((good | (answers[:, 1:] == 0)).all(1)[: len(some)].sum())
            scores[skill] = (total / weight, right / len(fitting))
    return scores


def train(rank: int, args: argparse.Namespace) -> None:
    """One of the data-parallel processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{args.rendezvous}",
        rank=rank,
        world_size=args.processes,
        timeout=timedelta(minutes=30),
    )
    torch.manual_seed(0)
    model = hybrid.new_model() if args.resume is None else Qwen3_5ForCausalLM.from_pretrained(args.resume)
    if args.compile:
        hybrid.compile_layers()
    encode = tokenizer.Encoder(tokenizer.load(args.output))
    batches = packed_batches(encode, args.seed * 1000 + rank, args.rows)

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2 and min(p.shape) > 16]
    by_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in by_muon]
    owner = {
        id(p): i % args.processes for i, p in enumerate(matrices)
    }  # Muon's work is shared out; results are broadcast
    mine = [p for p in matrices if owner[id(p)] == rank]
    optimizers = [
        torch.optim.Muon(mine, lr=MUON_LR, momentum=0.95, weight_decay=MUON_WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    peak = [MUON_LR * args.lr_scale, ADAM_LR * args.lr_scale]
    step = 0
    if args.resume is not None:
        state = torch.load(args.resume / f"optimizer_{rank}.pt")
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    parameters = matrices + others

    def save(folder: Path) -> None:
        if rank == 0:
            model.save_pretrained(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"optimizers": [o.state_dict() for o in optimizers], "step": step}
        torch.save(state, folder / f"optimizer_{rank}.pt")

    start = time.monotonic()
    active, minutes, last_save = ActiveTime(), args.minutes, 0.0
    tokens = 0
    while True:
        batch = next(batches)
        if rank == 0 and (args.output / "minutes").exists():
            minutes = float((args.output / "minutes").read_text())
        finished = active.seconds >= minutes * 60
        control = torch.tensor(
            [
                learning_rate(step, active.seconds, minutes * 60, args.decay_minutes * 60),
                finished,
                finished or active.seconds - last_save > args.save_minutes * 60,
            ]
        )
        dist.broadcast(control, 0)
        multiplier, stop, save_now = control.tolist()
        if save_now:
            save(args.output / "checkpoint")
            last_save = active.seconds
        if stop:
            break
        for optimizer, lr in zip(optimizers, peak, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * multiplier
        for p in parameters:
            p.grad = None
        ids, weights, positions, segments = batch
        loss = (token_losses(model, ids, positions, segments)[0] * weights[:, 1:]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.stack([loss.detach(), batch[1][:, 1:].sum()])])
        dist.all_reduce(flat)
        total_loss, total_weight = flat[-2].item(), flat[-1].item()
        flat /= total_weight
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters] + [2]), strict=False):  # type: ignore[no-untyped-call]
            p.grad = grad.view_as(p)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for r in range(args.processes):
                theirs = [p for p in matrices if owner[id(p)] == r]
                flat = torch.cat([p.flatten() for p in theirs])
                dist.broadcast(flat, r)
                for p, new in zip(theirs, flat.split([p.numel() for p in theirs]), strict=True):  # type: ignore[no-untyped-call]
                    p.copy_(new.view_as(p))
        step += 1
        active.step()
        tokens += args.processes * int((segments > 0).sum())
        if rank == 0 and step % 10 == 0:
            rate = tokens / active.seconds
            print(
                f"step {step}  {active.seconds / 60:.1f} of {minutes:.1f} min ({(time.monotonic() - start) / 60:.1f} on the clock)  "
                f"loss {total_loss / total_weight:.4f}  lr {multiplier:.3f}  {tokens / 1e6:.2f} M tokens, {rate:.0f} a second",
                flush=True,
            )
            if step % args.evaluate_every == 0:
                scores = held_out_scores(model, encode, args.rows)
                print("held out", "  ".join(f"{k} {x:.3f} {y:.0%}" for k, (x, y) in scores.items()), flush=True)
            if not math.isfinite(total_loss):
                raise RuntimeError("the loss is not finite; use a smaller --lr-scale")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the tokenizer and the checkpoint")
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train; the schedule ends with it [60]")
    parser.add_argument(
        "--decay-minutes", type=float, default=24.0, help="the last time, in which the rate decays [24]"
    )
    parser.add_argument("--lr-scale", type=float, default=1.0, help="multiplier of both learning rates [1]")
    parser.add_argument("--rows", type=int, default=4, help=f"packed rows of {ROW} tokens a process and step [4]")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="seed of the conversations; take another to resume [1]")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between checkpoints [5]")
    parser.add_argument("--evaluate-every", type=int, default=250, help="steps between held-out scores [250]")
    parser.add_argument("--resume", type=Path, help="checkpoint folder to continue from")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "tokenizer.json").exists():
        samples = itertools.islice(conversations.training(seed=0), 15_000)
        trained: Tokenizer = tokenizer.train_tokenizer(tokenizer.conversation(s) for s in samples)
        trained.save(str(args.output / "tokenizer.json"))
    if args.rank is not None:
        train(args.rank, args)
        return
    # Plain child processes with this command line, rather than forks of a pool, so that tools can find and pause them.
    rendezvous = args.output / f"rendezvous_{os.getpid()}"
    command = [
        sys.executable,
        "-m",
        "helexa_engine.demo.train",
        *sys.argv[1:],
        "--rendezvous",
        str(rendezvous),
        "--rank",
    ]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(args.processes)]
    try:
        failed = [worker for worker in workers if worker.wait() != 0]
    finally:
        for worker in workers:
            worker.terminate()
        rendezvous.unlink(missing_ok=True)
    if failed:
        raise SystemExit("training failed; see the messages above")


if __name__ == "__main__":
    main()
