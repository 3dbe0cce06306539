"""Messages reach a template in the form that it reads, whichever form the client sent."""

import json
import logging
from typing import Any

import pytest

from pellucid.errors import RequestError
from pellucid.tokenizer.chat_messages import ChatCopier
from pellucid.tokenizer.chat_template import ChatTemplate
from pellucid.tokenizer.from_gguf import from_gguf

from .tokenizer_vocabularies import byte_level

USER: dict[str, Any] = {"role": "user", "content": "Hello"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
ARGUMENTS = '{"city":"Zürich","days": [1, 2]}'
LOOP = "{% for m in messages %}"


def render(source: str, *messages: dict[str, Any], **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options).plain


def call(arguments: Any = ARGUMENTS, content: Any = None, **fields: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls, **fields}


# ---- content: a text or parts

AS_TEXT = [
    LOOP + "[{{ m.content }}]{% endfor %}",
    LOOP + "[{{ m['content'] | trim }}]{% endfor %}",
    "{% set c = messages[0].content %}[{% for letter in c %}{{ letter }}{% endfor %}]",
]
AS_PARTS = [
    LOOP + "[{% for p in m.content %}{{ p.text }},{% endfor %}]{% endfor %}",
    LOOP + "[{% for p in m['content'] %}{{ p['text'] }},{% endfor %}]{% endfor %}",
    LOOP + "{% set c = m.content %}[{% for p in c %}{{ p.text }},{% endfor %}]{% endfor %}",
    "{% set ns = namespace(c='') %}{% set ns.c = messages[0].content %}"
    "[{% for p in ns.c if p.type == 'text' %}{{ p.text }},{% endfor %}]",
    "{% macro say(parts) %}[{% for p in parts %}{{ p.text }},{% endfor %}]{% endmacro %}"
    "{{ say(messages[0].content) }}",
    "{% macro say(x, parts=none) %}[{% for p in parts %}{{ p.text }},{% endfor %}]{% endmacro %}"
    "{{ say(1, parts=messages[0]['content']) }}",
    LOOP + "[{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }},"
    "{% endfor %}]{% endfor %}",
    LOOP + "[{{ m.content | map(attribute='text') | join(',') }},]{% endfor %}",
    LOOP + "[{% for p in m.get('content') %}{{ p.text }},{% endfor %}]{% endfor %}",
]
EITHER = [
    LOOP + "{% if m.content is string %}[{{ m.content }}]{% else %}"
    "[{% for p in m.content %}{{ p.text }},{% endfor %}]{% endif %}{% endfor %}",
    "{% macro say(c) %}{% if c is string %}[{{ c }}]{% else %}"
    "[{% for p in c %}{{ p.text }},{% endfor %}]{% endif %}{% endmacro %}"
    "{{ say(messages[0].content) }}",
]


@pytest.mark.parametrize("source", AS_TEXT)
def test_a_template_that_reads_texts_gets_parts_as_lines(source: str) -> None:
    assert render(source, {"role": "user", "content": PARTS}) == "[a\nb]"
    assert render(source, {"role": "user", "content": "a b"}) == "[a b]"


@pytest.mark.parametrize("source", AS_PARTS)
def test_a_template_that_loops_over_parts_gets_parts(source: str) -> None:
    assert render(source, {"role": "user", "content": PARTS}) == "[a,b,]"
    assert render(source, {"role": "user", "content": "a b"}) == "[a b,]"


@pytest.mark.parametrize("source", EITHER)
def test_a_template_that_takes_both_gets_what_the_client_sent(source: str) -> None:
    assert render(source, {"role": "user", "content": PARTS}) == "[a,b,]"
    assert render(source, {"role": "user", "content": "a b"}) == "[a b]"


# ---- content beside tool calls

# as DeepSeek's templates ask
NULL = (
    LOOP + "{% if m['role'] == 'assistant' and m['content'] is none %}{% for t in m['tool_calls'] "
    "%}{{ t['type'] + ':' + t['function']['name'] + ':' + t['function']['arguments'] }}{% endfor "
    "%}{% elif m['role'] == 'assistant' %}{{ 'says ' + m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("content", [None, "", []])
def test_a_template_that_asks_for_null_sees_the_call(content: Any) -> None:
    expected = f"function:weather:{ARGUMENTS}"
    assert render(NULL, USER, call(content=content)) == expected
    absent = call()
    del absent["content"]
    assert render(NULL, USER, absent) == expected
    assert render(NULL, USER, {"role": "assistant", "content": "so"}) == "says so"


@pytest.mark.parametrize(
    "source",
    [
        LOOP + "{{ m.content + '!' }}{% endfor %}",
        LOOP + "{{ m.content | length }}!{% endfor %}",
        LOOP + "{{ m.content }}!{% endfor %}",
        # it asks, and yet needs a text
        LOOP + "{% if m.content is none and not m.tool_calls %}?{% endif %}"
        "{{ m.content + '!' }}{% endfor %}",
    ],
)
def test_a_template_that_needs_a_text_gets_an_empty_one(source: str) -> None:
    assert render(source, USER, call()) in ("Hello!!", "5!0!")


def test_content_may_be_null_beside_reasoning_and_not_else() -> None:
    assert render(AS_TEXT[0], {"role": "assistant", "content": None, "reasoning": "so"}) == "[]"
    with pytest.raises(RequestError, match=r"messages\[0\]\.content must be a string"):
        render(AS_TEXT[0], {"role": "assistant", "content": None})


# ---- arguments of tool calls

CALLS = LOOP + "{% for t in m.tool_calls or [] %}"
END = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "body",
    [
        "{% for k, v in t.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
        "{% for k, v in t.function.arguments | items %}{{ k }}={{ v }};{% endfor %}",
        "{% for k in t.function.arguments %}{{ k }}={{ t.function.arguments[k] }};{% endfor %}",
        "{% set f = t.function %}{% set a = f.arguments %}"
        "{% for k, v in a | dictsort %}{{ k }}={{ v }};{% endfor %}",
        "{% if t.function.arguments is string %}{{ t.function.arguments }}{% else %}"
        "{% for k, v in t.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}{% endif %}",
    ],
)
@pytest.mark.parametrize("given", [ARGUMENTS, json.loads(ARGUMENTS)], ids=["JSON", "mapping"])
def test_a_template_that_takes_arguments_apart_gets_a_mapping(body: str, given: Any) -> None:
    assert render(CALLS + body + END, USER, call(given)) == "city=Zürich;days=[1, 2];"


@pytest.mark.parametrize(
    "body",
    [
        "{{ t.function.arguments | tojson }}",
        "{% set a = t.function.arguments %}{{ '' ~ (a | tojson) }}",
    ],
)
@pytest.mark.parametrize("given", [ARGUMENTS, json.loads(ARGUMENTS)], ids=["JSON", "mapping"])
def test_json_of_arguments_is_made_once(body: str, given: Any) -> None:
    assert render(CALLS + body + END, call(given)) == '{"city": "Zürich", "days": [1, 2]}'


def test_json_of_a_whole_call_holds_a_mapping() -> None:
    expected = '{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}'
    assert render(CALLS + "{{ t.function | tojson }}" + END, call()) == expected


@pytest.mark.parametrize(
    "body",
    [
        "{{ t.function.arguments }}",
        "{{ '' + t['function']['arguments'] + '' }}",
        "{{ t.function.name ~ t.function.arguments }}",
        "{% if t.function.arguments is string %}{{ t.function.arguments }}{% else %}"
        "{{ t.function.arguments | tojson }}{% endif %}",
    ],
)
def test_a_template_that_writes_arguments_gets_them_as_they_were_sent(body: str) -> None:
    assert render(CALLS + body + END, call()).removeprefix("weather") == ARGUMENTS


def test_a_template_that_writes_arguments_gets_a_mapping_as_json() -> None:
    source = CALLS + "{{ '' + t.function.arguments }}" + END
    assert render(source, call({"city": "Zürich"})) == '{"city": "Zürich"}'
    both = CALLS + "{{ t.function.arguments if t.function.arguments is string else 'map' }}" + END
    assert render(both, call({"city": "Zürich"})) == "map"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"city": ', r"messages\[1\]\.tool_calls\[0\]\.function\.arguments is not JSON"),
        ("[" * 100_000, r"arguments is not JSON"),
        ("[" * 40 + "]" * 40, r"arguments is nested more than 32 deep"),
    ],
)
def test_arguments_that_are_not_json_are_told(arguments: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(CALLS + "{{ t.function.arguments | tojson }}" + END, USER, call(arguments))


@pytest.mark.parametrize("arguments", ["", " ", "{}", {}])
def test_no_arguments_are_an_empty_mapping(arguments: Any) -> None:
    assert render(CALLS + "{{ t.function.arguments | tojson }}" + END, call(arguments)) == "{}"


# ---- reasoning

NAMES = ("reasoning_content", "reasoning", "thinking")


@pytest.mark.parametrize("sent", NAMES)
@pytest.mark.parametrize("read", NAMES)
@pytest.mark.parametrize("form", ["{{ m.%s }}", "{{ m['%s'] }}", "{{ m.get('%s') }}"])
def test_reasoning_is_one_field(sent: str, read: str, form: str) -> None:
    message = {"role": "assistant", "content": "x", sent: "so"}
    assert render(LOOP + form % read + "{% endfor %}", message) == "so"


def test_reasoning_is_not_made_up() -> None:
    source = LOOP + "{{ m.reasoning is defined }}{{ m | length }}{% endfor %}"
    assert render(source, {"role": "assistant", "content": "x", "thinking": "so"}) == "True4"
    assert render(source, {"role": "assistant", "content": "x"}) == "False2"
    source = LOOP + "{{ m.content }}{{ m | length }}{% endfor %}"
    assert render(source, {"role": "assistant", "content": "x", "thinking": "so"}) == "x3"
    with pytest.raises(RequestError, match=r"messages\[0\]\.thinking must be a string"):
        render(source, {"role": "assistant", "content": "x", "thinking": ["so"]})


# ---- which template

NAMED = {"default": "plain", "tool_use": "tools", "rag": "{{ documents | length }} documents"}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def test_the_template_is_chosen_as_transformers_does() -> None:
    template = ChatTemplate(NAMED, {})
    assert template.names == ["default", "rag", "tool_use"] and template.source == "plain"
    options: list[dict[str, Any]] = [
        {},
        {"tools": []},
        {"tools": TOOLS},
        {"tools": TOOLS, "chat_template": "default"},
        {"chat_template": "rag", "chat_template_kwargs": {"documents": [1, 2]}},
        {"tools": TOOLS, "chat_template": "{{ 'my own' }}"},
    ]
    rendered = [template.render([USER], **chosen) for chosen in options]
    assert rendered == ["plain", "plain", "tools", "plain", "2 documents", "my own"]


def test_a_model_without_a_default_template_asks_for_a_name() -> None:
    template = ChatTemplate({"rag": "x", "tool_use": "tools"}, {})
    assert template.source is None
    assert template.render([USER], tools=TOOLS) == "tools"
    with pytest.raises(RequestError, match="must name one of 'rag', 'tool_use'"):
        template.render([USER])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("tooluse", r"chat_template is 'tooluse', which is neither .* \('default', 'rag', 'tool_"),
        ("template.jinja", "neither the text of a template nor the name"),
        (5, "chat_template is of type int"),
        ("{{" + "x" * (1 << 18), "262146 characters"),
    ],
)
def test_what_is_neither_a_name_nor_a_template_is_refused(chosen: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(NAMED, {}).render([USER], chat_template=chosen)


def test_a_model_without_a_template_can_be_given_one() -> None:
    tokenizer = from_gguf(byte_level())
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    prompt = tokenizer.apply_chat_template([USER], chat_template=source)
    assert prompt == "<|im_start|>Hello<|im_end|>"
    with pytest.raises(RequestError, match=r"which is neither .* \(none\)"):
        tokenizer.apply_chat_template([USER], chat_template="default")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "the chat_template given is not valid: TemplateSyntaxError"),
        ("{{ 1 | urlize }}", "the chat_template given asks for what is not built"),
        ("{{ messages[0].x.y }}", "the chat_template given fails on these messages"),
        ("{{ raise_exception('no') }}", "the chat_template given refuses the messages: no"),
    ],
)
def test_an_error_in_a_template_of_the_caller_is_the_requests(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(NAMED, {}).render([USER], chat_template=source)


# ---- variables


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "add_generation_prompt", "bos_token", "strftime_now", "chat_template"],
)
def test_reserved_variables_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"chat_template_kwargs must not set '{name}'"):
        render("{{ x }}", USER, chat_template_kwargs={name: 1})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ([], "chat_template_kwargs is of type list"),
        ({5: 1}, "has the name '5'"),
        ({"a b": 1}, "has the name 'a b'"),
        ({"x": object()}, r"chat_template_kwargs\.x is of type object"),
        ({f"x{i}": 1 for i in range(65)}, "has 65 entries; it may have at most 64"),
    ],
)
def test_wrong_variables_are_named(variables: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render("{{ x }}", USER, chat_template_kwargs=variables)


def test_a_variable_that_a_template_does_not_read_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    template = ChatTemplate("{{ enable_thinking }}", {})
    variables = {"enable_thinking": False, "enable_thinkng": False}
    with caplog.at_level(logging.WARNING):
        assert template.render([USER], chat_template_kwargs=variables) == "False"
        template.render([USER], chat_template_kwargs=variables)
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template does not read chat_template_kwargs['enable_thinkng']"
    ]


