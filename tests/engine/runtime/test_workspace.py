"""The planned workspace is what the largest steps really take: not less, and not so much more that context is lost for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helexa_engine.config import EngineConfig
from helexa_engine.llm import LLM
from helexa_engine.ops.registry import native_core
from helexa_engine.presets import write_preset_gguf
from helexa_engine.runtime.load import load_model
from helexa_engine.runtime.model_runner import ModelRunner
from helexa_engine.runtime.plan import plan_model
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.weights.checkpoint import open_checkpoint

MB = 10**6
TOKENS, SEQUENCES = 512, 4

PROGRAM = """
import json, re, sys
from helexa_engine import LLM, SamplingParams
from helexa_engine.runtime import load

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

plan_model, plans = load.plan_model, []
load.plan_model = lambda *args, **kwargs: plans.append(plan_model(*args, **kwargs)) or plans[-1]
llm = LLM(sys.argv[1], max_model_len=4096, max_num_seqs=4, max_num_batched_tokens=4096)
loaded = status("VmRSS")
greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
for i in range(6):  # no prompt begins like another
    llm.generate([[20 * i + j] + [k % 300 for k in range(1000)] for j in range(4)], greedy)
    llm.generate([20 * i + 9] + [k % 300 for k in range(4000)], greedy)
print(json.dumps({"planned": plans[0].memory.workspace_bytes, "grown": status("VmHWM") - loaded}))
"""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.rows = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), given)
        return out

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address in given or address in self._seen:
            return
        self._seen.add(address)
        self.live += nbytes
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._seen.discard(address)
            self.live -= nbytes

        weakref.finalize(storage, gone)


@pytest.mark.skipif(native_core() is None, reason="the twins need other memory")
@pytest.mark.parametrize("preset", ["qwen3-tiny", "qwen3.5-tiny", "qwen3-moe-tiny"])
def test_the_largest_steps_take_what_was_planned(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"{preset}.gguf"
    write_preset_gguf(path, preset, "Q4_K_M")
    config = EngineConfig(max_model_len=1024, max_num_seqs=SEQUENCES, max_num_batched_tokens=TOKENS, prefix_cache=False)
    with open_checkpoint(path) as checkpoint:
        planned = plan_model(checkpoint, config, name=preset).memory.workspace_bytes
    live = LiveBytes()
    for name in ("forward", "logits"):
        monkeypatch.setattr(ModelRunner, name, counted(getattr(ModelRunner, name), live))
    with LLM.of(load_model(path, config)) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        for count in range(1, SEQUENCES + 1):  # each number of sequences keeps a recorded step
            llm.generate([[7, 8, 9]] * count, greedy)
        llm.generate([[5] * (TOKENS // SEQUENCES)] * SEQUENCES, greedy)
        scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        llm.generate(list(range(TOKENS)), scored)
    assert live.rows == TOKENS, "no step was as large as a step may be"
    print(f"{preset}: planned {planned}, taken {live.peak}")
    assert live.peak <= planned
    if "moe" not in preset:  # experts compute in memory of the native core, which is not seen here
        assert planned <= 5 * live.peak


def counted(method: Any, live: LiveBytes) -> Any:
    """The method with the tensors that it makes counted."""

    def call(self: ModelRunner, *args: Any) -> Any:
        with live:
            out = method(self, *args)
        live.rows = max(live.rows, len(out))
        return out

    return call


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.skipif(native_core() is None, reason="the twins need other memory")
@pytest.mark.parametrize("preset", ["qwen3-tiny", "qwen3.5-tiny", "qwen3-moe-tiny"])
def test_a_process_grows_by_no_more(preset: str, tmp_path: Path) -> None:
    """The allocator's remnants included, and code that is used for the first time, which takes some megabytes."""
    path = tmp_path / f"{preset}.gguf"
    write_preset_gguf(path, preset, "Q4_K_M")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print(preset, seen)
    assert 8 * MB < seen["grown"], "this did not measure the steps"
    assert seen["grown"] <= seen["planned"] + 16 * MB
