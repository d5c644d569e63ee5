"""Installs the clients below ``.agents`` in this tree, which git ignores. What cannot be had is told, and stops nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".agents"
SECONDS = 600

#: Folders of Python packages; each goes ahead of this environment's own packages on the path of the tests that use it.
PYTHON = {
    "older": ("openai>=2,<3", "anthropic>=1,<2"),
    "libraries": ("litellm", "instructor", "anthropic"),
}
AI_SDK = ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "@ai-sdk/anthropic", "zod")


def python_packages(name: str) -> str | None:
    """Makes the folder ``name`` of :data:`PYTHON`; what went wrong, if anything did."""
    target = FOLDER / "python" / name
    if target.exists():
        return None
    partial = target.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(partial)]
    why = _run([*pip, *PYTHON[name]], ROOT)
    if why is None:
        partial.rename(target)
    return why


def python_version(name: str, package: str) -> str:
    """Version of ``package`` in the folder ``name``, which has it."""
    (found,) = (FOLDER / "python" / name).glob(f"{package}-*.dist-info")
    return found.name.removesuffix(".dist-info").partition("-")[2]


def npm_packages(*packages: str) -> str | None:
    """Adds packages to ``node_modules``; what went wrong, if anything did."""
    if shutil.which("npm") is None:
        return "npm is not installed"
    FOLDER.mkdir(exist_ok=True)
    if all((FOLDER / "node_modules" / package / "package.json").exists() for package in packages):
        return None
    npm = ["npm", "install", "--prefix", str(FOLDER), "--no-audit", "--no-fund", "--loglevel=error"]
    return _run([*npm, *packages], ROOT)


def npm_version(package: str) -> str:
    manifest = json.loads((FOLDER / "node_modules" / package / "package.json").read_text("utf-8"))
    return str(manifest["version"])


def _run(command: list[str], folder: Path) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"installing took longer than {SECONDS} s"
    if done.returncode == 0:
        return None
    last = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("[notice]")][-1:]
    # Addresses of package indexes are this machine's business.
    return re.sub(r"https?://\S+", "(address)", f"installing failed: {last[0] if last else done.returncode}")
