"""Structured output: what the masks allow, and where the constraint begins."""

from __future__ import annotations

import json

import numpy as np
import pytest

from helexa_engine.errors import InvalidRequest
from helexa_engine.sampling_params import StructuredOutput
from helexa_engine.text.structured import FreeCalls, GrammarCompiler, GrammarFailed, call_rules, format_rules

from .masks import allowed

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "$defs": {"z": {"enum": ["utc"]}},
            "type": "object",
            "properties": {"zone": {"$ref": "#/$defs/z"}},
            "required": ["zone"],
        },
    },
}


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer)


def accepts(state, tokenizer, text, *, special=False, end=True):
    """Whether each token of ``text``, and then the end of the turn, is allowed in turn."""
    ids = tokenizer.encode(text, allow_special=special)
    if end:
        ids.append(tokenizer.eos_token_ids[0])
    for token_id in ids:
        if not allowed(state, tokenizer.vocab_size)[token_id]:
            return False
        state.accept(token_id)
    return state.is_finished() == end


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}', '{"é🦙": "\\n"}'], ["[1]", "{", '{"a": }', "x"]),
        (
            {"json_schema": SCHEMA},
            ['{"city": "Paris", "days": 3}'],
            ['{"city": "Paris"}', '{"city": 1, "days": 3}', '{"city": "P", "days": 12}'],
        ),
        ({"json_schema": json.dumps(SCHEMA)}, ['{"city": "世界", "days": 3}'], ["{}"]),
        ({"regex": "[a-c]{2,3}(é|🦙)"}, ["abé", "cba🦙"], ["aé", "abcc", "xé"]),
        ({"grammar": 'start: "yes" | "no" " " /[0-9]+/'}, ["yes", "no 42"], ["no", "maybe"]),
        ({"grammar": 'root ::= "yes" | "no" " " num # GBNF\nnum ::= [0-9]+'}, ["yes", "no 42"], ["no", "maybe"]),
    ],
)
def test_masks(compiler, tokenizer, spec, good, bad):
    for text in good:
        assert accepts(compiler.compile(format_rules(StructuredOutput(**spec))), tokenizer, text), text
    for text in bad:
        assert not accepts(compiler.compile(format_rules(StructuredOutput(**spec))), tokenizer, text), text


def test_random_choices_among_allowed_tokens_give_valid_output(compiler, tokenizer):
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["red", "blue"]},
            "n": {"type": "integer", "maximum": 99, "minimum": 0},
            "on": {"type": "boolean"},
        },
        "required": ["kind", "n", "on"],
        "additionalProperties": False,
    }
    blanks = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).isspace()]
    for seed in range(20):
        rng, state, ids = (
            np.random.default_rng(seed),
            compiler.compile(format_rules(StructuredOutput(json_schema=schema))),
            [],
        )
        while not state.is_finished():
            mask = allowed(state, tokenizer.vocab_size)
            mask[blanks] &= not np.delete(mask, blanks).any()  # JSON may be indented for ever
            ids.append(int(rng.choice(np.flatnonzero(mask))))
            state.accept(ids[-1])
            assert len(ids) < 200
        value = json.loads(tokenizer.decode(ids, skip_special_tokens=True))
        assert value["kind"] in ("red", "blue") and 0 <= value["n"] <= 99 and isinstance(value["on"], bool)


def test_nothing_special_and_no_padding_is_allowed_inside_a_string(compiler, tokenizer):
    state = compiler.compile(format_rules(StructuredOutput(json_object=True)))
    for token_id in tokenizer.encode('{"a'):
        state.accept(token_id)
    logits = np.zeros(tokenizer.vocab_size + 9, np.float32)  # the model's vocabulary may be padded
    state.apply(logits)
    barred = [*tokenizer.added_tokens, *range(tokenizer.vocab_size - 5, len(logits))]
    assert np.isneginf(logits[barred]).all() and (logits == 0).sum() > 100


