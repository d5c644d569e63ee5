"""Decode steps as CUDA graphs: recorded for some numbers of rows when the model is loaded, then replayed with one call.

A graph's kernels read and write where they did when it was recorded, so inputs and caches stay in place. A step of fewer sequences takes
the next larger graph; the rows left over are nobody's (see :class:`.step_inputs.Scratch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..batch import Batch

#: Hidden states [rows, hidden_size] and logits [rows, vocab_size].
Results = tuple[torch.Tensor, torch.Tensor]


class DecodeGraphs:
    """The graphs of a model.

    Under the emulation, which records nothing, a replay computes the same batch anew: what fills it up and where results stand is
    then as on a card.

    Args:
        compute: a decode step; reads nothing back from the device.
        batch_of: the batch of a number of rows that are nobody's, at the addresses that later batches of as many rows have.
        sizes: numbers of rows, ascending.
        device: where the batches are.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Results],
        batch_of: Callable[[int], Batch],
        sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        self._compute = compute
        self._sizes = list(sizes)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Results]] = {}
        if device.type == "cuda":
            self._capture(batch_of, device)

    def _capture(self, batch_of: Callable[[int], Batch], device: torch.device) -> None:
        """The largest first: the smaller ones then find room in the memory it took."""
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for size in reversed(self._sizes):
            batch = batch_of(size)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._compute(batch)  # what libraries and Triton do at first use cannot be recorded
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                results = self._compute(batch)
            self._graphs[size] = graph, results

    def rows_for(self, num_sequences: int) -> int | None:
        """Rows of the graph that a step of so many sequences takes; None where it is too large for any."""
        return next((size for size in self._sizes if size >= num_sequences), None)

    def replay(self, batch: Batch) -> Results:
        """The results of ``batch``, valid until the next replay."""
        known = self._graphs.get(batch.num_sequences)
        if known is None:
            return self._compute(batch)
        graph, results = known
        graph.replay()
        return results
