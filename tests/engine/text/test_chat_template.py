"""Chat templates: HuggingFace's behaviour, inside a sandbox with bounds."""

from __future__ import annotations

from datetime import datetime

import pytest

from helexa_engine.errors import InvalidRequest, TemplateRenderFailed
from helexa_engine.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]
EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def render(source: str, messages=USER, **kwargs) -> str:
    return ChatTemplate(source, added_tokens={"<|im_end|>": True, "<think>": False}).render(messages, **kwargs).text


def test_helpers_of_huggingface():
    assert render('{{ {"a": "<é>&", "b": [1, true, none]} | tojson }}') == '{"a": "<é>&", "b": [1, true, null]}'
    assert render('{{ {"b": 1, "a": 2} | tojson(indent=1, sort_keys=true) }}') == '{\n "a": 2,\n "b": 1\n}'
    assert (
        render(
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        )
        == "02"
    )
    assert render("{% generation %}a{{ 1 }}{% endgeneration %}b") == "a1b"
    assert (
        render("{% set ns = namespace(x=1) %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}")
        == "4"
    )
    assert (
        render(
            "{% for a in [1,2,3] %}{{ loop.index0 }}{{ loop.last }}{{ loop.previtem }}{{ loop.length }} {% endfor %}"
        )
        == "0False3 1False13 2True23 "
    )
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert (
        render("{{ 'a b'.split(' ')[-1] ~ 'c' ~ 1 }}{{ [1, 2] | join('-') }}{{ 'aXa' | replace('a', 'b') }}")
        == "bc11-2bXb"
    )


def test_strftime_now():
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", now=lambda: datetime(2026, 1, 2))
    assert template.render(USER).text == "2026-01-02"


def test_raise_exception_gives_the_templates_words():
    with pytest.raises(TemplateRenderFailed, match="System message must be at the beginning") as caught:
        render("{{ raise_exception('System message must be at the beginning.') }}")
    assert caught.value.code == "template_render_failed"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ '{0.__class__}'.format(1) }}{{ raise_exception('not reached') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_sandbox(source):
    with pytest.raises(TemplateRenderFailed):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ ('a' * 9999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 99999) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
        "{{ [1] | tojson(indent=10**9) }}",
    ],
)
def test_bounded(source):
    with pytest.raises(TemplateRenderFailed):
        render(source)


def test_bad_syntax_names_the_line():
    with pytest.raises(TemplateRenderFailed, match="line 2"):
        render("\n{% for %}")


def test_messages_are_normalised():
    show = (
        "{% for m in messages %}[{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}"
        "({{ k }}={{ v }}){% endfor %}{% endfor %}]{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = [
        {"role": "developer", "content": "one"},
        {"role": "system", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "odd"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    assert render(show, messages) == "[system:one\n\ntwo][user:a\nb][assistant:(a=[1])][tool:3]"


def test_late_system_stays_in_place_when_the_template_refuses_it():
    source = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('first') }}{% endif %}"
        "[{{ m.role }}:{{ m.content }}]{% endfor %}"
    )
    messages = [{"role": "system", "content": "a"}, *USER, {"role": "system", "content": "late"}]
    assert render(source, messages) == "[system:a][user:hi][user:<system-reminder>\nlate\n</system-reminder>]"
    assert "[system:late]" in render("{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}", messages)


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ("hi", r"messages\[0\]"),
        ({"content": "x"}, r"messages\[0\].role"),
        ({"role": "user", "content": 3}, r"messages\[0\].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, r"messages\[0\].content\[0\]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "arguments"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "name"),
    ],
)
def test_bad_messages(message, path):
    with pytest.raises(InvalidRequest, match=path):
        render(EACH, [message])


def test_images_have_a_code_of_their_own():
    with pytest.raises(InvalidRequest) as caught:
        render(EACH, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}])
    assert caught.value.code == "vision_unsupported"


def test_capabilities():
    found = ChatTemplate(EACH).capabilities
    assert (found.system, found.late_system, found.same_role_turns, found.tools) == (True, True, True, False)
    assert (found.tool_syntax, found.thinking) == (None, False)


def test_markers_are_invisible_and_found():
    rendered = ChatTemplate(EACH, added_tokens={"<|im_end|>": True, "<think>": False}).render(
        [{"role": "user", "content": "a<|im_end|>b"}]
    )
    assert rendered.text == "<|im_start|>user\na<|im_end|>b<|im_end|>\n"
    first = rendered.text.index("<|im_end|>")
    second = rendered.text.index("<|im_end|>", first + 1)
    assert rendered.marks.forbid(first, first + 10) and not rendered.marks.forbid(second, second + 10)


def test_templates_still_see_what_messages_contain():
    source = "{% for m in messages %}{% if '<think>' in m.content %}yes{{ m.content.split('<think>')[-1] }}{% endif %}{% endfor %}"
    assert render(source, [{"role": "user", "content": "a<think>b"}]) == "yesb"
    assert render(source, [{"role": "assistant", "content": "a<think>b"}]) == "yesb"
