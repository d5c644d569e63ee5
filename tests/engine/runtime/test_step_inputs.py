"""What the model reads of a step is what its chunks say, whatever was in the buffers before."""

from __future__ import annotations

from array import array

import pytest
import torch

from helexa_engine.batch import Batch
from helexa_engine.runtime.scheduler import Chunk
from helexa_engine.runtime.sequence import Sequence
from helexa_engine.runtime.step_inputs import Scratch, StepInputs

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=[pytest.param(d, marks=pytest.mark.gpu if d == "cuda" else ()) for d in DEVICES])
def inputs(request: pytest.FixtureRequest) -> StepInputs:
    return StepInputs(
        torch.device(request.param),
        [],
        max_tokens=64,
        max_seqs=8,
        page_size=16,
        pages_per_seq=5,
        scratch=Scratch(90, 11),
    )


def chunk(start: int, end: int, pages: list[int], slot: int | None = None) -> Chunk:
    sequence = Sequence("r", 0, [100 + i for i in range(end)], end, 10)
    sequence.pages, sequence.state_slot = array("i", pages), slot
    return Chunk(sequence, start, end)


def read(batch: Batch) -> dict[str, list[object]]:
    names = ("input_ids", "positions", "slot_mapping", "cu_seqlens", "seq_lens", "state_slots", "page_tables")
    return {name: getattr(batch, name).tolist() for name in names}


def test_a_batch_of_prompts_and_decodes(inputs: StepInputs) -> None:
    chunks = [chunk(20, 21, [7, 3], 4), chunk(14, 18, [2, 9, 5], 0), chunk(0, 2, [1])]
    assert read(inputs.fill(chunks)) == {
        "input_ids": [120, 114, 115, 116, 117, 100, 101],
        "positions": [20, 14, 15, 16, 17, 0, 1],
        "slot_mapping": [3 * 16 + 4, 2 * 16 + 14, 2 * 16 + 15, 9 * 16, 9 * 16 + 1, 16, 17],
        "cu_seqlens": [0, 1, 5, 7],
        "seq_lens": [21, 18, 2],
        "state_slots": [4, 0, 0],
        "page_tables": [[7, 3, 0, 0, 0], [2, 9, 5, 0, 0], [1, 0, 0, 0, 0]],
    }


def test_rows_that_fill_up_write_where_it_does_not_matter(inputs: StepInputs) -> None:
    got = read(inputs.fill([chunk(20, 21, [7, 3], 4)], num_rows=3))
    assert got["input_ids"] == [120, 0, 0] and got["positions"] == [20, 0, 0]
    assert got["slot_mapping"] == [3 * 16 + 4, 90 * 16, 90 * 16]
    assert got["cu_seqlens"] == [0, 1, 2, 3] and got["seq_lens"] == [21, 1, 1]
    assert got["state_slots"] == [4, 11, 11]
    assert got["page_tables"] == [[7, 3, 0, 0, 0], [90, 0, 0, 0, 0], [90, 0, 0, 0, 0]]


def test_steps_of_one_shape_have_their_inputs_in_one_place(inputs: StepInputs) -> None:
    """And steps of other shapes in between leave nothing behind: all lie in the same memory."""
    decodes = [chunk(30, 31, [6, 4]), chunk(5, 6, [8], 2)]
    first = inputs.fill(decodes)
    expected, places = read(first), [first.input_ids.data_ptr(), first.page_tables.data_ptr()]
    inputs.fill([chunk(0, 64, [9, 9, 9, 9])])
    inputs.fill([chunk(1, 2, [5])] * 7)
    again = inputs.fill(decodes)
    assert read(again) == expected
    assert [again.input_ids.data_ptr(), again.page_tables.data_ptr()] == places
    assert all(place % 16 == 0 for place in places)
