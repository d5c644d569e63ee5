"""What today's agents send, in the shapes in which they send it, on the templates of today's models.

Each file in ``agents`` is a conversation: the body's fixed fields, and for each request what it adds and changes. The words are
ours; roles, block types, fields and schemas are theirs. The templates are written here in the manner of three model families.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helexa_engine.generate_request import GenerateRequest
from helexa_engine.text.chat_template import ChatTemplate
from helexa_engine.text.messages import fit, read_turns
from helexa_engine.text.request_processor import RequestProcessor
from helexa_engine.text.tokenizer import Tokenizer
from helexa_server.wire import anthropic_messages, openai_chat, openai_responses
from tests.engine.text.conftest import ship

AGENTS = sorted(Path(__file__).with_name("agents").glob("*.json"))
TEMPLATES = sorted((Path(__file__).parents[2] / "engine" / "text" / "templates").glob("*.jinja"))
#: Each wire format with the list that it carries its conversation in.
WIRES: dict[str, tuple[ModuleType, str]] = {
    "openai_chat": (openai_chat, "messages"),
    "anthropic_messages": (anthropic_messages, "messages"),
    "openai_responses": (openai_responses, "input"),
}
HOSTED = {"claude_code": 1, "codex": 1}  # tools that only their vendor can run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(ship(tmp_path_factory.mktemp("qwen2"), "qwen2").metadata)


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda path: path.stem)
def processor(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> RequestProcessor:
    return RequestProcessor(tokenizer, ChatTemplate.for_tokenizer(request.param.read_text("utf-8"), tokenizer))


def requests_of(path: Path) -> list[GenerateRequest]:
    """The requests of a conversation, as its wire format reads them."""
    agent = json.loads(path.read_text("utf-8"))
    wire, where = WIRES[agent["wire"]]
    body = dict(agent["body"])
    body[where] = []
    parsed = []
    for request in agent["requests"]:
        body |= request.get("set", {})
        body[where] += request["add"]
        parsed += wire.parse_request(json.dumps(body).encode()).requests
    return parsed


def rendered(processor: RequestProcessor, request: GenerateRequest, turns: list[dict[str, Any]]) -> list[int]:
    assert processor.chat_template is not None
    return processor.chat_template.encode(
        processor.tokenizer,
        turns,
        tools=request.tools,
        add_generation_prompt=False,
        **request.chat_template_kwargs,
    )


def fitted(processor: RequestProcessor, request: GenerateRequest) -> list[dict[str, Any]]:
    assert processor.chat_template is not None and request.messages is not None
    abilities = processor.chat_template.capabilities
    return fit(
        read_turns(request.messages),
        system=abilities.system,
        late_system=abilities.late_system,
        same_role_turns=abilities.same_role_turns,
    )


def question(turns: list[dict[str, Any]]) -> int:
    """Place of the last turn that asks something."""
    return max(i for i, turn in enumerate(turns) if turn["role"] == "user")


@pytest.mark.parametrize("agent", AGENTS, ids=lambda path: path.stem)
def test_all_that_was_said_is_in_the_prompt(
    processor: RequestProcessor, agent: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    requests = requests_of(agent)
    assert len(caplog.records) == HOSTED.get(agent.stem, 0) * len(requests)
    for request in requests:
        prompt = processor.render_chat(request)
        assert "x-anthropic-billing-header" not in prompt
        for turn in read_turns(request.messages or ()):
            assert turn["content"].split("</think>")[-1].strip() in prompt
            for call in turn.get("tool_calls", ()):
                assert call["function"]["name"] in prompt
                for value in call["function"]["arguments"].values():
                    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                    # As JSON in JSON, as JSON in tags, or as Python writes it.
                    assert any(way in prompt for way in (shown, json.dumps(shown, ensure_ascii=False), str(value)))
        for tool in request.tools or ():
            assert tool["function"]["name"] in prompt
        assert len(processor.encode_chat(request)) == len(processor.prepare(request).prompt_token_ids)


@pytest.mark.parametrize("agent", AGENTS, ids=lambda path: path.stem)
def test_each_prompt_begins_with_the_one_before(processor: RequestProcessor, agent: Path) -> None:
    """Token for token, up to where the template itself forgets: reasoning since the last question, once there is a new one."""
    requests = requests_of(agent)
    assert processor.chat_template is not None
    forgets = processor.chat_template.capabilities.thinking
    for earlier, later in zip(requests, requests[1:], strict=False):
        kept, after = fitted(processor, earlier), fitted(processor, later)
        if forgets and question(after) >= len(kept):
            kept = kept[: question(kept) + 1]
        prefix = rendered(processor, earlier, kept)
        assert prefix and rendered(processor, later, after)[: len(prefix)] == prefix


def test_there_is_an_agent_for_each_that_is_promised() -> None:
    names = "opencode claude_code codex qwen_code pi continue open_webui zed ai_sdk litellm instructor"
    assert {path.stem for path in AGENTS} == set(names.split())
    assert {path.stem for path in TEMPLATES} == {"qwen3", "qwen3_coder", "qwen3_5"}
