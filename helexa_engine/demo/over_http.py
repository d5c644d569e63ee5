"""Prints the demo's held-out accuracy as a client of ``helexa serve demo`` sees it: ``python -m helexa_engine.demo.over_http URL``.

The questions are asked through the ``openai`` client, greedily, several at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from . import conversations
from .sample import Message, Sample

MAX_TOKENS = 160

Answer = tuple[str, list[tuple[str, str]], str]
"""Text, tool calls as name and arguments in JSON, reasoning: what :meth:`.Sample.check` takes."""


def _on_the_wire(message: Message) -> Message:
    """A message as OpenAI's clients send it: arguments of earlier calls are JSON text, and a result names its call."""
    if message["role"] == "tool":
        return {**message, "tool_call_id": "call_0"}
    calls = [
        {
            "id": "call_0",
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def ask(client: openai.OpenAI, sample: Sample, **options: Any) -> Any:
    """The client's reply to a sample's question. ``options`` are further arguments of ``chat.completions.create``."""
    return client.chat.completions.create(
        model="demo",
        messages=[_on_the_wire(message) for message in sample.messages],  # type: ignore[misc]
        tools=sample.tools or openai.omit,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=MAX_TOKENS,
        extra_body={"chat_template_kwargs": sample.chat_template_kwargs},
        **options,
    )


def answer(client: openai.OpenAI, sample: Sample) -> Answer:
    """The whole answer."""
    message = ask(client, sample).choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", calls, getattr(message, "reasoning_content", None) or ""


def wrong_answers(client: openai.OpenAI, samples: Sequence[Sample], together: int = 8) -> list[tuple[Sample, Answer]]:
    """The samples that are answered wrongly, with what was answered; ``together`` questions are under way at a time."""
    with ThreadPoolExecutor(together) as pool:
        answers = list(pool.map(lambda sample: answer(client, sample), samples))
    return [(sample, given) for sample, given in zip(samples, answers, strict=True) if not sample.check(*given)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8080", help="the server [http://127.0.0.1:8080]")
    parser.add_argument("-n", type=int, default=100, help="samples a skill [100]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skills", nargs="+", default=list(conversations.SKILLS))
    parser.add_argument("--failures", type=int, default=0, help="wrong answers to show for each skill [0]")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.url.rstrip('/')}/v1", api_key="none", max_retries=0)
    print("| skill | held-out accuracy over HTTP | n |\n|---|---|---|", flush=True)
    for skill in args.skills:
        wrong = wrong_answers(client, conversations.held_out(skill, args.n, args.seed))
        print(f"| {skill} | {1 - len(wrong) / args.n:.1%} | {args.n} |", flush=True)
        for sample, given in wrong[: args.failures]:
            print(f"--- {sample.messages[-1]}\nexpected {sample.answer}\nanswered {given}")


if __name__ == "__main__":
    main()
