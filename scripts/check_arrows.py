"""Draws the import arrows of ARCHITECTURE.md from the sources and fails on a wrong one.

A room may import what its row names, itself, and the leaves. Imports under ``if TYPE_CHECKING:`` are types, not arrows.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LEAVES = {
    f"helexa_engine.{name}"
    for name in (
        "architectures",
        "errors",
        "events",
        "generate_request",
        "sampling_params",
        "env",
        "config",
        "version",
        "batch",
        "demo",
    )
} | {"helexa_engine"}

#: room -> rooms it may import. A room is a package or module; the longest matching name wins.
ARROWS: dict[str, set[str]] = {
    "helexa_engine.quant": set(),
    "helexa_engine.ops": {"helexa_engine.quant", "helexa_engine._native"},
    "helexa_engine.cache": set(),
    "helexa_engine.cache.spec": set(),
    "helexa_engine.distributed": set(),
    "helexa_engine.layers": {
        "helexa_engine.ops", "helexa_engine.quant", "helexa_engine.distributed", "helexa_engine.cache.spec",
    },
    "helexa_engine.models": {
        "helexa_engine.layers", "helexa_engine.ops", "helexa_engine.quant", "helexa_engine.cache.spec",
    },
    "helexa_engine.weights": {"helexa_engine.quant", "helexa_engine.ops"},
    "helexa_engine.text": {"helexa_engine.text.messages"},
    "helexa_engine.text.messages": {"helexa_engine.text"},
    "helexa_engine.presets": {"helexa_engine.quant", "helexa_engine.weights"},
    "helexa_engine.runtime.sequence": {"helexa_engine.cache"},
    "helexa_engine.runtime.scheduler": {
        "helexa_engine.cache", "helexa_engine.runtime.sequence", "helexa_engine.runtime.step_pace",
    },
    "helexa_engine.runtime.step_pace": set(),
    "helexa_engine.runtime.sampler": {"helexa_engine.ops"},
    "helexa_engine.runtime": {
        "helexa_engine.runtime", "helexa_engine.cache", "helexa_engine.cache.spec", "helexa_engine.models",
        "helexa_engine.ops", "helexa_engine.weights", "helexa_engine.text", "helexa_engine.quant",
    },
    "helexa_engine.llm": {
        "helexa_engine.runtime", "helexa_engine.text", "helexa_engine.weights", "helexa_engine.models",
    },
    "helexa_engine.cli": {
        "helexa_engine.llm", "helexa_engine.presets", "helexa_engine.quant", "helexa_engine.runtime", "helexa_engine.text",
        "helexa_engine.weights", "helexa_engine.models", "helexa_engine.ops", "helexa_engine._native", "helexa_server",
        "helexa_engine.cache.spec",
    },
    "helexa_engine.testing": {
        "helexa_engine.weights", "helexa_engine.quant", "helexa_engine.runtime", "helexa_engine.text",
        "helexa_engine.models", "helexa_engine.ops", "helexa_engine.presets", "helexa_engine.cache",
    },
    "helexa_server.wire": {"helexa_engine.text.messages"},
    "helexa_server": {"helexa_server", "helexa_engine.runtime.async_engine", "helexa_engine.runtime.memory",
        "helexa_engine.runtime.memory_need", "helexa_engine.runtime.nvml", "helexa_engine.runtime.cuda_facts",
        "helexa_engine.cli.machine",
   },
}  # fmt: skip

#: packages a room must not import at all, even from outside.
FORBIDDEN: dict[str, set[str]] = {
    "helexa_server": {"torch", "numpy"},
    "helexa_server.wire": {"starlette", "uvicorn"},
    "helexa_engine.cache": {"torch"},
    "helexa_engine.cache.spec": set(),
    "helexa_engine.runtime.scheduler": {"torch", "numpy"},
    "helexa_engine.runtime.sequence": {"torch", "numpy"},
    "helexa_engine.runtime.step_pace": {"torch", "numpy"},
}

#: leaves import nothing of ours but leaves, and no torch.
LEAF_FORBIDDEN = {"torch", "numpy"}


def room_of(module: str, rooms: set[str]) -> str | None:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in rooms:
            return name
    return None


def imports(path: Path, module: str) -> list[tuple[int, str]]:
    """(line, imported module) of every import that runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    typing_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only.update(child for statement in node.body for child in ast.walk(statement))
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            for alias in node.names:
                below = ROOT / Path(*base.split(".")) / alias.name
                is_module = below.is_dir() or below.with_suffix(".py").exists() or alias.name == "_native"
                found.append((node.lineno, f"{base}.{alias.name}" if is_module else base))
    return found


def main() -> int:
    rooms = set(ARROWS)
    wrong: list[str] = []
    for top in ("helexa_engine", "helexa_server"):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT).with_suffix("")
            module = ".".join(relative.parts).removesuffix(".__init__")
            room = room_of(module, rooms)
            leaf = module in LEAVES or module.startswith("helexa_engine.demo")
            forbidden = FORBIDDEN.get(room or "", set()) if room else LEAF_FORBIDDEN if module in LEAVES else set()
            for line, target in imports(path, module):
                place = f"{path.relative_to(ROOT)}:{line}: {module} -> {target}"
                if target.split(".")[0] in forbidden:
                    wrong.append(f"{place}: this room must not import {target.split('.')[0]}")
                if not target.startswith(("helexa_engine", "helexa_server")):
                    continue
                if leaf and module == "helexa_engine":
                    continue  # the public names, loaded on demand
                if room is None:
                    if leaf and target not in LEAVES and room_of(target, rooms) is not None and module in LEAVES:
                        wrong.append(f"{place}: a leaf imports only leaves")
                    continue
                target_room = room_of(target, rooms)
                if target in LEAVES or target.startswith("helexa_engine.demo") or target_room == room:
                    continue
                allowed = ARROWS[room]
                if (
                    target not in allowed
                    and target_room not in allowed
                    and not any(target.startswith(f"{a}.") for a in allowed)
                ):
                    wrong.append(f"{place}: not an arrow of {room}")
    if wrong:
        print("\n".join(wrong))
        return 1
    print("import arrows hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
