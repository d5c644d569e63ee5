"""What ``import helexa_engine`` costs and offers."""

from __future__ import annotations

import subprocess
import sys

import helexa_engine

HEAVY = ("torch", "numpy", "tokenizers", "jinja2", "safetensors", "llguidance", "rich", "starlette", "uvicorn")


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_brings_nothing_heavy() -> None:
    """This is why it takes milliseconds: all that is slow to import waits for a model to be loaded."""
    listed = f"print([name for name in {HEAVY!r} + ('helexa_engine._native',) if name in sys.modules])"
    assert run(f"import sys, helexa_engine; {listed}") == "[]"
    assert run(f"import sys, helexa_engine; helexa_engine.SamplingParams(temperature=0.5); {listed}") == "[]"
    assert "torch" in run(f"import sys, helexa_engine.runtime.load; {listed}"), "a module this list must be able to see"


def test_every_public_name_is_there() -> None:
    for name in helexa_engine.__all__:
        assert getattr(helexa_engine, name) is not None
    assert set(helexa_engine.__all__) >= {"LLM", "AsyncEngine", "SamplingParams", "HelexaError"}
