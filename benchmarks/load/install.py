"""Installs the load generator below ``.load`` in this tree, which git ignores, in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".load"

#: NVIDIA's AIPerf, which followed GenAI-Perf. Rows name the version, so it is fixed.
TOOL, VERSION = "aiperf", "0.13.0"


def program() -> Path:
    """The tool's executable, installed when it is not. Raises :class:`SystemExit` that says what went wrong."""
    environment = FOLDER / f"{TOOL}-{VERSION}"
    installed = environment / "bin" / TOOL
    if not installed.exists():
        print(f"installing {TOOL} {VERSION} into {environment.relative_to(ROOT)} (1.2 GB, two minutes)", flush=True)
        venv.create(environment, with_pip=True, clear=True)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, f"{TOOL}=={VERSION}"], capture_output=True, text=True)
        if done.returncode != 0 or not installed.exists():
            print(done.stderr, file=sys.stderr)
            raise SystemExit(f"{TOOL} {VERSION} could not be installed")
    return installed
