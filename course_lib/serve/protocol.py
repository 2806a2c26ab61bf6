"""What is asked? OpenAI's request bodies -> one plain `Generation`, every field checked.

A field that would change the answer and is not understood here is refused by name; it is never
ignored in silence. Field names and defaults: https://platform.openai.com/docs/api-reference
(chat/create and completions/create).

Left out: tools, images, audio, JSON schemas, logit_bias, penalties, echo, suffix, best_of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from course_lib.conversations import Message
from course_lib.errors import CourseError
from course_lib.faults import is_text
from course_lib.serve.limits import ServeLimits

ROLES = ("system", "user", "assistant")
# Fields that say nothing about the answer, and values that ask for nothing.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NOTHING = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", None),
    "response_format": ({"type": "text"}, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
    "modalities": (["text"], None),
    "parallel_tool_calls": (True, False, None),
}
SHARED = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error | {"code": self.code or None}}


@dataclass(frozen=True)
class Generation:
    """One request as the decoder sees it. Every prompt gets `n` choices."""

    chat: bool
    prompts: list[list[int]]  # token ids
    n: int = 1
    max_tokens: int | None = None  # None: up to the context length
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    stream: bool = False
    include_usage: bool = False

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n


def read_chat(
    body: dict[str, Any], render: Callable[[list[Message]], list[int]], limits: ServeLimits
) -> Generation:
    """A /v1/chat/completions body; `render` is the model's own chat template."""
    _check_names(body, {"messages", "max_completion_tokens", "top_logprobs"})
    messages = _messages(body.get("messages"))
    try:
        prompt = render(messages)
    except CourseError as error:
        raise ApiError(400, f"{error.finding}; {error.remedy}", "messages") from error
    wanted = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    logprobs = _flag(body, "logprobs")
    top = _whole(body, "top_logprobs", 0, 20) or 0
    if top and not logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return _generation(
        body, limits, True, [prompt], _whole(body, wanted, 1, limits.context), logprobs, top
    )


def read_completion(
    body: dict[str, Any], encode: Callable[[str], list[int]], limits: ServeLimits
) -> Generation:
    """A /v1/completions body; a prompt is a text, token ids, or a list of either."""
    _check_names(body, {"prompt"})
    prompts = _prompts(body.get("prompt"), encode, limits)
    max_tokens = _whole(body, "max_tokens", 1, limits.context) or 16
    top = _whole(body, "logprobs", 0, 5)
    return _generation(body, limits, False, prompts, max_tokens, top is not None, top or 0)


def _generation(
    body: dict[str, Any],
    limits: ServeLimits,
    chat: bool,
    prompts: list[list[int]],
    max_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
) -> Generation:
    stream = _flag(body, "stream")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, "stream_options takes include_usage only", "stream_options")
    if stream and top_logprobs:
        message = "alternatives are known at the end only: ask for them without stream"
        raise ApiError(400, message, "top_logprobs" if chat else "logprobs")
    wanted = Generation(
        chat=chat,
        prompts=prompts,
        n=_whole(body, "n", 1, limits.choices) or 1,
        max_tokens=max_tokens,
        temperature=_number(body, "temperature", 0, 2, 1.0),
        top_p=_number(body, "top_p", 0, 1, 1.0),
        seed=_whole(body, "seed", -(2**63), 2**63 - 1),
        stop=_stops(body.get("stop")),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=bool(options.get("include_usage")),
    )
    if wanted.top_p == 0:
        raise ApiError(400, "top_p must be above 0", "top_p")
    if wanted.choices > limits.choices:
        raise ApiError(400, f"{wanted.choices} choices; at most {limits.choices} a request", "n")
    for prompt in prompts:
        length = len(prompt)
        if not length or length + (max_tokens or 1) > limits.context:
            message = (
                f"the prompt has {length} tokens, the answer may have {max_tokens or 1}, "
                f"and the model's context length is {limits.context}"
            )
            where = "messages" if chat else "prompt"
            raise ApiError(400, message, where, "context_length_exceeded" if length else "")
    return wanted


def _check_names(body: dict[str, Any], own: set[str]) -> None:
    for name, value in body.items():
        if name in SHARED | own | HARMLESS:
            continue
        if name not in NOTHING or value not in NOTHING[name]:
            shown = name.encode("utf-8", "replace").decode()  # the answer is UTF-8
            raise ApiError(400, f"{shown} is not supported by this server", shown)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list with at least one message", "messages")
    messages = []
    for index, item in enumerate(value):
        place = f"messages[{index}]"
        if not isinstance(item, dict) or item.get("role") not in ROLES:
            roles = ", ".join(ROLES)
            raise ApiError(400, f"{place}.role must be one of {roles}", f"{place}.role")
        messages.append(Message(item["role"], _content(item.get("content"), place)))
    return messages


def _content(value: Any, place: str) -> str:
    """A text, or a list of text parts."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ApiError(400, f"{place}.content may hold text only", f"{place}.content")
        if not isinstance(part.get("text"), str):
            raise ApiError(400, f"{place}.content must be a text", f"{place}.content")
        _check_text(part["text"], f"{place}.content")
    return "".join(part["text"] for part in parts)


def _check_text(text: str, place: str) -> None:
    if not is_text(text):
        raise ApiError(400, f"{place} holds half a character, a lone surrogate", place)


def _prompts(
    value: Any, encode: Callable[[str], list[int]], limits: ServeLimits
) -> list[list[int]]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ApiError(400, "prompt must be a text, token ids, or a list of either", "prompt")
    if all(type(item) is int for item in value):
        value = [value]
    prompts = []
    for item in value:
        if isinstance(item, str):
            _check_text(item, "prompt")
        ids = encode(item) if isinstance(item, str) else item
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ApiError(400, "prompt must be a text, token ids, or a list of either", "prompt")
        if any(not 0 <= token < limits.vocabulary for token in ids):
            message = f"token ids go from 0 to {limits.vocabulary - 1}"
            raise ApiError(400, message, "prompt")
        prompts.append(ids)
    return prompts


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, "stop must be a text or a list of texts, none of them empty", "stop")
    if len(stops) > 4:
        raise ApiError(400, "stop takes at most 4 texts", "stop")
    return tuple(stops)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", name)
    return bool(value)


def _whole(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise ApiError(400, f"{name} must be a whole number from {low} to {high}", name)
    return value


def _number(body: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low} to {high}", name)
    return float(value)
