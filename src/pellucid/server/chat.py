"""POST /v1/chat/completions: the next message of a conversation, with reasoning and tool calls."""

from typing import Any

from starlette.responses import Response

from ..outputs import CompletionOutput, RequestOutput
from .conversation import AnswerForm, AnswerReader, start_chat
from .generation import Job, timings, usage
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol import ChatRequest
from .service import Service
from .streaming import GeneratedResponse, event
from .tool_calls import CallDelta

__all__ = ["chat"]


def chat(service: Service, body: ChatRequest, key: str) -> Response:
    """The response to a checked body. Raises ApiError or PellucidError where it is refused."""
    stream, params, form = start_chat(service, body, key)
    job = Job.build("chatcmpl-", body, params, key, stream)
    return GeneratedResponse(service, job, _Renderer(service, job, body, form))


class _Renderer:
    """Bodies of chat completions."""

    def __init__(self, service: Service, job: Job, body: ChatRequest, form: AnswerForm) -> None:
        self._job = job
        self._body = body
        self._form = form
        self._choices: dict[int, AnswerReader] = {}
        self._head = {"id": job.id, "created": job.created, "model": service.name}

    def begin(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        beside: dict[str, Any] = {"usage": None} if self._job.includes_usage else {}
        return b"".join(
            self._event(
                {"index": i, "delta": role, "logprobs": None, "finish_reason": None}, beside
            )
            for i in range(self._job.n)
        )

    def push(self, place: int, output: RequestOutput) -> bytes:
        return b"".join(self._chunks(output, completion) for completion in output.outputs)

    def _chunks(self, output: RequestOutput, completion: CompletionOutput) -> bytes:
        """The events of what is new in one completion."""
        state = self._state(output, completion)
        if state.is_done:
            return b""
        first, state.num_tokens = state.num_tokens, completion.num_tokens
        reasoning, pieces = state.read(completion)
        deltas: list[dict[str, Any]] = []
        if reasoning and self._body.include_reasoning is not False:
            deltas.append({"reasoning_content": reasoning})
        for piece in pieces:
            deltas.append({"content": piece} if isinstance(piece, str) else _call_delta(piece))
        extras = self._extras(output, completion, first)
        if not deltas and extras and state.num_tokens > first:
            deltas.append({})
        events = []
        beside = self._job.beside_choice(output, completion, is_last=False)
        for i, delta in enumerate(deltas):
            choice = {"index": completion.index, "delta": delta, "logprobs": None}
            choice |= {"finish_reason": None} | (extras if i == len(deltas) - 1 else {})
            events.append(self._event(choice, beside))
        # The last chunk has an empty delta and the reason.
        if completion.finished():
            state.is_done = True
            is_last = all(self._state(output, c).is_done for c in output.outputs)
            beside = self._job.beside_choice(output, completion, is_last=is_last)
            events.append(
                self._event(
                    {
                        "index": completion.index,
                        "delta": {},
                        "logprobs": None,
                        "finish_reason": self._reason(state, completion),
                        "stop_reason": completion.stop_reason,
                    },
                    beside,
                )
            )
        return b"".join(events)

    def _state(self, output: RequestOutput, completion: CompletionOutput) -> AnswerReader:
        state = self._choices.get(completion.index)
        if state is None:
            state = self._choices[completion.index] = AnswerReader(output, self._form)
        return state

    def _reason(self, state: AnswerReader, completion: CompletionOutput) -> str | None:
        if state.has_calls and completion.finish_reason == "stop":
            return "tool_calls"
        return completion.finish_reason

    def _extras(
        self, output: RequestOutput, completion: CompletionOutput, first: int
    ) -> dict[str, Any]:
        """Logprobs and token ids from token `first` on, where they are asked for."""
        extras: dict[str, Any] = {}
        if self._body.logprobs and completion.logprobs is not None:
            stop = len(completion.logprobs)
            content = chat_logprobs(
                completion.token_ids[first:stop],
                completion.logprobs[first:stop],
                self._body.top_logprobs or 0,
            )
            extras["logprobs"] = {"content": content, "refusal": None}
        if self._body.return_token_ids:
            extras["token_ids"] = completion.token_ids[first:]
            if not first:
                extras["prompt_token_ids"] = output.prompt_token_ids
        return extras

    def _event(self, choice: dict[str, Any], beside: dict[str, Any]) -> bytes:
        return event(self._head | {"object": "chat.completion.chunk", "choices": [choice]} | beside)

    def end(self, outputs: list[RequestOutput]) -> bytes:
        last = b""
        if self._job.includes_usage:
            times = timings(outputs[0], is_explained=self._job.includes_explanation)
            told = {"choices": [], "usage": usage(outputs), "timings": times}
            last = event(self._head | {"object": "chat.completion.chunk"} | told)
        return last + b"data: [DONE]\n\n"

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        output = outputs[0]
        body = self._head | {
            "object": "chat.completion",
            "choices": [self._whole_choice(output, c) for c in output.outputs],
            "usage": usage(outputs),
            "timings": timings(output),
        }
        if self._body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return body

    def _whole_choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        state = self._state(output, completion)
        reasoning, pieces = state.read(completion)
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, str):
                continue
            if piece.name is not None:
                calls.append(
                    {
                        "id": piece.id,
                        "type": "function",
                        "function": {"name": piece.name, "arguments": piece.arguments},
                    }
                )
            else:
                calls[-1]["function"]["arguments"] += piece.arguments
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
            message["content"] = content or None
        if reasoning and self._body.include_reasoning is not False:
            message["reasoning_content"] = reasoning
        return {
            "index": completion.index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._reason(state, completion),
            "stop_reason": completion.stop_reason,
        } | self._extras(output, completion, 0)


def _call_delta(piece: CallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": piece.arguments}
    call: dict[str, Any] = {"index": piece.index, "function": function}
    if piece.name is not None:
        call |= {"id": piece.id, "type": "function", "function": {"name": piece.name} | function}
    return {"tool_calls": [call]}
