"""Chat templates: messages are checked, honest templates give what transformers gives, and hostile
ones end soon.
"""

import time
import warnings
from typing import Any

import pytest

from pellucid.errors import FormatError, PellucidError, RequestError, UnsupportedError
from pellucid.tokenizer.chat_messages import ChatCopier
from pellucid.tokenizer.chat_template import ChatTemplate
from pellucid.tokenizer.from_gguf import from_gguf

from .tokenizer_vocabularies import byte_level

USER: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "é 😀 \"quotes\" 'n' <|im_end|>\n"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1, "é": [None, True, 1.5]}}}],
    },
    {"role": "tool", "content": '{"y": 2}', "name": "f"},
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "f", "description": "<é>", "parameters": {"b": 1, "a": {}}},
    }
]

HONEST = {
    "chatml": "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "white space": "{{ bos_token }}\n  {% for m in messages %}\n  {%- if loop.first %}"
    "\nfirst\n  {% endif %}\n"
    "{{ m.content | trim }}\n  {% endfor %}\n\n",
    "json": "{% for t in tools or [] %}{{ t | tojson }}{{ t | tojson(indent=4) }}"
    "{{ t | tojson(separators=(',', ':')) }}{% endfor %}"
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson "
    "}}{{ c }}{% endfor %}{% endfor %}",
    "namespace": "{% set ns = namespace(system='', n=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content[:3] }}{% if ns.n "
    "== 2 %}{% break %}{% endif %}{% endfor %}"
    "{{ ns.system ~ ns.n ~ none }}",
    "macros": "{% macro say(m, end='.') %}{{ m.role | upper }}{{ end }}{{ caller() if caller }}"
    "{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% call say(m, '!') %}({{ m.content | length }}){% "
    "endcall %}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages[0].content.replace('<', '[').split() | reverse | list }}{{ {'b': 1, 'a': 2} | "
    "dictsort }}{{ [3, 1, 2] | sort | first }}"
    "{{ 'a\nb' | indent(2) }}{{ missing | default('none given') }}{{ 'x' * 3 + 'y' }}{{ 7 // 2 ** "
    "2 % 5 }}"
    "{{ '{} and {a}'.format(1, a=2) }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<e>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "tests": "{% for m in messages %}{{ m.content is string }}{{ m.tool_calls is defined }}"
    "{{ 'f' in m }}{{ loop.last }}"
    "{{ loop.index0 % 2 == 0 }}{{ (m.name is defined and m.name) or '-' }}{% endfor %}"
    "{{ (1, 2) == (1, 2) }}{{ range(3) | list }}{{ dict(a=1).items() | list }}",
    "set block": "{% set x %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}"
    "{{ x | trim | title }}{% filter upper %}abc{% endfilter %}",
}


@pytest.mark.parametrize("source", HONEST.values(), ids=HONEST.keys())
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_a_template_gives_what_transformers_gives(
    source: str, tools: list[dict[str, Any]] | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    for add in (True, False):
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": add}
        expected = theirs.render_jinja_template(
            [CHAT], chat_template=source, bos_token="<s>", eos_token="</s>", **options
        )[0][0]
        assert (
            ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(CHAT, **options)
            == expected
        )


def test_the_date_can_be_asked_for() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(USER) in {
        time.strftime("%Y"),
        str(int(time.strftime("%Y")) - 1),
    }


def test_variables_of_the_caller_reach_the_template() -> None:
    variables = {"enable_thinking": True, "words": [{"x": 1}]}
    source = "{{ enable_thinking }}{{ words[0].x }}"
    assert ChatTemplate(source, {}).render(USER, chat_template_kwargs=variables) == "True1"


def test_a_template_that_refuses_is_quoted() -> None:
    source = "{{ raise_exception('Roles must alternate') if messages | length > 1 }}ok"
    assert ChatTemplate(source, {}).render(USER) == "ok"
    with pytest.raises(RequestError, match="refuses the messages: Roles must alternate"):
        ChatTemplate(source, {}).render(USER * 2)


def test_a_template_cannot_write_to_the_terminal_through_an_error() -> None:
    source = "{{ raise_exception('no\x1b[2J\ud800 ' ~ 'x' * 2000) }}"
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, {}).render(USER)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1100


