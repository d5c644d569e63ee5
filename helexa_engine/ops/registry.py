"""Ops and their implementations: the table that names a twin and its fast forms, and chooses between them.

An op's ``reference`` is plain PyTorch and the definition. An :class:`Implementation` is a module with the same functions.
:meth:`Op.choose` runs once, when a layer is built; the choice is logged once. Falling back to the reference because the native
core is missing is said aloud, never silent; ``HELEXA_OPS=op=implementation`` forces one or raises with the facts.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import env
from ..errors import BackendUnavailable
from . import cuda

logger = logging.getLogger("helexa.ops")

Facts = Mapping[str, Any]


@functools.cache
def native_core() -> ModuleType | None:
    """The compiled core, set up as the environment asks; None where the package was installed without it.

    Raises:
        BackendUnavailable: ``HELEXA_CPU_ISA`` names a level that this processor or build does not have.
    """
    try:
        core = importlib.import_module("helexa_engine._native")
    except ModuleNotFoundError:
        return None
    if (isa := env.cpu_isa()) is not None:
        try:
            core.set_cpu_isa(isa)
        except ValueError as error:
            raise BackendUnavailable(f"HELEXA_CPU_ISA={isa}: {error}") from None
    if (threads := env.num_threads()) is not None:
        core.set_num_threads(threads)
    return core


def require_native() -> ModuleType:
    """The compiled core. Raises :class:`BackendUnavailable`."""
    core = native_core()
    if core is None:
        raise BackendUnavailable(
            "the native core is not built; install a C++17 compiler and CMake and install helexa again"
        )
    return core


@dataclass(frozen=True)
class Implementation:
    """One fast form of an op.

    Attributes:
        name: how ``HELEXA_OPS`` and the log call it.
        device: device type it runs on.
        module: dotted name of the module that implements it, imported when it is chosen.
        supports: whether it can run with these facts (shapes, types).
        computes_in: the dtype it multiplies in; the yardstick of its tests.
        needs_native: whether it lives in the compiled core.
        needs_package: a Python package that it imports and that may be missing.
    """

    name: str
    device: str
    module: str
    supports: Callable[[Facts], bool] = field(default=lambda facts: True)
    computes_in: str = "float32"
    needs_native: bool = True
    needs_package: str | None = None

    def why_not(self, device: str, facts: Facts, *, is_here: bool = True) -> str | None:
        """None when it can run, else the reason; unless it ``is_here`` that it is to run, without regard to what this build has."""
        if device != self.device:
            return f"it runs on {self.device}, not {device}"
        if is_here and (reason := self._missing(device)) is not None:
            return reason
        if not self.supports(facts):
            return f"it does not support {dict(facts)}"
        return None

    def _missing(self, device: str) -> str | None:
        """What it lacks in this installation."""
        if self.needs_native and device == "cuda" and cuda.kernels() is None:
            return "the native core has no CUDA kernels: it was built without nvcc"
        if self.needs_native and device == "cpu" and native_core() is None:
            return "the native core is not built"
        if not self.needs_native and device == "cuda" and cuda.is_emulated():
            return "it needs a card, which is emulated"
        if self.needs_package is not None and importlib.util.find_spec(self.needs_package) is None:
            return f"the package {self.needs_package} is not installed"
        return None


@functools.cache
def op_names() -> frozenset[str]:
    """Every op: its folder has its name."""
    return frozenset(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.ispkg)


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation that was chosen: its name, its module, and why it is this one.

    ``is_fallback``: it is the twin, because nothing faster can run here.
    """

    implementation: str
    module: str
    why: str
    is_fallback: bool = False


class Op:
    """An op: its reference and its implementations in order of preference."""

    def __init__(self, name: str, reference: str, *implementations: Implementation) -> None:
        self.name = name
        self.reference = reference
        self.implementations = implementations
        self._logged: set[str] = set()

    def choose(self, device: str, **facts: Any) -> ModuleType:
        """The module to use on ``device`` (``"cpu"``) for these facts, as :meth:`decide` says; the choice is logged once.

        Raises:
            BackendUnavailable: see :meth:`decide`.
        """
        choice = self.decide(device, **facts)
        message = f"{self.name}: {choice.implementation} ({choice.why})"
        if message not in self._logged:
            self._logged.add(message)
            if choice.is_fallback:
                logger.warning("%s: plain PyTorch, same results, about a hundred times slower", message)
            else:
                logger.debug("%s", message)
        return importlib.import_module(choice.module)

    def decide(self, device: str, *, is_here: bool = True, **facts: Any) -> Choice:
        """What :meth:`choose` takes, here or on a machine whose build has everything; imports nothing.

        Raises:
            BackendUnavailable: a forced implementation does not exist or cannot run here, or ``HELEXA_OPS`` names no op.
        """
        wanted = env.forced_ops()
        unknown = wanted.keys() - op_names() - {self.name}
        if unknown:
            raise BackendUnavailable(
                f"HELEXA_OPS: there is no op {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(op_names()))}"
            )
        forced = wanted.get(self.name)
        if forced == "reference":
            return Choice("reference", self.reference, "forced by HELEXA_OPS")
        reasons: list[str] = []
        for implementation in self.implementations:
            if forced not in (None, implementation.name):
                continue
            if forced is None and implementation.device != device:
                continue  # no reason that anyone asked for
            reason = implementation.why_not(device, facts, is_here=is_here)
            if reason is None:
                return Choice(implementation.name, implementation.module, f"on {device}")
            reasons.append(f"{implementation.name}: {reason}")
        if forced is not None:
            known = ", ".join([*(i.name for i in self.implementations), "reference"])
            detail = "; ".join(reasons) or f"unknown implementation; expected one of {known}"
            raise BackendUnavailable(f"HELEXA_OPS forces {self.name}={forced} on {device} with {facts}: {detail}")
        return Choice(
            "reference", self.reference, "; ".join(reasons) or f"no implementation runs on {device}", is_fallback=True
        )
