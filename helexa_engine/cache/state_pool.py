"""Which slots of recurrent state are taken. Ids only: the model runner holds the tensors."""

from __future__ import annotations


class StatePool:
    """State slots ``first .. first+num_slots-1``: one a running sequence, or one a snapshot in the prefix cache.

    Taking one when none is free and releasing what is not held are errors of the caller, hence assertions.
    """

    def __init__(self, num_slots: int, first: int = 0) -> None:
        assert num_slots > 0, f"a pool needs at least one slot, got {num_slots}"
        self.num_slots = num_slots
        self._free = list(
            range(first + num_slots - 1, first - 1, -1)
        )  # a stack: the last one released is warm in the caches
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._held)

    def allocate(self) -> int:
        """A slot. What it holds is whatever its last owner left."""
        assert self._free, f"all {self.num_slots} state slots are taken"
        slot = self._free.pop()
        self._held.add(slot)
        return slot

    def release(self, slot: int) -> None:
        assert slot in self._held, f"state slot {slot} is not held"
        self._held.remove(slot)
        self._free.append(slot)