def test_mask_and_logits_agree(compiler, tokenizer):
    state = compiler.compile(format_rules(StructuredOutput(json_schema=SCHEMA)))
    mask = compiler.new_mask()
    state.fill_mask(mask)
    bits = [bool(mask[i // 32] >> (i % 32) & 1) for i in range(tokenizer.vocab_size)]
    assert bits == list(allowed(state, tokenizer.vocab_size)) and any(bits) and not all(bits)


@pytest.mark.parametrize("spec", [StructuredOutput(json_schema=SCHEMA), StructuredOutput(json_object=True)])
def test_white_space_is_a_space_or_a_line_with_its_indentation(compiler, tokenizer, spec):
    [opening], [space], [line] = (tokenizer.encode(text) for text in ("{", " ", "\n"))

    def count(first):
        state = compiler.compile(format_rules(spec))
        for token_id in (opening, first):
            assert allowed(state, tokenizer.vocab_size)[token_id]
            state.accept(token_id)
        for taken in range(40):
            mask = allowed(state, tokenizer.vocab_size)
            assert not mask[line]
            if not mask[space]:
                return taken
            state.accept(space)
        raise AssertionError("white space went on for ever")

    assert count(space) == 0 and count(line) == 32


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a": 1}', '{"b": 1}'),
        (
            {"type": "array", "items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"properties": {"a": {}}}}},
            '[{"a": 1}]',
            '[{"b": 1}]',
        ),
        ({"anyOf": [{"properties": {"a": {"type": "null"}}, "type": "object"}]}, '{"a": null}', '{"b": 1}'),
        ({"properties": {"properties": {"type": "object"}}, "type": "object"}, '{"properties": {"b": 1}}', '{"b": 1}'),
        (
            {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}, "type": "object"},
            '{"b": 1}',
            '{"b": ""}',
        ),
        (
            {"properties": {"a": {}}, "patternProperties": {"^b": {"type": "integer"}}, "type": "object"},
            '{"b": 1}',
            '{"b": ""}',
        ),
        ({"type": "object"}, '{"b": 1}', "[]"),
        (  # an object put together from two lists of properties
            {
                "allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}],
                "type": "object",
            },
            '{"a": 1, "b": 2}',
            '{"a": ""}',
        ),
    ],
)
def test_properties_that_are_listed_are_all_there_are(compiler, tokenizer, schema, good, bad):
    spec = StructuredOutput(json_schema=schema)
    assert accepts(compiler.compile(format_rules(spec)), tokenizer, good) and not accepts(
        compiler.compile(format_rules(spec)), tokenizer, bad
    )


def test_grammar_begins_after_thinking(compiler, tokenizer):
    spec = StructuredOutput(json_schema=SCHEMA)
    answer = '{"city": "Paris", "days": 3}'
    for gap in ("", "\n\n"):
        assert accepts(
            compiler.compile(format_rules(spec), "open"), tokenizer, f"free words</think>{gap}{answer}", special=True
        )
        assert accepts(
            compiler.compile(format_rules(spec), "may_open"),
            tokenizer,
            f"<think>free</think>{gap}{answer}",
            special=True,
        )
    assert accepts(compiler.compile(format_rules(spec), "may_open"), tokenizer, answer)
    assert not accepts(compiler.compile(format_rules(spec), "may_open"), tokenizer, "free words")
    assert not accepts(compiler.compile(format_rules(spec), "open"), tokenizer, "a</think>b", special=True)
    assert not accepts(compiler.compile(format_rules(spec), "no"), tokenizer, f"<think>x</think>{answer}", special=True)
    assert not compiler.compile(format_rules(spec), "open").is_finished()


def test_states_of_one_grammar_are_independent(compiler, tokenizer):
    first, second = (compiler.compile(format_rules(StructuredOutput(json_schema=SCHEMA))) for _ in range(2))
    assert accepts(first, tokenizer, '{"city": "P', end=False)
    assert accepts(second, tokenizer, '{"city": "Paris", "days": 3}')


@pytest.mark.parametrize("syntax", ["json", "xml"])
def test_forced_tool_calls(compiler, tokenizer, syntax):
    def make():
        return compiler.compile(call_rules(tokenizer, [WEATHER, CLOCK], syntax=syntax))

    calls = {
        "json": [
            '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
            '{"name": "clock", "arguments": {"zone": "utc"}}',
        ],
        "xml": [
            "<function=get_weather>\n<parameter=city>\nPa\nris\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>",
            "<function=clock>\n<parameter=zone>\nutc\n</parameter>\n</function>",
        ],
    }[syntax]
    tagged = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    for text in (*tagged, "\n".join(tagged)):
        assert accepts(make(), tokenizer, text, special=True), text
    wrong = [calls[0], tagged[0].replace("get_weather", "other"), tagged[0].replace("3", "x"), "hello"]
    for text in wrong:
        assert not accepts(make(), tokenizer, text, special=True), text


def wrap(*calls):
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.mark.parametrize("syntax", ["json", "xml"])
def test_one_call_and_no_more(compiler, tokenizer, syntax):
    call = wrap(
        '{"name": "clock", "arguments": {"zone": "utc"}}'
        if syntax == "json"
        else "<function=clock>\n<parameter=zone>\nutc\n</parameter>\n</function>"
    )

    def make(several):
        return compiler.compile(call_rules(tokenizer, [CLOCK], syntax=syntax, several=several))

    for several in (True, False):
        assert accepts(make(several), tokenizer, call, special=True)
    assert accepts(make(True), tokenizer, f"{call}\n{call}", special=True)
    assert not accepts(make(False), tokenizer, f"{call}\n{call}", special=True)


@pytest.mark.parametrize("syntax", ["json", "xml"])
def test_json_or_a_call(compiler, tokenizer, syntax):
    """What is asked for when there are tools and a format: the answer is in the format, unless a tool is called."""
    call = wrap(
        '{"name": "clock", "arguments": {"zone": "utc"}}'
        if syntax == "json"
        else "<function=clock>\n<parameter=zone>\nutc\n</parameter>\n</function>"
    )

    def make(spec):
        return compiler.compile(call_rules(tokenizer, [CLOCK], syntax=syntax, answer=spec))

    spec = StructuredOutput(json_schema=SCHEMA)
    for text in ('{"city": "Paris", "days": 3}', call):
        assert accepts(make(spec), tokenizer, text, special=True), text
    for text in ('{"city": "Paris"}', "words", f'{{"city": "Paris", "days": 3}}{call}'):
        assert not accepts(make(spec), tokenizer, text, special=True), text
    assert accepts(make(StructuredOutput(json_object=True)), tokenizer, '{"any": []}')
    with pytest.raises(InvalidRequest, match=r'response_format.schema: .*"not"'):
        make(StructuredOutput(json_schema={"not": {}}, path="response_format.schema"))


def test_values_of_tags_follow_references_and_lists(compiler, tokenizer):
    """The words an enum lists, JSON where no string is possible, and free text where one is."""
    parameters = {
        "type": "object",
        "definitions": {
            "Mode": {"enum": ["slow", "fast"]},
            "Box": {"$ref": "#/definitions/Size"},
            "Size": {"type": "integer"},
        },
        "properties": {
            "mode": {"$ref": "#/definitions/Mode"},
            "box": {"$ref": "#/definitions/Box"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "any": {},
            "on": {"type": "boolean"},
        },
        "required": ["mode", "box"],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}

    def call(**values):
        return wrap(
            "".join(
                ["<function=f>\n", *(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items()), "</function>"]
            )
        )

    def ok(text):
        return accepts(compiler.compile(call_rules(tokenizer, [tool], syntax="xml")), tokenizer, text, special=True)

    assert ok(call(mode="slow", box="3")) and ok(call(mode="fast", box="3", note="a <b>\nc", any="[1"))
    assert ok(call(mode="slow", box="3", on="true")) and ok(call(mode="slow", box="3", on="False"))
    assert not ok(call(mode="slow", box="3", on="1"))
    assert not ok(call(mode="slower", box="3")) and not ok(call(mode="slow", box="three")) and not ok(call(mode="slow"))


def test_the_turn_does_not_end_inside_the_thinking(compiler, tokenizer):
    state = compiler.compile(format_rules(StructuredOutput(json_object=True)), "open")
    mask = allowed(state, tokenizer.vocab_size)
    assert not mask[list(tokenizer.eos_token_ids)].any() and mask.sum() == tokenizer.vocab_size - len(
        tokenizer.eos_token_ids
    )
    bits = compiler.new_mask()
    state.fill_mask(bits)
    assert [bool(bits[i // 32] >> (i % 32) & 1) for i in range(tokenizer.vocab_size)] == list(mask)


@pytest.mark.parametrize("large", [False, True])
def test_copies_and_masks_ahead(compiler, tokenizer, monkeypatch, large):
    """Computed beside the model or when it is needed, the masks are the same, and a fault reaches who asks for one."""
    monkeypatch.setattr("helexa_engine.text.structured._LARGE_VOCABULARY", 0 if large else 10**9)
    first = compiler.compile(format_rules(StructuredOutput(json_schema=SCHEMA)), "may_open")
    for text in ('{"city": "Paris", "days": 3}', '<think>free</think>\n\n{"city": "世界", "days": 1}'):
        state = first.copy()
        assert (state._ahead is not None) == large
        assert accepts(state, tokenizer, text, special=True) and state.is_finished()
    assert not first.is_finished()
    state = first.copy()
    with pytest.raises(GrammarFailed):
        state.accept(tokenizer.encode("x")[0])
        state.apply(np.zeros(tokenizer.vocab_size, np.float32))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"json_schema": {"type": "object", "not": {}}}, r'structured.json_schema: .*"not"'),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "nope"}}, "nope"),
        ({"json_schema": "{"}, "invalid JSON"),
        ({"json_schema": "3"}, "JSON Schema object"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "structured.json_schema"),
        ({"json_schema": {"$ref": "#/$defs/missing"}}, "structured.json_schema"),
        ({"json_schema": {"type": "array", "contains": {}, "minContains": 1}}, '"contains", "minContains"'),
        ({"json_schema": {"type": "string", "format": "haiku"}}, "haiku"),
        ({"json_schema": {"not": {}}, "path": "response_format.schema"}, r"^response_format.schema: "),
        ({"regex": "(", "path": "guided"}, r"^guided: "),
        ({"regex": "a(b"}, r"structured.regex: .*unclosed group"),
        ({"grammar": "start: nope"}, r"structured.grammar"),
        ({"grammar": "start: ("}, r"structured.grammar"),
        ({"grammar": "root ::= (("}, r"structured.grammar: expected a grammar in GBNF or Lark"),
    ],
)
def test_unsupported_is_named(compiler, spec, words):
    with pytest.raises(InvalidRequest, match=words):
        compiler.compile(format_rules(StructuredOutput(**spec)))