# ---- a last message to continue

CHATML = (
    LOOP + "<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTINUE: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}


@pytest.mark.parametrize(
    ("source", "content", "end"),
    [
        (CHATML, "It is", "It is"),
        (CHATML, "It is ", "It is "),
        (CHATML.replace("m.content", "m.content | trim"), " It is ", "It is"),
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "<t></think>so", "so"),
        (CHATML.replace("m.content", "(m.content ~ '!').strip()"), "<|end|>", "<|end|>"),
        (CHATML, PARTS, "a\nb"),
        (
            CHATML.replace("m.content", "m.content[0].text ~ m.content[1:] | map(attribute='text')"
            " | join"),
            PARTS,
            "ab",
        ),
    ],
)  # fmt: skip
def test_the_prompt_ends_where_the_last_message_ends(source: str, content: Any, end: str) -> None:
    users = {"role": "user", "content": [{"type": "text", "text": "Hi"}, PARTS[0]]}
    prompt = ChatTemplate(source, {}).render(
        [users if "map" in source else USER, {"role": "assistant", "content": content}], **CONTINUE
    )
    assert prompt.endswith(f"<|assistant|>{end}")
    assert prompt.foreign[-len(end) :] == b"\1" * len(end)
    assert set(prompt.foreign) == {0, 1}


