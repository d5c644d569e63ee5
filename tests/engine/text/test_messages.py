"""Message normalisation by itself: what clients send, read; what templates refuse, fitted in place."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helexa_engine.errors import InvalidRequest, VisionUnsupported
from helexa_engine.text.chat_template import ChatTemplate
from helexa_engine.text.messages import fit, normalise, read_turns


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, *names):
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": {}}} for name in names]
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})


def tool(text):
    return {"role": "tool", "content": text}


def block(text):
    return f"<system-reminder>\n{text}\n</system-reminder>"


def call(arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


# -- reading


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "a"}, system("a")),
        ({"role": "function", "name": "f", "content": "1"}, tool("1") | {"name": "f"}),
        (user([{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]), user("a\nb\nc")),
        ({"role": "assistant", "content": None}, assistant("")),
        ({"role": "assistant"}, assistant("")),
        ({"role": "tool", "content": None, "tool_call_id": "x"}, tool("") | {"tool_call_id": "x"}),
        ({"role": "assistant", "content": "a", "tool_calls": [], "name": None}, assistant("a")),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, assistant("no")),
        # reasoning, in the places where clients keep it
        *[
            ({"role": "assistant", "content": "a"} | held, assistant("a") | {"reasoning_content": "why"})
            for held in (
                {"reasoning_content": "why"},
                {"reasoning": "why"},
                {"reasoning_content": "", "reasoning": "why"},
                {"thinking_blocks": [{"type": "thinking", "thinking": "why", "signature": "s"}]},
                {"reasoning_details": [{"type": "reasoning.text", "text": "why"}, {"type": "reasoning.encrypted"}]},
                {"content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "a"}]},
                {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}, "a"]},
                {"content": [{"type": "reasoning", "text": "why"}, "a"]},
            )
        ],
        ({"role": "assistant", "content": "a", "reasoning_content": ""}, assistant("a")),
        # the billing header: a block, or the first line
        (system("x-anthropic-billing-header: cch=1;\n\nBe brief."), system("Be brief.")),
        (
            system(
                [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "Be brief."}]
            ),
            system("Be brief."),
        ),
        (system("About x-anthropic-billing-header: nothing."), system("About x-anthropic-billing-header: nothing.")),
        (user("x-anthropic-billing-header: cch=1;"), user("x-anthropic-billing-header: cch=1;")),
    ],
)
def test_reading(message, expected):
    assert read_turns([message]) == [expected]
    assert read_turns([expected]) == [expected]


def test_a_message_that_is_only_the_billing_header_is_dropped():
    header = system("x-anthropic-billing-header: cc_version=1; cch=2;")
    assert normalise([header, system("a"), user("b")]) == [system("a"), user("b")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}),
        ({"a": 1}, {"a": 1}),
        (None, {}),
        ("", {}),
        (" ", {}),
        ("null", {}),
        ('"{\\"a\\": 1}"', {"a": 1}),  # written twice over
        ('{"a": "cut o', {"a": "cut o"}),
        ('{"a": 1, "b"', {"a": 1, "b": None}),
        ('{"a": 1}}', {"a": 1}),
        ('{"a": True, "b": "x\ny",}', {"a": True, "b": "x\ny"}),
    ],
)
def test_arguments_become_objects(arguments, expected):
    [turn] = read_turns([call(arguments)])
    assert turn["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": expected}}]
    assert read_turns([turn]) == [turn]


@pytest.mark.parametrize("arguments", ["[1]", "3", "words", 3, [1], '"words"', "[[[", "false"])
def test_arguments_that_are_no_object_are_named(arguments):
    with pytest.raises(InvalidRequest) as caught:
        read_turns([user("a"), call(arguments)])
    assert caught.value.path == "messages[1].tool_calls[0].function.arguments"


def test_the_call_of_the_time_before_tools():
    message = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    [turn] = read_turns([message])
    assert turn["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]


def test_unknown_parts_cost_one_line_a_request(caplog):
    caplog.set_level(logging.WARNING)
    odd = [{"type": "odd"}, {"type": "text", "text": "a"}, {"type": "odder", "x": 1}]
    assert read_turns([user(odd), user(odd)]) == [user("a"), user("a")]
    [record] = caplog.records
    assert "odd (2)" in record.getMessage() and "odder (2)" in record.getMessage()


@pytest.mark.parametrize("kind", ["image_url", "input_image", "image", "input_audio", "video_url"])
def test_pictures_and_sounds_are_refused_by_their_own_code(kind):
    with pytest.raises(VisionUnsupported) as caught:
        read_turns([user([{"type": "text", "text": "a"}, {"type": kind}])])
    assert (caught.value.path, caught.value.code) == ("messages[0].content[1]", "vision_unsupported")


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ("hi", "messages[0]"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "system"}, "messages[0].content"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        (user([3]), "messages[0].content[0]"),
        (user([{"type": "text", "text": 3}]), "messages[0].content[0].text"),
        ({"role": "assistant", "reasoning": 3}, "messages[0].reasoning"),
        ({"role": "assistant", "tool_calls": "f"}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [3]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages[0].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0].function.name"),
        ({"role": "assistant", "function_call": {}}, "messages[0].function_call.name"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "messages[0].tool_call_id"),
    ],
)
def test_bad_messages_are_named(message, path):
    with pytest.raises(InvalidRequest) as caught:
        read_turns([message])
    assert caught.value.path == path


# -- fitting


@pytest.mark.parametrize(
    ("turns", "abilities", "expected"),
    [
        ([system("a"), system("b"), user("c")], {}, [system("a\n\nb"), user("c")]),
        ([user("a"), system("b")], {}, [user("a"), system("b")]),
        ([user("a"), system("b")], {"late_system": False}, [user("a"), user(block("b"))]),
        (
            [assistant("", "f", "g"), tool("1"), system("b"), tool("2"), assistant("")],
            {"late_system": False},
            [assistant("", "f", "g"), tool(f"1\n\n{block('b')}"), tool("2"), assistant("")],
        ),
        ([system("a"), system("b"), user("c")], {"system": False}, [user(block("a\n\nb")), user("c")]),
        (
            [system("a"), user("c")],
            {"system": False, "late_system": False, "same_role_turns": False},
            [user(f"{block('a')}\n\nc")],
        ),
        (
            [user("a"), system("b"), user("c"), assistant("d"), assistant("", "f"), assistant("e", "g")],
            {"late_system": False, "same_role_turns": False},
            [user(f"a\n\n{block('b')}\n\nc"), assistant("d\n\ne", "f", "g")],
        ),
        ([tool("1"), tool("2")], {"same_role_turns": False}, [tool("1"), tool("2")]),
        (
            [assistant("") | {"reasoning_content": "x"}, assistant("a") | {"reasoning_content": "y"}],
            {"same_role_turns": False},
            [assistant("a") | {"reasoning_content": "x\n\ny"}],
        ),
    ],
)
def test_fitting(turns, abilities, expected):
    original = [dict(turn) for turn in turns]
    assert fit(turns, **abilities) == expected
    assert turns == original, "the caller's turns are its own"


turns_of_any_kind = st.lists(
    st.sampled_from([system("s"), user("u"), assistant("a"), assistant("", "f"), tool("t")]), min_size=1, max_size=8
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(turns_of_any_kind, turns_of_any_kind, st.booleans(), st.booleans(), st.booleans())
def test_what_comes_later_changes_nothing_before_it(turns, more, takes_system, late_system, same_role_turns):
    """All but the last turn, which may grow at its end, stays as it was; and nothing said is lost or moved."""
    abilities = {"system": takes_system, "late_system": late_system, "same_role_turns": same_role_turns}
    before, after = fit(turns, **abilities), fit([*turns, *more], **abilities)
    assert after[: len(before) - 1] == before[:-1]
    grown = after[len(before) - 1]
    assert grown["role"] == before[-1]["role"] and grown["content"].startswith(
        before[-1]["content"].removesuffix("\n</system-reminder>")
    )
    said = "".join(turn["content"] for turn in after)
    for mark in ("<system-reminder>\n", "\n</system-reminder>", "\n"):
        said = said.replace(mark, "")
    assert said == "".join(turn["content"] for turn in [*turns, *more])
    if not same_role_turns:
        roles = [turn["role"] for turn in after]
        assert not any(a == b and a in ("user", "assistant") for a, b in zip(roles, roles[1:], strict=False))


ALTERNATING = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('who?') }}{% endif %}"
    "{% if m.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}{{ raise_exception('take turns') }}{% endif %}"
    "[{{ m.role }}:{{ m.content }}]{% endfor %}"
)


def test_a_template_that_demands_turns_gets_them():
    template = ChatTemplate(ALTERNATING)
    assert not template.capabilities.same_role_turns and not template.capabilities.system
    messages = [system("s"), user("a"), user("b"), assistant("c"), system("d"), user("e")]
    rendered = template.render(messages, add_generation_prompt=False).text
    assert rendered == f"[user:{block('s')}\n\na\n\nb][assistant:c][user:{block('d')}\n\ne]"
