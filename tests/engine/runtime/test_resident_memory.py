"""What a loaded model takes of the machine: at most the file, 15 % and the KV pages that were announced.

Counted is all that the process holds (VmRSS) after loading, less what it held with torch imported; helexa's and its libraries' own
code and tables, about 40 MB, count as the file's. Measured in a fresh process on the smallest file people have: Qwen3-0.6B's shape in
Q4_K_M.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from helexa_engine import presets
from helexa_engine.ops.registry import native_core
from helexa_engine.quant import mixes

MB = 10**6
PRESET = "qwen3-0.6b"
MIX = mixes.MIXES["Q4_K_M"]

PROGRAM = """
import json, re, sys
import torch

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

seen = {"before": status("VmRSS")}
from helexa_engine import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=1024, max_num_seqs=1, max_num_batched_tokens=128)
seen |= {"loaded": status("VmRSS"), "peak": status("VmHWM")}
seen |= {"kv": llm.model_info.kv_bytes, "weights": llm.model_info.weight_bytes}
seen["used"] = []
for _ in range(12):
    llm.generate(list(range(140)), SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    seen["used"].append(status("VmRSS"))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def preset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / f"{PRESET}-{MIX.name}.gguf"
    presets.write_preset_gguf(path, PRESET, MIX.name)
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
    largest = max(tensor.nbytes for tensor in presets.tensors(presets.preset(PRESET), MIX))
    assert seen["peak"] - seen["before"] <= 1.15 * size + seen["kv"] + largest
    # Work takes its workspace and no more: no library comes in with the first prompt or the first token.
    assert max(seen["used"]) - seen["loaded"] < 32 * MB
    # It takes it once. A leak grows with every use; allocators fill, trim and fill again now and then, by megabytes.
    growths = [after - before for before, after in itertools.pairwise(seen["used"])]
    assert statistics.median(growths) < MB // 16, growths
