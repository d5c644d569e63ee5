"""Beginnings of prompts that are computed already. Ids only: the model runner holds the tensors.

A radix tree whose edges are pages: a node stands for the tokens from the beginning to the end of its page, and is found by
comparing exactly these tokens. A page in the tree that no running sequence holds is idle: the pool counts it as available, and
:meth:`PrefixCache.evict` frees the least recently used ones, from the ends of the branches, when an allocation needs them.

Keys and values of a prefix are those of any of its beginnings, recurrent states are not: a state cannot be cut back. So for a
model with states a node may hold a *snapshot*, a slot with the states after its last token, and a prompt resumes at the deepest
snapshot it passes. Snapshots have slots of their own; the least recently used one gives its slot to the next.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field

from .page_pool import PagePool
from .state_pool import StatePool


@dataclass(slots=True, eq=False)
class Node:
    """The tokens up to the end of one page.

    Attributes:
        key: the tokens of this page, as :func:`extend_keys` spells them.
        page: where their keys and values are; -1 in the root, which stands for no tokens.
        depth: pages from the beginning.
        last_used, snapshot_used: ticks of the cache.
        snapshot: state slot with the states after these tokens.
    """

    key: bytes
    page: int
    depth: int
    parent: Node | None
    children: dict[bytes, Node] = field(default_factory=dict)
    last_used: int = 0
    snapshot: int | None = None
    snapshot_used: int = 0


def extend_keys(keys: list[bytes], token_ids: Sequence[int], num_pages: int, page_size: int) -> None:
    """Appends the keys of further pages until there are ``num_pages``: their tokens, byte for byte."""
    for i in range(len(keys), num_pages):
        keys.append(array("i", token_ids[i * page_size : (i + 1) * page_size]).tobytes())


class PrefixCache:
    """The tree over the pages of a pool.

    Args:
        pool: whose pages it keeps.
        snapshots: slots for snapshots, for a model with recurrent states; it then resumes at these alone. None for a model without.

    Attributes:
        num_kept: pages and snapshots that were kept so far, whatever became of them: whether there is something new.
    """

    def __init__(self, pool: PagePool, snapshots: StatePool | None = None) -> None:
        self.pool = pool
        self.snapshots = snapshots
        self.root = Node(b"", -1, 0, None)
        self._leaves: dict[Node, None] = {}
        self._with_snapshot: dict[Node, None] = {}
        self._tick = 0
        self._num_restored = 0
        self.num_kept = 0

    # -- reading

    def match(self, keys: Sequence[bytes]) -> Node:
        """The end of the longest beginning of ``keys`` that a sequence can resume from; the root if there is none."""
        node = best = self.root
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            node = child
            if self.snapshots is None or node.snapshot is not None:
                best = node
        return best

    def has_snapshot(self, keys: Sequence[bytes]) -> bool:
        """Whether there is a snapshot of exactly the tokens of ``keys``."""
        node: Node | None = self.root
        for key in keys:
            node = node.children.get(key) if node is not None else None
        return node is not None and node.snapshot is not None

    def num_idle(self, node: Node) -> int:
        """How many pages on the way to ``node`` are idle: taking them makes that many less available."""
        count = 0
        while node.parent is not None and self.pool.is_idle(node.page):  # whoever holds a page holds those before it
            count, node = count + 1, node.parent
        return count

    def by_last_use(self) -> list[Node]:
        """The nodes from which another process could restore the cache, the most recently used first and none before its parent.

        With states these are the ones on the way to a snapshot: nothing resumes behind it.
        """
        nodes = [self.root]
        for node in nodes:
            nodes.extend(node.children.values())
        used: dict[Node, int] = {}  # of the node or anything behind it; absent where nothing is worth keeping
        for node in reversed(nodes[1:]):
            if node in used or self.snapshots is None or node.snapshot is not None:
                assert node.parent is not None
                used[node] = max(used.get(node, node.last_used), node.last_used)
                used[node.parent] = max(used.get(node.parent, used[node]), used[node])
        used.pop(self.root, None)
        return sorted(used, key=lambda node: (-used[node], node.depth))

    # -- taking and keeping

    def take(self, node: Node) -> list[int]:
        """The pages on the way to ``node``, with one more reference each."""
        self._tick += 1
        if node.snapshot is not None:
            node.snapshot_used = self._tick
        pages = []
        while node.parent is not None:
            node.last_used = self._tick
            self.pool.share(node.page)
            pages.append(node.page)
            node = node.parent
        return pages[::-1]

    def keep(self, node: Node, keys: Sequence[bytes], pages: MutableSequence[int]) -> Node:
        """Keeps the pages of a sequence that holds the way to ``node`` and has computed ``keys`` in ``pages``; both from the beginning.

        Where the tree has the same tokens in another page the sequence gets that one, and its own is released.

        Returns:
            The node at the end of ``keys``.
        """
        self._tick += 1
        for i in range(node.depth, len(keys)):
            child = node.children.get(keys[i])
            if child is None:
                child = node.children[keys[i]] = Node(keys[i], pages[i], node.depth + 1, node)
                self._add(child)
                self.num_kept += 1
            elif child.page != pages[i]:
                self.pool.share(child.page)
                self.pool.release([pages[i]])
                pages[i] = child.page
            child.last_used = self._tick
            node = child
        return node

    def take_snapshot_slot(self) -> int | None:
        """A slot to write a snapshot to, if need be that of the least recently used one; None when all are being written to.

        It goes back with :meth:`keep_snapshot` or :meth:`drop_snapshot_slot`.
        """
        assert self.snapshots is not None
        if not self.snapshots.num_free:
            if not self._with_snapshot:
                return None
            self._drop_snapshot(min(self._with_snapshot, key=lambda node: node.snapshot_used))
        return self.snapshots.allocate()

    def keep_snapshot(self, node: Node, slot: int) -> None:
        """``slot`` holds the states after the tokens of ``node``."""
        self._tick += 1
        if node.snapshot is None:
            node.snapshot = slot
            self._with_snapshot[node] = None
            self.num_kept += 1
        else:  # another sequence was as quick
            self.drop_snapshot_slot(slot)
        node.snapshot_used = self._tick

    def drop_snapshot_slot(self, slot: int) -> None:
        """What was to be written to ``slot`` is not worth keeping."""
        assert self.snapshots is not None
        self.snapshots.release(slot)

    def restore(self, parent: Node, key: bytes, page: int, slot: int | None = None, rank: int = 0) -> Node:
        """Keeps a page behind ``parent``, and a snapshot in ``slot``, as another process left them; both were allocated for this and
        become the cache's. The page counts as used before all that is in the cache, the snapshot as the ``rank``-th most recently
        used one.
        """
        assert key not in parent.children, "these tokens are here already"
        self._num_restored += 1
        child = Node(key, page, parent.depth + 1, parent, last_used=-self._num_restored)
        parent.children[key] = child
        self._add(child)
        self.pool.release([page])
        if slot is not None:
            child.snapshot, child.snapshot_used = slot, -1 - rank
            self._with_snapshot[child] = None
        return child

    def _add(self, child: Node) -> None:
        """The tree's own reference to the page of a new node."""
        assert child.parent is not None
        self.pool.cache(child.page)
        self._leaves.pop(child.parent, None)
        self._leaves[child] = None

    # -- letting go

    def evict(self, num_pages: int) -> None:
        """Frees ``num_pages`` idle pages (no more than there are), the least recently used first."""
        assert num_pages <= self.pool.num_idle, f"{num_pages} pages to free, {self.pool.num_idle} idle"
        order = [(leaf.last_used, i, leaf) for i, leaf in enumerate(self._leaves) if self.pool.is_idle(leaf.page)]
        heapq.heapify(order)
        for serial in range(len(self._leaves), len(self._leaves) + num_pages):
            *_, leaf = heapq.heappop(order)
            parent = leaf.parent
            assert parent is not None
            self._remove(leaf)
            if parent in self._leaves and self.pool.is_idle(parent.page):
                heapq.heappush(order, (parent.last_used, serial, parent))

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None and not leaf.children
        if leaf.snapshot is not None:
            self._drop_snapshot(leaf)
        self.pool.uncache(leaf.page)
        del parent.children[leaf.key]
        del self._leaves[leaf]
        if not parent.children and parent is not self.root:
            self._leaves[parent] = None

    def _drop_snapshot(self, node: Node) -> None:
        assert node.snapshot is not None
        self.drop_snapshot_slot(node.snapshot)
        node.snapshot = None
        del self._with_snapshot[node]
