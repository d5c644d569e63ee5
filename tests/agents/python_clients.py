"""litellm and instructor against the demo: ``python -m tests.agents.python_clients litellm|instructor URL``.

Runs with the client's own folder ahead on the path and prints ``{feature: "pass" or "FAIL: why"}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field

QUESTION: Any = [{"role": "user", "content": "What is helexa?"}]
ANN: Any = [{"role": "user", "content": "Ann is 34 years old. Give me this as JSON with the keys name and age."}]
WEATHER: Any = [{"role": "user", "content": "How is the weather in Oslo?"}]
TOOL: Any = {
    "name": "get_weather",
    "description": "Tells the weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class Person(BaseModel):
    """What a client is to parse the answer into."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


Features = dict[str, Callable[[], None]]


def litellm_features(url: str) -> Features:
    import litellm

    chat: Any = {
        "model": "openai/demo",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 200,
        "num_retries": 0,
    }

    def whole() -> None:
        answer = litellm.completion(**chat, messages=QUESTION)
        assert answer.choices[0].message.content and answer.usage.completion_tokens > 0, answer

    def stream() -> None:
        expected = litellm.completion(**chat, messages=QUESTION).choices[0].message.content
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in litellm.completion(**chat, messages=QUESTION, stream=True)
        ]
        assert len(pieces) > 1 and "".join(pieces) == expected, pieces

    def tools() -> None:
        ask = {**chat, "tools": [{"type": "function", "function": TOOL}]}
        first = litellm.completion(**ask, messages=WEATHER, tool_choice="required")
        (call, *_) = first.choices[0].message.tool_calls
        assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments), call
        result = {"role": "tool", "tool_call_id": call.id, "content": "Rain, 7 degrees."}
        after = litellm.completion(**ask, messages=[*WEATHER, first.choices[0].message.model_dump(), result])
        assert after.usage.prompt_tokens > first.usage.prompt_tokens, after.usage

    def parse() -> None:
        answer = litellm.completion(**chat, messages=QUESTION, response_format=Person)
        Person.model_validate_json(answer.choices[0].message.content)

    def responses() -> None:
        answer = litellm.responses(
            model="openai/demo", api_base=f"{url}/v1", api_key="none", input=QUESTION, max_output_tokens=60
        )
        assert answer.usage.output_tokens > 0 and any(item.type == "message" for item in answer.output), answer

    def messages() -> None:
        answer = litellm.completion(
            model="anthropic/demo", api_base=url, api_key="none", messages=QUESTION, max_tokens=60, temperature=0
        )
        assert answer.choices[0].message.content, answer

    def completions() -> None:
        answer = litellm.text_completion(**{**chat, "model": "text-completion-openai/demo"}, prompt="helexa is")
        assert answer.choices[0].text and answer.usage.completion_tokens > 0, answer

    def errors() -> None:
        try:
            litellm.completion(**{**chat, "model": "openai/no-such-model"}, messages=QUESTION)
        except litellm.NotFoundError as error:
            assert "no-such-model" in str(error), error
            return
        raise AssertionError("an unknown model is answered")

    return {
        "chat": whole,
        "stream": stream,
        "tools": tools,
        "parse": parse,
        "completions": completions,
        "responses": responses,
        "messages": messages,
        "errors": errors,
    }


def instructor_features(url: str) -> Features:
    import anthropic
    import instructor
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    ask: Any = {
        "model": "demo",
        "messages": QUESTION,
        "response_model": Person,
        "max_retries": 0,
        "max_tokens": 200,
    }

    def parse() -> None:
        patched = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
        assert isinstance(patched.create(**ask, temperature=0), Person)
        # This mode asks for any object and tells the model the schema in words; the demo reads the keys in the question.
        patched = instructor.from_openai(client, mode=instructor.Mode.JSON)
        ann = patched.create(**{**ask, "messages": ANN}, temperature=0)
        assert isinstance(ann, Person) and (ann.name, ann.age) == ("Ann", 34), ann

    def tools() -> None:
        patched = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
        assert isinstance(patched.create(**ask, temperature=0), Person)

    def stream() -> None:
        patched = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
        *partial, last = patched.create_partial(**ask, temperature=0)
        assert partial and Person.model_validate(last.model_dump()), last

    def messages() -> None:
        claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
        patched = instructor.from_anthropic(claude, mode=instructor.Mode.ANTHROPIC_TOOLS)
        assert isinstance(patched.create(**ask), Person)

    return {"parse": parse, "tools": tools, "stream": stream, "messages": messages}


FEATURES = {"litellm": litellm_features, "instructor": instructor_features}


def main() -> None:
    name, url = sys.argv[1:]
    outcomes = {}
    for feature, check in FEATURES[name](url).items():
        try:
            check()
            outcomes[feature] = "pass"
        except Exception as error:  # whatever a client makes of it is a finding
            outcomes[feature] = f"FAIL: {type(error).__name__}: {error}"[:300]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
