"""What the gateway takes and gives: OpenAI's shapes, with limits, and nothing ignored that changes an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_ID = 256  # bytes of a user's or event's id
MAX_MESSAGES = 256
MAX_EVENTS = 100  # in one request

Text = Annotated[str, StringConstraints(max_length=200_000)]


def check_id(text: str) -> str:
    """Return an id of a user or an event.

    Raises:
        ValueError: It is empty, too long, or holds what databases cannot.
    """
    if not 1 <= len(text.encode()) <= MAX_ID or "\0" in text:
        raise ValueError(f"must be 1 to {MAX_ID} bytes of UTF-8 without NUL")
    return text


Identifier = Annotated[str, AfterValidator(check_id)]

# Fields of OpenAI's API that change no answer here: they are for its own billing, caching, routing and dashboards.
HARMLESS = frozenset(
    {
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "prediction",
    }
)
# Fields that are not implemented, with the values at which they ask for nothing; null asks for nothing anywhere.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "moderation": (),
}
# What an answer of ours carries when a client sends it back.
ANSWER_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "name": (),
}


def without_neutral(data: Any, known: Mapping[str, tuple[Any, ...]], harmless: frozenset[str]) -> Any:  # noqa: ANN401
    """Drop fields that ask for nothing; what is left of them is refused by name, as an extra field."""
    if not isinstance(data, dict):
        return data

    def asks(name: str, value: Any) -> bool:  # noqa: ANN401
        # Compared as JSON: in Python 1 == True.
        shown = json.dumps(value, sort_keys=True, default=str)
        neutral = {json.dumps(v, sort_keys=True) for v in (*known.get(name, ()), *map(_as_float, known.get(name, ())))}
        return name not in harmless and not (name in known and (value is None or shown in neutral))

    return {name: value for name, value in data.items() if asks(name, value)}


def _as_float(value: Any) -> Any:  # noqa: ANN401
    return float(value) if type(value) is int else value


class Strict(BaseModel):
    """Refuses what it does not know, and coerces nothing: "8" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(Strict):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, data: Any) -> Any:  # noqa: ANN401
        return without_neutral(data, ANSWER_FIELDS, frozenset())

    def pair(self) -> tuple[str, str]:
        """Return (role, text) as the LLM's chat template knows them."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return "system" if self.role == "developer" else self.role, text


class StreamOptions(Strict):
    """What a stream carries beside text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(Strict):
    """What chat and text completions have in common.

    Attributes:
        model: Name of the plug, as /v1/models lists it.
        user: Whose history is used; without it the request is answered as for somebody new.
        personal: False for the plain LLM without soft tokens.
        temperature: 0, the default here, takes the most probable token.
    """

    model: str
    user: Identifier | None = None
    personal: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=4)]
        | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, data: Any) -> Any:  # noqa: ANN401
        return without_neutral(data, NEUTRAL, HARMLESS)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Request):
    """/v1/chat/completions; the last message of the user is the request that steers the plug."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def characters(self) -> int:
        """Length of all messages."""
        return sum(len(message.pair()[1]) for message in self.messages)

    @property
    def limit(self) -> int | None:
        """New tokens at most, under either of OpenAI's two names."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """/v1/completions; the prompt is the request, and the plug's template is put around it."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]

    @property
    def limit(self) -> int | None:
        """New tokens at most."""
        return self.max_tokens

    @property
    def characters(self) -> int:
        """Length of the prompt."""
        return len(self.text)

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class EventIn(Strict):
    """Something the user reacted to and what they wrote; `id` makes adding it twice harmless."""

    input: Text = ""
    output: Text
    timestamp: float | str | None = None
    id: Identifier | None = None


class EventsRequest(Strict):
    """POST /v1/users/{user}/events: one event, several, or an answer of ours that the user accepted.

    Attributes:
        accept: Id of a completion for this user that is still remembered; it becomes an event of that id.
        events: Several events at once.
    """

    input: Text | None = None
    output: Text | None = None
    timestamp: float | str | None = None
    id: Identifier | None = None
    accept: Identifier | None = None
    events: Annotated[list[EventIn], Field(min_length=1, max_length=MAX_EVENTS)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        single = any(v is not None for v in (self.input, self.output, self.timestamp, self.id))
        if [single, self.accept is not None, self.events is not None].count(True) != 1:
            raise ValueError("give one event (input, output), or `events`, or `accept`")
        if single and self.output is None:
            raise ValueError("an event needs `output`")
        return self

    def items(self) -> list[dict[str, Any]]:
        """Return the events as the store takes them."""
        if self.events is not None:
            return [event.model_dump(exclude_none=True) for event in self.events]
        one = {"input": self.input or "", "output": self.output, "timestamp": self.timestamp, "id": self.id}
        return [{k: v for k, v in one.items() if v is not None}]
