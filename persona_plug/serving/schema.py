"""What the gateway takes and gives: OpenAI's shapes, with limits, and nothing ignored that changes an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_ID = 256  # bytes of a user's or event's id
MAX_MESSAGES = 256
MAX_PARTS = 64  # of a message
MAX_EVENTS = 100  # in one request
MAX_CHOICES = 16  # answers to one request, of all its prompts together
MAX_BIASES = 300

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
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
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
        if name in harmless:
            return False
        if name not in known or value is None:
            return name not in known
        if isinstance(value, dict | list) and len(value) > 1:  # no value that asks for nothing is as long
            return True
        # Compared as JSON: in Python 1 == True.
        neutral = {json.dumps(v, sort_keys=True) for v in (*known[name], *map(_as_float, known[name]))}
        return json.dumps(value, sort_keys=True, default=str) not in neutral

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
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)]

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
        personal: False for the plain LLM, without all that the plug adds.
        strength: How much the user's history counts: 1 as trained, less nearer to nobody, 0 as `personal` false.
        n: Answers to each prompt.
        temperature: 0, the default here, takes the most probable token.
        repetition_penalty: Above 1 makes tokens of the answer so far less probable: their logits are divided by it.
        frequency_penalty: Taken from a token's logit for each time it is in the answer so far.
        presence_penalty: Taken from the logit of each token that is in the answer so far.
        logit_bias: Token id -> what is added to its logit; -100 bans it.
        stop_loops: Whether an answer ends that says the same run of 10 tokens or more twice in a row.
    """

    model: str
    user: Identifier | None = None
    stop_loops: bool = True
    personal: bool = True
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.5, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
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

    def sampling(self) -> dict[str, Any]:
        """Return how tokens are chosen, as `engine.Call` names it."""
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        return {
            "temperature": self.temperature or 0.0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed,
            "stop": self.stops,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "logit_bias": tuple(sorted(biases.items())),
            "stop_loops": self.stop_loops,
        }

    @property
    def counts(self) -> bool:
        """Whether the plug takes part at all."""
        return self.personal and self.strength > 0

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Request):
    """/v1/chat/completions; the last message of the user is the request that steers the plug."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> list[str]:
        """The requests: one, the last message of the user."""
        return [""]

    @property
    def characters(self) -> int:
        """Length of all messages."""
        return sum(len(message.pair()[1]) for message in self.messages)

    @property
    def limit(self) -> int | None:
        """New tokens at most, under either of OpenAI's two names."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """/v1/completions; each prompt is a request, and the plug's template is put around it."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]

    @model_validator(mode="after")
    def _few(self) -> Self:
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"n times the prompts may be {MAX_CHOICES} at most")
        return self

    @property
    def limit(self) -> int | None:
        """New tokens at most."""
        return self.max_tokens

    @property
    def characters(self) -> int:
        """Length of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def prompts(self) -> list[str]:
        """The prompts, each a request of its own."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class EventBody(Strict):
    """Something the user reacted to and what they wrote."""

    input: Text = ""
    output: Text
    timestamp: float | str | None = None


class EventIn(EventBody):
    """An event with its `id`; one without gets one from its content, so that sending it again is harmless."""

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
