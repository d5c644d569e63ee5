"""Trains the demo model on the CPU: ``python -m helexa_engine.demo.train OUTPUT --minutes 60``.

Two data-parallel processes with one thread each (``--processes``), conversations packed into rows of fixed length that attend
only within themselves, Muon for the matrices and AdamW for the rest, and a learning rate that warms up, stays, and decays so as
to end at the deadline whatever the machine's speed. Checkpoints are HuggingFace folders; ``--resume`` continues from one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from . import conversations, tokenizer

ROW = 384  #: tokens in a packed row
WARMUP_STEPS = 40
MUON_LR, MUON_WEIGHT_DECAY = 0.02, 0.01
ADAM_LR = 4e-3

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def model_config() -> Qwen3Config:
    """Qwen3 dense, 5.2 M parameters, every matrix with rows of a multiple of 256."""
    return Qwen3Config(  # type: ignore[call-arg]
        vocab_size=tokenizer.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=tokenizer.VOCAB_SIZE - len(tokenizer.MARKERS) - 1,
        pad_token_id=tokenizer.VOCAB_SIZE - len(tokenizer.MARKERS) - 3,
    )


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


def loss_sum(model: Qwen3ForCausalLM, ids: Tensor, weights: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    """Weighted sum of the token losses, without the mean: the ranks divide by the weight of the whole batch."""
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
    hidden = model.model(
        input_ids=ids, position_ids=positions, attention_mask={"full_attention": mask}, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def learning_rate(step: int, elapsed: float, seconds: float, decay_share: float) -> float:
    """Multiplier: linear warm-up by steps, constant, then linear to almost zero over the last share of the time."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = (seconds - elapsed) / (decay_share * seconds)
    return max(0.01, min(warmup, decay))


def held_out_losses(model: Qwen3ForCausalLM, encode: tokenizer.Encoder, n: int = 8) -> dict[str, float]:
    """Mean loss of the answers' tokens per skill, on held-out samples."""
    losses = {}
    with torch.no_grad():
        for skill in conversations.SKILLS:
            total, weight = 0.0, 0.0
            for sample in conversations.held_out(skill, n, seed=1):
                ids, weights = encode(sample)
                t = torch.tensor([ids])
                w = (torch.tensor([weights]) >= 1).float()
                total += float(loss_sum(model, t, w, torch.arange(len(ids))[None], torch.ones_like(t)))
                weight += float(w.sum())
            losses[skill] = total / weight
    return losses


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
    model = Qwen3ForCausalLM(model_config()) if args.resume is None else Qwen3ForCausalLM.from_pretrained(args.resume)
    encode = tokenizer.Encoder(tokenizer.load(args.output))
    batches = packed_batches(encode, args.seed * 1000 + rank, args.rows)

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2] + [model.model.embed_tokens.weight]
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
    compiled = torch.compile(loss_sum) if args.compile else loss_sum

    def save(folder: Path) -> None:
        if rank == 0:
            model.save_pretrained(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"optimizers": [o.state_dict() for o in optimizers], "step": step}
        torch.save(state, folder / f"optimizer_{rank}.pt")

    start = last_save = time.monotonic()
    tokens = 0
    while True:
        batch = next(batches)
        elapsed = time.monotonic() - start
        control = torch.tensor(
            [
                learning_rate(step, elapsed, args.minutes * 60, args.decay_share),
                elapsed >= args.minutes * 60,
                elapsed - (last_save - start) > args.save_minutes * 60,
            ]
        )
        dist.broadcast(control, 0)
        multiplier, finished, save_now = control.tolist()
        if save_now or finished:
            save(args.output / "checkpoint")
            last_save = time.monotonic()
        if finished:
            break
        for optimizer, lr in zip(optimizers, peak, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * multiplier
        for p in parameters:
            p.grad = None
        loss = compiled(model, *batch)
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
        tokens += args.processes * int((batch[3] > 0).sum())
        if rank == 0 and step % 10 == 0:
            rate = tokens / (time.monotonic() - start)
            print(
                f"step {step}  {elapsed / 60:.1f} min  loss {total_loss / total_weight:.4f}  lr {multiplier:.3f}  {rate:.0f} tokens/s",
                flush=True,
            )
            if step % args.evaluate_every == 0:
                print(
                    "held out",
                    json.dumps({k: round(v, 3) for k, v in held_out_losses(model, encode).items()}),
                    flush=True,
                )
            if not math.isfinite(total_loss):
                raise RuntimeError("the loss is not finite; use a smaller --lr-scale")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the tokenizer and the checkpoint")
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train; the schedule ends with it [60]")
    parser.add_argument(
        "--decay-share", type=float, default=0.4, help="share of the time in which the rate decays [0.4]"
    )
    parser.add_argument("--lr-scale", type=float, default=1.0, help="multiplier of both learning rates [1]")
    parser.add_argument("--rows", type=int, default=8, help=f"packed rows of {ROW} tokens a process and step [8]")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="seed of the conversations; take another to resume [1]")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between checkpoints [5]")
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps between held-out losses [100]")
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
