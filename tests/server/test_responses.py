"""POST /v1/responses with OpenAI's own client; the translation of its input; its events."""

import json
from typing import Any

import openai
import pytest

from pellucid.outputs import CompletionOutput, RequestMetrics, RequestOutput
from pellucid.server.conversation import AnswerForm, PartReader
from pellucid.server.protocol import ResponsesRequest
from pellucid.server.reasoning import count_reasoning
from pellucid.server.responses import _messages
from tests.server.conftest import Server

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]


def test_a_text_whole_and_streamed(smol: Server) -> None:
    client = smol.client()
    asked: Any = {"model": "smol", "input": "Name a colour.", "temperature": 0}
    asked |= {"instructions": "Answer in one word.", "max_output_tokens": 200}
    whole = client.responses.create(**asked)
    assert whole.status == "completed" and whole.output_text
    assert whole.instructions == "Answer in one word." and whole.id.startswith("resp_")
    assert [item.type for item in whole.output] == ["message"]
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    # The stream tells the same, its events in order.
    events: Any = list(client.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    ends = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds[-4:] == ends
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type.endswith("text.delta"))
    final = events[-1].response
    assert text == final.output_text == whole.output_text
    assert final.id == events[0].response.id
    # OpenAI's helper gathers the events without complaint.
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == text


def test_an_answer_that_is_cut_is_incomplete(locked: Server) -> None:
    client = locked.client(api_key="secret")
    asked: Any = {"model": "tiny", "input": "a", "max_output_tokens": 5, "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None and whole.usage.output_tokens == 5
    events: Any = list(client.responses.create(**asked, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output[0].status == "incomplete"


def test_a_required_tool_is_called_and_its_output_is_read(smol: Server) -> None:
    client = smol.client()
    asked: Any = {
        "model": "smol",
        "input": [{"role": "user", "content": "Weather in Paris?"}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 60,
        "temperature": 0,
    }
    whole = client.responses.create(**asked)
    call: Any = whole.output[0]
    assert [item.type for item in whole.output] == ["function_call"]
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
    events: Any = list(client.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[2] == "output_item.added" and events[2].item.name == "weather"
    deltas = "".join(e.delta for e in events if e.type.endswith("arguments.delta"))
    done = next(e for e in events if e.type.endswith("arguments.done"))
    assert deltas == done.arguments == call.arguments
    # The call and what came of it go back as items.
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    asked["input"] += [call.to_dict(), output]
    asked |= {"tool_choice": {"type": "function", "name": "weather"}}
    again: Any = client.responses.create(**asked).output[0]
    assert again.name == "weather"


def test_the_form_of_the_text(smol: Server) -> None:
    answer = smol.client().responses.create(
        model="smol",
        input="Name a city as JSON.",
        max_output_tokens=60,
        text={"format": {"type": "json_schema", "name": "city", "schema": PARAMETERS}},
    )
    assert json.loads(answer.output_text)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"store": True}, 400, "store"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"background": True}, 400, "background"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, 400, "include"),
        ({"input": []}, 400, "input"),
        ({"input": "a" * 5000}, 400, "input"),
        ({"input": [{"role": "king", "content": "a"}]}, 400, "input[0].role"),
        ({"input": [{"role": "user", "content": 1}]}, 400, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400,
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, 400,
         "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": [{"type": ["x"]}]}]}, 400,
         "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, 400, "input[0].arguments"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, 400, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, 400, "tools[0].name"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, 400, "tool_choice.type"),
        ({"reasoning": {"effort": 3}}, 400, "reasoning.effort"),
        ({"model": "gpt-5"}, 404, "model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_stream", [False, True])
def test_errors_name_the_field(
    server: Server, fields: dict[str, Any], status: int, param: str, is_stream: bool
) -> None:
    asked: Any = {"model": "tiny", "input": "a", "stream": is_stream} | fields
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().responses.create(**asked)
    assert (caught.value.status_code, caught.value.param) == (status, param)
    body: Any = caught.value.body
    assert "messages" not in body["message"] and "max_tokens" not in body["message"]


def test_items_of_one_answer_become_one_message() -> None:
    items: list[Any] = [
        {"role": "developer", "content": "B"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "message", "role": "assistant",
         "content": [{"type": "output_text", "text": "x"}, {"type": "refusal", "refusal": "y"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "o"},
    ]  # fmt: skip
    body = ResponsesRequest(input=items, instructions="A")
    messages = _messages(body, 100)
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for i, name in (("1", "f"), ("2", "g"))
    ]
    assert messages == [
        {"role": "system", "content": "A\n\nB"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "t", "content": "xy", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "o"},
    ]


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
ANSWER = f"<think>\nHm.</think>\n\nSee:{CALL}{CALL}"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_an_answer_is_read_as_parts_however_it_is_cut(size: int) -> None:
    reader = PartReader(AnswerForm(["f"]))
    changes = []
    for end in [*range(size, len(ANSWER), size), len(ANSWER)]:
        reason: Any = "stop" if end == len(ANSWER) else None
        completion = CompletionOutput(0, ANSWER[:end], [], finish_reason=reason)
        metrics = RequestMetrics(arrival_time=0.0)
        output = RequestOutput(
            request_id="r",
            prompt="p",
            prompt_token_ids=[1],
            outputs=[completion],
            finished=bool(reason),
            metrics=metrics,
        )
        changes += reader.read(output)
    parts = [(part.kind, part.name, part.content) for part in reader.parts]
    call = ("call", "f", '{"a": 1}')
    assert parts == [("reasoning", "", "Hm."), ("text", "", "See:"), call, call]
    # Each part opens once, grows to its content and closes before the next.
    order = [(c.part.index, c.kind) for c in changes if c.kind != "grow"]
    assert order == [(i, kind) for i in range(4) for kind in ("open", "close")]
    for part in reader.parts:
        grown = [c.text for c in changes if c.kind == "grow" and c.part is part]
        assert "".join(grown) == part.content


def test_tokens_of_the_reasoning_are_counted_to_its_end() -> None:
    assert count_reasoning([b"<think>", b"a", b"</thi", b"nk>", b"b", b"c"]) == 4
    assert count_reasoning([b"<think>", b"a"]) == 2