# -- Calls that the model makes of its own accord

CALLS = {
    "json": (
        '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
        '{"name": "other", "arguments": {}}',
        '{"name": "get_weather", "arguments": {"city": 7',
    ),
    "xml": (
        "<function=get_weather>\n<parameter=city>\nPa\nris\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>",
        "<function=other>\n</function>",
        "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\nsoon",
    ),
}


@pytest.mark.parametrize("syntax", CALLS)
def test_a_call_once_opened_is_held_to_the_schema_and_the_text_around_it_is_free(compiler, tokenizer, syntax):
    good, *bad = CALLS[syntax]

    def guard(thinking="no"):
        return compiler.guard(FreeCalls(json.dumps([WEATHER, CLOCK]), syntax), thinking).copy()

    def free(state):
        return allowed(state, tokenizer.vocab_size).all()

    state = guard()
    for piece in ("words, {}", wrap(good), "\nmore", wrap(good), ""):
        for token_id in tokenizer.encode(piece, allow_special=True):
            assert allowed(state, tokenizer.vocab_size)[token_id], tokenizer.decode([token_id])
            state.accept(token_id)
        assert free(state) and not state.is_finished()
    for call in bad:
        assert not accepts(guard(), tokenizer, f"so: {wrap(call)}", special=True, end=False), call
    opened = guard()
    opened.accept(tokenizer.token_id("<tool_call>"))
    assert not allowed(opened, tokenizer.vocab_size)[list(tokenizer.eos_token_ids)].any()
    for thinking, text in (("open", "a <tool_call> in thought"), ("may_open", "<think><tool_call>")):
        thinker = guard(thinking)
        for token_id in tokenizer.encode(text, allow_special=True):
            thinker.accept(token_id)
        assert free(thinker), "what is thought is no call"
        for token_id in tokenizer.encode("</think><tool_call>", allow_special=True):
            thinker.accept(token_id)
        assert not free(thinker)


