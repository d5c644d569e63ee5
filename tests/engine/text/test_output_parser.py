"""Output parser: both call syntaxes, reasoning, repairs, and independence of how the text was chunked."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helexa_engine.text.json_repair import BrokenJson, JsonObjectStream
from helexa_engine.text.output_parser import CallArguments, CallStart, Content, OutputParser, Reasoning
from helexa_engine.text.tool_schema import coerce

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "count": {"type": "integer"},
                    "ratio": {"type": "number"},
                    "deep": {"type": "object"},
                    "flag": {"type": "boolean"},
                    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "open": {"description": "any value"},
                    "mode": {"allOf": [{"$ref": "#/$defs/Mode"}]},
                    "size": {"$ref": "#/$defs/Size"},
                },
                "$defs": {"Mode": {"enum": ["a", "b"]}, "Size": {"$ref": "#/$defs/Int"}, "Int": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "g"}},
]


def fold(pieces):
    """(reasoning, content, [(name, arguments)]) of a stream of pieces."""
    reasoning, content, calls = "", "", []
    for piece in pieces:
        match piece:
            case Reasoning(text):
                reasoning += text
            case Content(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, fragment):
                assert index == len(calls) - 1 and fragment
                calls[index] = (calls[index][0], calls[index][1] + fragment)
    return reasoning, content, calls


def parse(text, chunks=None, **kwargs):
    parser = OutputParser(**{"tools": TOOLS} | kwargs)
    pieces = [piece for chunk in (chunks or [text]) for piece in parser.push(chunk)]
    reasoning, content, calls = fold(pieces + parser.flush())
    return reasoning, content, [(name, json.loads(arguments)) for name, arguments in calls]


JSON_CALL = '<tool_call>\n{"name": "f", "arguments": {"text": "a\\n\\"b\\" </tool_call> {", "deep": {"x": [1, 2.5, null]}}}\n</tool_call>'
JSON_ARGUMENTS = {"text": 'a\n"b" </tool_call> {', "deep": {"x": [1, 2.5, None]}}
XML_CALL = (
    '<tool_call>\n<function=f>\n<parameter=text>\n\n  two\nlines "q" </p <b>\n\n</parameter>\n<parameter=count>\n3\n</parameter>\n'
    '<parameter=deep>\n{"a": [1]}\n</parameter>\n<parameter=flag>\nTrue\n</parameter>\n<parameter=maybe>\nnull\n</parameter>\n'
    "</function>\n</tool_call>"
)
LOST_TAGS = "\n</function>\n</tool_call>"  # the end of a call whose last value has no end tag of its own
XML_ARGUMENTS = {"text": '\n  two\nlines "q" </p <b>\n', "count": 3, "deep": {"a": [1]}, "flag": True, "maybe": None}


@pytest.mark.parametrize(
    ("text", "kwargs", "expected"),
    [
        ("plain <b>text</b>\n", {}, ("", "plain <b>text</b>\n", [])),
        ("  \n x", {}, ("", "  \n x", [])),
        ("", {}, ("", "", [])),
        (" \n", {}, ("", " \n", [])),
        ("<think>\nwhy\n\nnot\n</think>\n\nso", {}, ("why\n\nnot", "so", [])),
        ("\n<think>\n\n</think>\n\nso", {}, ("", "so", [])),
        ("why\n</think>\n\nso", {"thinking": True}, ("why", "so", [])),
        ("cut off </thi", {"thinking": True}, ("cut off </thi", "", [])),
        ("cut off\n", {"thinking": True}, ("cut off", "", [])),
        ("<think>", {}, ("", "", [])),
        ("<thin", {}, ("", "<thin", [])),
        ("a <think>b</think>", {}, ("", "a <think>b</think>", [])),
        ("<think>x</think>y", {"parse_thinking": False}, ("", "<think>x</think>y", [])),
        (JSON_CALL, {}, ("", "", [("f", JSON_ARGUMENTS)])),
        (XML_CALL, {}, ("", "", [("f", XML_ARGUMENTS)])),
        (
            f"<think>\nr\n</think>\n\nhello\n{JSON_CALL}\n{XML_CALL}\n",
            {},
            ("r", "hello", [("f", JSON_ARGUMENTS), ("f", XML_ARGUMENTS)]),
        ),
        (f"{JSON_CALL} and then", {}, ("", " and then", [("f", JSON_ARGUMENTS)])),
        (JSON_CALL, {"tools": None}, ("", JSON_CALL, [])),
        (f"x\n{JSON_CALL}", {"thinking": True}, (f"x\n{JSON_CALL}", "", [])),
        ("<tool_call>{}</tool_call>", {}, ("", "<tool_call>{}</tool_call>", [])),
        ('<tool_call>{"name": "g"}</tool_call>', {}, ("", "", [("g", {})])),
        ('<tool_call>{"name": "g", "arguments": null}</tool_call>', {}, ("", "", [("g", {})])),
        ('<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>', {}, ("", "", [("g", {"a": 1})])),
        ('<tool_call>{"name": "g", "parameters": {"a": 1}}</tool_call>', {}, ("", "", [("g", {"a": 1})])),
        ('<tool_call>{"id": 7, "x": {"y": 1}, "name": "g", "arguments": {}}</tool_call>', {}, ("", "", [("g", {})])),
        # repairs
        ('<tool_call>{"name": "g", "arguments": {"a": 1}}}}\n</tool_call>ok', {}, ("", "ok", [("g", {"a": 1})])),
        ('<tool_call>{"name": "g", "arguments": {"a": 1}\n</tool_call>ok', {}, ("", "ok", [("g", {"a": 1})])),
        (
            '<tool_call>{"name": "g", "arguments": {"a": [1, 2,], "b": True,}}</tool_call>',
            {},
            ("", "", [("g", {"a": [1, 2], "b": True})]),
        ),
        (
            '<tool_call>{"name": "g", "arguments": {"a": "x\ny\tz\\d\\\'"}}</tool_call>',
            {},
            ("", "", [("g", {"a": "x\ny\tz\\d'"})]),
        ),
        ('<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', {}, ("", "", [("g", {"a": 1})])),
        (
            '<tool_call>{"name": "g", "arguments": {}}{"name": "f", "arguments": {}}</tool_call>',
            {},
            ("", "", [("g", {}), ("f", {})]),
        ),
        ('<tool_call>{"name": "g", "arguments": {"a": "cut o', {}, ("", "", [("g", {"a": "cut o"})])),
        ('<tool_call>{"name": "g", "arguments": {"a": [1, {"b', {}, ("", "", [("g", {"a": [1, {"b": None}]})])),
        ('<tool_call>{"name": "g"', {}, ("", "", [("g", {})])),
        ("<function=f>\n<parameter=text>\nx\n</parameter>\n</function>ok", {}, ("", "ok", [("f", {"text": "x"})])),
        ("<tool_call><function=f><parameter=count>4</parameter></tool_call>ok", {}, ("", "ok", [("f", {"count": 4})])),
        ("<tool_call><function=f><parameter=text>\ncut </para", {}, ("", "", [("f", {"text": "cut "})])),
        ("<tool_call><function=f></function></tool_call>", {}, ("", "", [("f", {})])),
        (f"<tool_call>\n<function=f>\n<parameter=text>\nx{LOST_TAGS}", {}, ("", "", [("f", {"text": "x"})])),
        (f"<tool_call>\n<function=f>\n<parameter=count>\n3{LOST_TAGS}\n", {}, ("", "", [("f", {"count": 3})])),
        (
            f"<tool_call>\n<function=f>\n<parameter=text>\nx{LOST_TAGS}\n{XML_CALL} so",
            {},
            ("", " so", [("f", {"text": "x"}), ("f", XML_ARGUMENTS)]),
        ),
        (
            "<tool_call>\n<function=f>\n<parameter=text>\nx\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
            {},
            ("", "", [("f", {"text": "x"}), ("g", {})]),
        ),
        (  # with its end tag the same is text
            f"<tool_call>\n<function=f>\n<parameter=text>\nx{LOST_TAGS}\n\n</parameter>{LOST_TAGS}",
            {},
            ("", "", [("f", {"text": f"x{LOST_TAGS}\n"})]),
        ),
        *[
            (
                f"<tool_call><function=f><parameter={key}>\n{said}\n</parameter></function></tool_call>",
                {},
                ("", "", [("f", {key: value})]),
            )
            for key, said, value in [
                ("note", "null", None),
                ("note", " None ", None),
                ("note", "nullable", "nullable"),
                ("note", "", ""),
                ("note", "{}", "{}"),
                ("open", "null", "null"),
                ("open", " words {}", " words {}"),
                ("open", '{"a": [1]}', {"a": [1]}),
                ("open", "[1, 'a']", [1, "a"]),
                ("open", "[1, a]", "[1, a]"),
                ("mode", "a", "a"),
                ("size", "7", 7),
                ("unheard", "7", "7"),
            ]
        ],
        # not calls: text, to the character
        ("<function=nope>\n<parameter=text>", {}, ("", "<function=nope>\n<parameter=text>", [])),
        ("<tool_call>hello</tool_call>", {}, ("", "<tool_call>hello</tool_call>", [])),
        ("<tool_call>\n<b>x", {}, ("", "<tool_call>\n<b>x", [])),
        (
            '<tool_call>{"arguments": {"a": 1}}</tool_call> \n',
            {},
            ("", '<tool_call>{"arguments": {"a": 1}}</tool_call> \n', []),
        ),
        ('<tool_call>{"name": "g", "arguments": {"a": [: rest', {}, ("", ": rest", [("g", {"a": []})])),
        ('<tool_call>{"name": "", "arguments": {}}', {}, ("", '<tool_call>{"name": "", "arguments": {}}', [])),
        ('<tool_call>{"arguments": 5, "name": "g"}', {}, ("", '<tool_call>{"arguments": 5, "name": "g"}', [])),
        ('<tool_call>{"nam', {}, ("", '<tool_call>{"nam', [])),
        (f"<tool_call>{JSON_CALL}", {}, ("", "<tool_call>", [("f", JSON_ARGUMENTS)])),
        ("a < b <tool", {}, ("", "a < b <tool", [])),
    ],
)
def test_answers(text, kwargs, expected):
    assert parse(text, **kwargs) == expected
    assert parse(text, chunks=list(text), **kwargs) == expected


snippets = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=f>",
        "<function=",
        "</function>",
        "<parameter=text>",
        "<parameter=count>",
    ]
    + [
        "</parameter>",
        "<parameter=note>",
        "<parameter=open>",
        "null",
        "\n",
        " ",
        "{",
        "}",
        '{"name": "f", "arguments": {',
        '{"name": "g"',
        '"a": ',
        '"b\\',
        '"',
        ",",
        "[",
        "]",
        "true",
        "12",
        "x y",
        "<",
    ]
    + [JSON_CALL, XML_CALL]
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.lists(snippets | st.text(max_size=4), max_size=12).map("".join), st.data(), st.booleans())
def test_chunking_does_not_matter_and_calls_are_json(text, data, thinking):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(text, thinking=thinking)
    assert parse(text, chunks=chunks, thinking=thinking) == whole
    assert parse(text, chunks=list(text) or [""], thinking=thinking) == whole
    assert all(isinstance(arguments, dict) for _, arguments in whole[2])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet=st.sampled_from('ab <>/\n{}"think_colparmetu=:'), max_size=60))
def test_without_calls_nothing_is_lost(text):
    reasoning, content, calls = parse(text)
    if not calls and not text.lstrip().startswith("<think>"):
        assert (reasoning, content) == ("", text)


def test_arguments_stream_while_they_are_written():
    parser = OutputParser(tools=TOOLS)
    assert parser.push('<tool_call>\n{"name": "f", "arg') == [CallStart(0, "f")]
    assert parser.push('uments": {"text": "long') == [CallArguments(0, '{"text": "long')]
    assert parser.push(" story") == [CallArguments(0, " story")]
    parser = OutputParser(tools=TOOLS)
    assert parser.push("<tool_call>\n<function=f>\n<parameter=text>\nlong") == [
        CallStart(0, "f"),
        CallArguments(0, '{"text": "long'),
    ]
    assert parser.push(" story\n") == [CallArguments(0, " story")]


@pytest.mark.parametrize("key", ["text", "note", "open", "mode"])
def test_no_string_lags_behind_by_more_than_what_may_be_a_tag(key):
    """Also where the schema allows null besides, or says nothing: the first word tells."""
    said = 'A long story, with <b>, </p, a "quote",\nnew lines\n\nand </function>\nin it. ' * 3
    parser = OutputParser(tools=TOOLS)
    pieces = parser.push(f"<tool_call>\n<function=f>\n<parameter={key}>\n")
    for i, char in enumerate(said):
        pieces += parser.push(char)
        [(_, so_far)] = fold(pieces)[2]
        if (
            not f"{said[: i + 1]}".rstrip().endswith(("<", "</", "</p", "</f", "</function>"))
            and "</f" not in said[i - 12 : i + 1]
        ):
            given = json.loads(so_far + '"}')[key]
            assert said.startswith(given) and i + 1 - len(given) <= 1, (i, given)
    pieces += parser.push("\n</parameter>\n</function>") + parser.flush()
    assert json.loads(fold(pieces)[2][0][1]) == {key: said}


def test_a_value_of_another_type_comes_when_it_is_complete():
    parser = OutputParser(tools=TOOLS)
    assert parser.push("<tool_call><function=f><parameter=count>12") == [
        CallStart(0, "f"),
        CallArguments(0, '{"count": '),
    ]
    assert parser.push("3\n</parameter>") == [CallArguments(0, "123")]


@pytest.mark.parametrize("key", ["text", "rows"])
def test_long_values_take_time_in_proportion(key):
    """Strings as they come, and a list of them when it is complete; both full of what looks like tags."""
    parameters = {"properties": {"text": {"type": "string"}, "rows": {"type": "array"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]

    def seconds(rows):
        value = json.dumps(["<p>row</p> </parameter </f" for _ in range(rows)])
        answer = f"<tool_call><function=f><parameter={key}>{value}</parameter></function>"
        parser, begun = OutputParser(tools=tools), time.thread_time()
        pieces = [piece for char in answer for piece in parser.push(char)]
        [(_, arguments)] = fold(pieces + parser.flush())[2]
        assert json.loads(arguments)[key] == (json.loads(value) if key == "rows" else value)
        return time.thread_time() - begun

    # Ten times as long; squared it would be a hundred. Of three tries the quickest, because others use this machine's caches too.
    assert min(seconds(2000) for _ in range(3)) < 40 * min(seconds(200) for _ in range(3))


def test_content_is_held_back_only_as_long_as_needed():
    parser = OutputParser(tools=TOOLS, thinking=True)
    assert parser.push("hm") == [Reasoning("hm")] and parser.in_reasoning
    assert parser.push("</think>\n\nA <") == [Content("A")]
    assert parser.push("b") == [Content(" <b")] and not parser.in_reasoning


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4), st.booleans(), st.data())
def test_json_stream_passes_json_and_closes_any_beginning_of_it(value, ascii_only, data):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=data.draw(st.sampled_from([None, 1])))
    stream = JsonObjectStream()
    assert "".join(map(stream.feed, text)) == text and stream.done
    stream = JsonObjectStream()
    beginning = "".join(map(stream.feed, text[: data.draw(st.integers(1, len(text) - 1))]))
    assert isinstance(json.loads(beginning + stream.close()), dict)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(list('{}[],:"\\ \nu0a-1.e\x01é') + ["true", "None", "\\u12", '"a"']), max_size=25).map(
        "".join
    )
)
@example('"\\u00"')
def test_json_stream_gives_valid_json_whatever_comes(text):
    stream, out = JsonObjectStream(), ""
    for char in "{" + text:
        if stream.done:
            break
        try:
            out += stream.feed(char)
        except BrokenJson:
            break
    out += "" if stream.done else stream.close()
    assert isinstance(json.loads(out), dict)


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("123456789012345678901", {"type": "integer"}, 123456789012345678901),
        ("5", {"type": "number"}, 5),
        ("-2.5e3", {"type": "number"}, -2500.0),
        ("nan", {"type": "number"}, "nan"),
        ("true", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, "yes"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("['a', True]", {"type": "array"}, ["a", True]),
        ("[1,", {"type": "array"}, "[1,"),
        ('{"a": 1}', None, {"a": 1}),
        ("7", None, "7"),
        ("7", {"enum": [1, 7]}, 7),
        ("x", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, "x"),
    ],
)
def test_coerce(text, schema, expected):
    assert json.loads(coerce(text, schema)) == expected
