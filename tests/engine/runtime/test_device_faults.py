"""A device that fails: what is classified as what, what a step's requests and an engine end with."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helexa_engine import LLM, EngineConfig
from helexa_engine.errors import DeviceOutOfMemory, EngineDied
from helexa_engine.ops import cuda
from helexa_engine.presets import PresetCheckpoint
from helexa_engine.runtime import device_faults
from helexa_engine.runtime.engine_thread import EngineThread
from helexa_engine.runtime.exchange import EngineRequest, StepOutput
from helexa_engine.runtime.load import load_model
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.testing.toy_model import ToyModel, toy_engine


def accelerator_error(code: int) -> Exception:
    """As torch raises it: the code is set when it crosses into Python."""
    error = torch.AcceleratorError("CUDA error: in words that nobody may match")
    error.error_code = code  # type: ignore[attr-defined]
    return error


def memory_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (memory_error(), "out_of_memory"),
        (accelerator_error(2), "out_of_memory"),
        *((accelerator_error(code), "device_lost") for code in (214, 700, 710, 716, 719, 999)),
        (accelerator_error(1), None),
        (accelerator_error(209), None),
        (torch.AcceleratorError("without a code"), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("CUDA out of memory"), None),
        (MemoryError(), None),
        (ValueError("quant_matmul: x: expected [.., 64], got [.., 65]"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_faults_are_told_by_type_and_code(error: Exception, fault: str | None) -> None:
    assert device_faults.fault_of(error) == fault


@pytest.fixture
def simt(simt: Any) -> Iterator[Any]:
    """The kernels that a model on CUDA computes with, whose launches may be made to fail."""
    with cuda.emulated(simt):
        yield simt
    simt.fail_launches(0)


@pytest.mark.parametrize(("code", "fault"), [(2, "out_of_memory"), (700, "device_lost"), (98, None)])
def test_a_failed_launch_of_ours_is_classified_too(simt: Any, code: int, fault: str | None) -> None:
    values = torch.ones(32)
    simt.fail_launches(code)
    with pytest.raises(RuntimeError) as caught:
        simt.rms_norm(values.data_ptr(), 1, 32, 0, 0.0, torch.empty(32, dtype=torch.bfloat16).data_ptr(), 0)
    assert device_faults.fault_of(caught.value) == fault and device_faults.cuda_code(caught.value) == code


def test_a_load_raises_our_errors() -> None:
    with pytest.raises(DeviceOutOfMemory, match="while loading.*Tried to allocate.*buy more"):
        with device_faults.explained("while loading", "buy more"):
            raise memory_error()
    with pytest.raises(EngineDied) as caught:
        with device_faults.explained("while loading", "buy more"):
            raise accelerator_error(700)
    assert caught.value.facts == {"reason": "device_lost", "cuda_error": 700}
    with pytest.raises(ValueError, match="as it is"):
        with device_faults.explained("while loading", "buy more"):
            raise ValueError("as it is")


def test_a_model_on_a_card_goes_on_after_want_of_memory_and_ends_with_the_device(simt: Any) -> None:
    """Launches of our own kernels fail in the middle of a step; the model, its pages and its states are real."""
    config = EngineConfig(device="cuda", max_model_len=256, max_num_seqs=2, max_num_batched_tokens=128, seed=1)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM.of(load_model(PresetCheckpoint("qwen3.5-tiny", "Q8_0"), config)) as llm:
        expected = llm.generate([1, 2, 3], greedy).token_ids
        simt.fail_launches(2, after=30)
        with pytest.raises(DeviceOutOfMemory, match="in a step of 1 tokens for 1 sequences|in a step of 3 tokens"):
            llm.generate([1, 2, 3], greedy)
        assert llm.generate([1, 2, 3], greedy).token_ids == expected
        assert llm.stats().num_running == 0 and llm.stats().kv_pages_used == 0
        simt.fail_launches(700, after=30, sticks=True)
        with pytest.raises(EngineDied) as caught:
            llm.generate([1, 2, 3], greedy)
        assert caught.value.facts["reason"] == "device_lost"
        with pytest.raises(EngineDied):
            llm.generate([1, 2, 3], greedy)


class Faulty(ToyModel):
    """Raises ``error`` where it computes the logits, or the hidden states, of one step, counted from 0."""

    def __init__(self, error: Exception, step: int, *, in_logits: bool = False) -> None:
        super().__init__()
        self._error, self._step, self._in_logits, self._steps = error, step, in_logits, -1

    def forward(self, batch: Any) -> torch.Tensor:
        self._steps += 1
        if self._steps == self._step and not self._in_logits:
            raise self._error
        return super().forward(batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._steps == self._step and self._in_logits:
            raise self._error
        return super().logits(hidden)


def request(name: str, **fields: Any) -> EngineRequest:
    params = SamplingParams(temperature=0.0, max_tokens=6, **fields).with_defaults({})
    return EngineRequest(name, (1, 2, 3, ord(name) - 90), params)


@pytest.mark.parametrize("in_logits", [False, True], ids=["forward", "logits"])
@pytest.mark.parametrize("step", [0, 2])
def test_the_requests_of_a_batch_end_where_memory_is_short_and_others_go_on(step: int, in_logits: bool) -> None:
    def outputs_of(model: ToyModel) -> dict[str, list[StepOutput]]:
        engine = toy_engine(model, max_num_seqs=2)
        engine.add_request(request("a", n=2))  # both seats
        engine.add_request(request("b"))
        seen: dict[str, list[StepOutput]] = {}
        while engine.has_work:
            for output in engine.step():
                seen.setdefault(output.request_id, []).append(output)
        assert engine.scheduler.pool.num_used == 0 and engine.stats().num_running == 0
        return seen

    expected, seen = outputs_of(ToyModel()), outputs_of(Faulty(memory_error(), step, in_logits=in_logits))
    failed = [output for output in seen["a"] if output.error is not None]
    assert len(failed) == 1 and failed == seen["a"][-1:] and len(seen["a"]) == 2 * step + 1
    assert isinstance(failed[0].error, DeviceOutOfMemory) and "max_num_batched_tokens" in str(failed[0].error)
    assert [o.token_id for o in seen["b"]] == [o.token_id for o in expected["b"]]


def test_a_prompt_that_is_scored_ends_with_the_batch() -> None:
    engine = toy_engine(Faulty(memory_error(), 0, in_logits=True))
    engine.add_request(request("a", prompt_logprobs=1))
    engine.add_request(request("b"))
    seen = [output for _ in range(3) for output in engine.step()]
    assert {output.request_id for output in seen if output.error} == {"a", "b"}


@pytest.mark.parametrize("scores", [False, True], ids=["sampling", "scoring"])
def test_a_lost_device_ends_the_engine(scores: bool, caplog: pytest.LogCaptureFixture) -> None:
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()

    def deliver(step: list[StepOutput]) -> None:
        for output in step:
            outputs.put(output)

    thread = EngineThread(toy_engine(Faulty(accelerator_error(700), 0, in_logits=scores)), deliver)
    thread.submit(request("a", prompt_logprobs=1 if scores else None))
    error = outputs.get(timeout=10).error
    thread.join()
    assert isinstance(error, EngineDied) and error is thread.died
    assert error.facts == {"reason": "device_lost", "cuda_error": 700} and "a new process" in error.message
    assert "the engine died" in caplog.text
