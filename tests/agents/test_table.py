"""What the compatibility table says of a run."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from .__main__ import outcomes_of
from .table import Row, not_run, render


def test_what_did_not_run_is_no_pass() -> None:
    missing = not_run("Agent", "scripted", ("chat", "tool round trip"), "npm is not installed")
    assert not missing.passed
    assert not Row("Empty", "1", "demo").passed
    page = render([missing, Row("Other", "1.2", "demo", {"chat": "pass (3)", "tools": "FAIL: why"})], "0.0")
    assert "| Agent | - | scripted | not run |" in page and "| Other | 1.2 | demo | pass (3) |  | **FAIL** |" in page
    assert "- Agent, chat: not run: npm is not installed" in page and "- Other, tools: FAIL: why" in page


@pytest.mark.parametrize("trouble", ["failure", "error", "skipped"])
def test_one_test_that_did_not_pass_spoils_its_features(trouble: str) -> None:
    report = ElementTree.fromstring(
        '<testsuite><testcase classname="tests.server.test_chat" name="test_stream"/>'
        f'<testcase classname="tests.server.test_chat" name="test_tools_and_reasoning"><{trouble}/></testcase>'
        '<testcase classname="tests.server.test_chat" name="test_stream_without_usage_ends_with_timings_then_done"/>'
        '<testcase classname="tests.server.test_messages" name="test_tools_and_thinking_whole_and_streamed"/></testsuite>'
    )
    cases = list(report.iter("testcase"))
    wrong = "FAIL: test_tools_and_reasoning"
    assert outcomes_of(cases, "openai") == {
        "chat": wrong,
        "stream": "pass (1)",
        "tools": wrong,
    }
    assert outcomes_of(cases, "anthropic") == {"messages": "pass (1)", "stream": "pass (1)", "tools": "pass (1)"}
