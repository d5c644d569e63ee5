"""A decode step as one native call: recorded once for each number of sequences, then replayed.

A decode step makes the same kernel calls every time, at the same addresses where its inputs, outputs and caches stay in place.
Only what they read has changed. One call through Python instead of five a layer is worth most where a step is short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.registry import native_core


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the memory that is allocated, and the names of operations that a replay would leave out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[torch.Tensor] = []
        self.computed: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To keep the compiler out of the mode, torch would import it at the first step: a second, 150 MB. Nothing compiles here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::empty":
            self.kept.append(out)
        elif func._schema.is_mutable or not _addresses(out) <= _addresses(args):  # neither memory nor a view of some
            self.computed.add(func._schema.name)
        return out


def _addresses(value: Any) -> set[int]:
    """Where the storages of a tensor, or of those in a tuple or list, begin."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()}
    return set().union(*map(_addresses, value)) if isinstance(value, tuple | list) else set()


class RecordedStep:
    """``function()`` and its replays.

    A replay equals calling ``function`` again if that reads its inputs where they were, and computes with nothing but recorded
    kernels. Torch operations in between are noticed, and make :attr:`replayable` False.

    Args:
        function: called here, once; its tensors are :attr:`result`, which each replay overwrites.
    """

    def __init__(self, function: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        core = native_core()
        assert core is not None, "without the native core there is nothing to record"
        self._recording = core.Recording()
        self._recording.begin()
        try:
            with _Watch() as watch:
                self.result = function()
        finally:
            self._recording.end()
        self._memory = watch.kept
        self.computed_outside = watch.computed
        self.replayable = not watch.computed and len(self._recording) > 0

    def replay(self) -> tuple[torch.Tensor, ...]:
        """Computes :attr:`result` anew and returns it. Raises what a kernel raises."""
        assert self.replayable, self.computed_outside
        self._recording.replay()
        return self.result