@pytest.mark.parametrize("syntax", CALLS)
def test_a_schema_beyond_the_compiler_leaves_its_tool_free_and_only_that(compiler, tokenizer, syntax, caplog):
    missing = {"type": "object", "properties": {"b": {"$ref": "#/$defs/missing"}}}
    broken = {"type": "object", "properties": {"a": missing}}
    tools = [WEATHER, {"type": "function", "function": {"name": "odd", "parameters": broken}}]
    good, other, wrong = CALLS[syntax]

    def ok(call, end):
        guard = compiler.guard(FreeCalls(json.dumps(tools), syntax))
        return accepts(guard, tokenizer, wrap(call) if end else f"<tool_call>\n{call}", special=True, end=False)

    odd = (
        '{"name": "odd", "arguments": {"any": [1]}}'
        if syntax == "json"
        else "<function=odd>\n<parameter=any>\n[1]\n</parameter>\n</function>"
    )
    assert ok(good, True) and ok(odd, True) and not ok(other, False) and not ok(wrong, False)
    assert "'odd' are not held to its schema" in caplog.text and "get_weather" not in caplog.text
    strict = {"type": "function", "function": {"name": "odd", "parameters": {"not": {}}, "strict": True}}
    with pytest.raises(InvalidRequest, match=r'tools\[1\].function.parameters: .*"not"'):
        compiler.guard(FreeCalls(json.dumps([WEATHER, strict]), syntax))