def test_a_template_that_fails_says_how() -> None:
    with pytest.raises(RequestError, match=r"UndefinedError: .*no attribute 'date'"):
        ChatTemplate("{{ messages[0].date.year }}", {}).render(USER)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{% if %}", FormatError, "TemplateSyntaxError"),
        ("{{ '", FormatError, "TemplateSyntaxError"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", FormatError, "not valid"),
        ("{% for x in y %}" * 40 + "{% endfor %}" * 40, FormatError, "not valid"),
        ("{{ 1 | no_such_filter }}", UnsupportedError, "no_such_filter"),
        ("{{ '<b>' | urlize }}", UnsupportedError, "urlize"),
    ],
)
def test_what_is_no_template_is_refused(
    source: str, error: type[PellucidError], message: str
) -> None:
    with pytest.raises(error, match=message):
        ChatTemplate(source, {}).render(USER)


def test_a_template_has_a_longest_length() -> None:
    with pytest.raises(FormatError, match="262145 characters"):
        ChatTemplate("x" * (1 << 18) + "y", {})


# ---- messages


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\] is of type str"),
        ([{"content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 5, "content": "x"}], r"messages\[0\]\.role"),
        ([*USER, {"role": "user"}], r"messages\[1\]\.content"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\] is a part of type 'image_url'",
        ),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] is a part of type 'x'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            r"content\[0\]\.text must be a string",
        ),
        (
            [{"role": "user", "content": "x", "extra": object()}],
            r"messages\[0\]\.extra is of type object",
        ),
        (
            [{"role": "user", "content": "x", "extra": b"x"}],
            r"messages\[0\]\.extra is of type bytes",
        ),
    ],
)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatCopier().messages(messages)


def test_data_that_is_nested_too_deep_is_refused() -> None:
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="nested more than 32 deep"):
        ChatCopier().messages([{"role": "user", "content": "x", "extra": deep}])


# ---- what a template may touch


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "().__class__.__base__.__subclasses__()",
        "raise_exception.__globals__",
        "cycler.__init__.__globals__",
        "namespace.__init__",
        "namespace(_x=1)._x",
        "messages.__init__",
        "(messages | map('upper')).gi_frame",
        "'{0.__class__}'.format(1)",
        "messages[0]['__class__']",
    ],
)
def test_nothing_of_python_can_be_reached(expression: str) -> None:
    try:
        text = ChatTemplate("{{ " + expression + " }}", {}).render(USER)
    except RequestError as error:
        assert "unsafe" in str(error) or "undefined" in str(error) or "no attribute" in str(error)
    else:
        assert text == ""


def test_messages_cannot_be_changed_by_a_template() -> None:
    for change in (
        "messages.append(1)",
        "messages.clear()",
        "messages[0].pop('role')",
        "messages[0].update(role='x')",
    ):
        with pytest.raises(RequestError, match="unsafe"):
            ChatTemplate("{{ " + change + " }}", {}).render(USER)


# ---- through the tokenizer


def test_the_template_of_a_gguf_file_knows_its_special_tokens() -> None:
    metadata = byte_level() | {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    }
    tokenizer = from_gguf(metadata)
    prompt = tokenizer.apply_chat_template(USER)
    assert prompt == "<|im_start|>Hello<|im_end|>"
    ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
    assert (ids[0], ids[-1]) == (
        tokenizer.bos_token_id,
        tokenizer.encode("<|im_end|>", parse_special=True)[0],
    )


def test_another_template_may_be_for_tools() -> None:
    metadata = byte_level() | {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools",
    }
    tokenizer = from_gguf(metadata)
    assert [tokenizer.apply_chat_template(USER, tools=tools) for tools in (None, [], TOOLS)] == [
        "plain",
        "plain",
        "tools",
    ]
    assert tokenizer.chat_template == "plain"


def test_a_model_without_a_template_says_so() -> None:
    assert from_gguf(byte_level()).chat_template is None
    with pytest.raises(RequestError, match="no chat template"):
        from_gguf(byte_level()).apply_chat_template(USER)
    with pytest.raises(FormatError, match="chat_template is 5"):
        from_gguf(byte_level() | {"tokenizer.chat_template": 5})
