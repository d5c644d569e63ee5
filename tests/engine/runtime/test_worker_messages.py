"""What crosses to a worker and back arrives as it was, errors as the type that was raised."""

from __future__ import annotations

from pathlib import Path

import pytest

from helexa_engine.config import EngineConfig
from helexa_engine.errors import (
    ContextLengthExceeded,
    DeviceOutOfMemory,
    EngineDied,
    HelexaError,
    InvalidRequest,
    ModelDoesNotFit,
    ModelNotFound,
    Overloaded,
    UnsupportedCheckpoint,
)
from helexa_engine.events import Timings
from helexa_engine.runtime.exchange import EngineRequest, EngineStats, StepOutput
from helexa_engine.runtime.model_info import ModelInfo
from helexa_engine.runtime.sampler import Logprobs, NotFinite, SamplingFailed
from helexa_engine.runtime.worker_messages import (
    Abort,
    Close,
    Died,
    Frames,
    FromWorker,
    Heartbeat,
    Load,
    Loaded,
    LoadProgress,
    Located,
    LogLine,
    Step,
    StopThinking,
    Submit,
    ToWorker,
    encode,
    from_worker,
    to_worker,
)
from helexa_engine.sampling_params import SamplingParams
from helexa_engine.text.structured import Constraint, GrammarFailed, Rules

PARAMS = SamplingParams(seed=2**64 - 1, stop=("a", "b"), stop_token_ids=(3,), logit_bias={7: -1.5}, n=2, logprobs=3)
REQUEST = EngineRequest(
    "id",
    (1, 2, 151_935),
    PARAMS.with_defaults({}),
    frozenset({5, 6}),
    Constraint(Rules("lark", "start: x", "tools", part=Rules("json_schema", "{}", "p")), "open", 4),
    last_message_start=1,
    priority=-1,
    owner="someone",
    max_queue_seconds=0.5,
)
STATS = EngineStats(1, 2, 3, 4, 5, 6, 7, 8, prompt_tokens_per_second=1.5, step_tokens=64)
OUTPUTS = [
    StepOutput("id", 1, 9, Timings(0.1, 0.2, 0.3), "stop", 9, 64, Logprobs(9, -0.5, ((1, -1.0), (2, -2.0))), (None,)),
    StepOutput("other", 0, 1),
]
INFO = ModelInfo(
    "demo",
    Path("/models/demo.gguf"),
    "qwen3",
    400,
    640,
    1,
    2,
    "float16",
    3,
    capabilities={"chat": True, "tools": False},
)


def through(message: ToWorker | FromWorker) -> ToWorker | FromWorker:
    read = to_worker if isinstance(message, Load | Submit | Abort | StopThinking | Close) else from_worker
    (found,) = (read(body) for body in Frames().push(encode(message)))
    return found


@pytest.mark.parametrize(
    "message",
    [
        Load("demo", EngineConfig(quant="Q4_K_M", num_threads=2), 0.25, 20),
        Submit(REQUEST),
        Abort("id"),
        Abort("id", 1),
        StopThinking("id"),
        Close(),
        LoadProgress("weights", 0.5),
        Located(Path("/models/demo.gguf")),
        Loaded(INFO, STATS),
        Step(OUTPUTS, STATS),
        Heartbeat(None),
        Heartbeat(STATS),
        LogLine("helexa_engine.x", 30, "two\nlines"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_arrive_as_they_were(message: ToWorker | FromWorker) -> None:
    assert through(message) == message


@pytest.mark.parametrize(
    "error",
    [
        HelexaError("plain", number=3),
        InvalidRequest("a.b", "expected c", more=[1]),
        ContextLengthExceeded(10, 5),
        ModelDoesNotFit(2**40, 2**30, "cpu", "buy some"),
        ModelNotFound("x", "y"),
        UnsupportedCheckpoint("bad", "file: place"),
        Overloaded("full", 2.5),
        EngineDied("gone", signal="SIGKILL"),
        DeviceOutOfMemory("no memory left"),
        SamplingFailed("no token is allowed"),
        NotFinite("the logits (nan) are"),
        GrammarFailed("stuck"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_their_type_and_every_field(error: HelexaError) -> None:
    died = through(Died(error))
    output = through(Step([StepOutput("id", error=error)], STATS))
    assert isinstance(died, Died) and isinstance(output, Step)
    for found in (died.error, output.outputs[0].error):
        assert type(found) is type(error) and found is not None
        assert (str(found), vars(found)) == (str(error), vars(error))


def test_what_has_no_form_of_its_own_goes_as_words() -> None:
    """The way of an error must not fail."""
    found = through(Died(HelexaError("x", path=Path("/a"), kind=int)))
    assert isinstance(found, Died) and found.error.facts == {"path": "/a", "kind": "<class 'int'>"}


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1000])
def test_messages_are_cut_from_the_stream_wherever_it_is_split(size: int) -> None:
    messages = [Abort("x" * 300), Close(), StopThinking("y"), Submit(REQUEST)]
    stream = b"".join(map(encode, messages))
    frames, found = Frames(), []
    for start in range(0, len(stream), size):
        found += [to_worker(body) for body in frames.push(stream[start : start + size])]
    assert found == messages