@pytest.mark.parametrize(
    ("source", "content", "options", "message"),
    [
        (CHATML, "", CONTINUE, "does not write the text of the last message"),
        (LOOP + "{{ m | tojson }}{% endfor %}", "x", CONTINUE, "in another form"),
        ("{{ messages[0].role }}", "x", CONTINUE, "does not write the text"),
        (CHATML, "x", CONTINUE | {"add_generation_prompt": True}, "are both true"),
    ],
)
def test_a_message_that_cannot_be_continued_is_told(
    source: str, content: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        render(source, USER, {"role": "assistant", "content": content}, **options)


# ---- bounds on what a client sends


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


SHARED: Any = ["x"]
for _ in range(30):
    SHARED = [SHARED, SHARED]
CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": [USER] * 40_000}, "messages has 40000 entries; it may have at most 32768"),
        ({"messages": [USER | {"content": "x" * (1 << 23)}]}, "is too long"),
        ({"messages": [USER | {"content": "x" * (1 << 20)}] * 9}, r"messages\[7\]\S* is too long"),
        ({"messages": [USER | {"x": SHARED}]}, "may hold 262144 values together"),
        ({"messages": [USER | {"x": CYCLE}]}, "nested more than 32 deep"),
        ({"messages": [USER | {"x": 7**1000}]}, "a number of more than 1024 bits"),
        ({"tools": [{}] * 2000}, "tools has 2000 entries; it may have at most 1024"),
        ({"tools": [{"x": nested(40)}]}, r"tools\[0\]\.x\S* is nested more than 32 deep"),
        ({"tools": "weather"}, "tools is of type str; it must be a list"),
        ({"tools": ["weather"]}, r"tools\[0\] is of type str; it must be a mapping"),
        ({"chat_template_kwargs": {"x": nested(40)}}, "nested more than 32 deep"),
        ({"chat_template_kwargs": {"x": ["y"] * 300_000}}, "may hold 262144 values"),
    ],
)
def test_what_a_client_sends_is_bounded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate("x", {}).render(**{"messages": [USER], **options})


def test_a_long_conversation_is_far_from_the_limits() -> None:
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": "words and words " * 100} for i in range(1000)]
    assert len(ChatTemplate(CHATML, {}).render(chat)) > 1_600_000


def test_messages_of_the_caller_are_not_changed() -> None:
    message = call()
    before = json.dumps(message)
    render(CALLS + "{{ t.function.arguments | tojson }}" + END, message)
    assert json.dumps(message) == before


def test_texts_of_enums_and_strings_that_know_their_writer_are_plain() -> None:
    prompt = ChatTemplate("{{ messages[0].content }}!", {}).render([USER])
    (message,) = ChatCopier().messages([{"role": "user", "content": prompt}])
    assert type(message["content"]) is str and message["content"] == "Hello!"
