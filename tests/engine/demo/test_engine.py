"""The shipped file through helexa's engine, against transformers with the same weights: the same greedy answers, token for token."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("transformers")

from helexa_engine import LLM, SamplingParams, demo  # noqa: E402
from helexa_engine.demo import evaluate  # noqa: E402
from helexa_engine.demo.conversations import SKILLS, held_out  # noqa: E402
from helexa_engine.demo.tokenizer import prompt  # noqa: E402


def test_greedy_answers_equal_those_of_transformers() -> None:
    """A token that is the likeliest one behind the engine's own earlier tokens, from the first to the last, is greedy's."""
    model, tokenizer = evaluate.load_gguf(demo.path())
    prompts = [tokenizer.encode(prompt(sample)).ids for skill in SKILLS for sample in held_out(skill, 3, seed=5)]
    with LLM("demo", max_model_len=512) as llm, torch.no_grad():
        for ids, result in zip(
            prompts, llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=100)), strict=True
        ):
            answer = list(result.token_ids)
            logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, len(ids) - 1 : -1]
            assert answer == logits.argmax(-1).tolist(), tokenizer.decode(answer, skip_special_tokens=False)
            assert result.finish_reason == "stop" and answer[-1] == model.config.eos_token_id
