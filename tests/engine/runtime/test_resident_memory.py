"""What a loaded model takes of the machine: at most the file, 15 % and the KV pages that were announced.

Counted is what the process holds (VmRSS) after loading, less what it held with torch imported and less torch's own code, of which
the kernel maps as much as it likes around each page that is used, whatever the file. The rest of helexa and of its libraries
counts as the file's. Measured in a fresh process on a file with the
shape of Qwen3-0.6B, its whole vocabulary, and fewer layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helexa_engine import presets
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import mixes

MB = 10**6
SHAPE = dataclasses.replace(presets.preset("qwen3-0.6b"), num_hidden_layers=8)
MIX = mixes.MIXES["Q4_K_M"]

PROGRAM = """
import json, re, sys
import torch

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def torch_code():
    total, counted = 0, False
    for line in open("/proc/self/smaps"):
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            counted = "/torch/lib/" in line
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total

seen = {"before": status("VmRSS") - torch_code()}
from helexa_engine import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=1024, max_num_seqs=1, max_num_batched_tokens=128)
seen |= {"loaded": status("VmRSS") - torch_code(), "peak": status("VmHWM") - torch_code()}
seen |= {"kv": llm.model_info.kv_bytes, "weights": llm.model_info.weight_bytes}
seen["used"] = []
for _ in range(5):
    llm.generate(list(range(300)), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    seen["used"].append(status("VmRSS"))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def preset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / f"cut-{MIX.name}.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "cut", SHAPE)
        presets.write_preset_gguf(path, "cut", MIX.name)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.skipif(native_core() is None, reason="the native core is not built")
def test_a_loaded_file_takes_its_size_and_little_more(preset_file: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(preset_file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    size = preset_file.stat().st_size
    grown = seen["loaded"] - seen["before"]
    print(f"file {size / MB:.1f} MB, KV pages {seen['kv'] / MB:.1f} MB, grown by {grown / MB:.1f} MB;", done.stdout)
    assert seen["weights"] + seen["kv"] < grown, "less than what it must hold: this did not measure the load"
    assert grown <= 1.15 * size + seen["kv"]
    # On the way no more than one tensor stands beside its packed form, and its pages are the file's own.
    largest = max(tensor.nbytes for tensor in presets.tensors(SHAPE, MIX))
    assert seen["peak"] - seen["before"] <= 1.15 * size + seen["kv"] + largest
    # Work takes its workspace once. A leak grows with every use; allocators and huge pages fill up in a few steps, so one use
    # that adds nothing is what tells them apart.
    growths = [after - before for before, after in itertools.pairwise(seen["used"])]
    assert min(growths) < MB // 4, growths
