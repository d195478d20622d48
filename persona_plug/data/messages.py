"""Records of chats: each answer of the assistant becomes a record of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from persona_plug.errors import DataError

LISTS = ("messages", "conversations")
SYSTEM = "messages.system"
"""Field of what a chat's system messages say."""
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}  # fmt: skip


def is_chat(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a chat in place of `input` and `output`."""
    return not {"input", "output"} & record.keys() and any(name in record for name in LISTS)


def split_chat(record: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Yield a record for each answer in a chat, with the chat's other fields.

    The input is what the user asked. Where more was said before, it is the whole talk so far, each message behind its
    role. The text of system messages is the field `SYSTEM`. Ids of several answers are numbered.

    Args:
        record: Holds `messages` (`role`, `content`) or `conversations` (`from`, `value`). A content may be a list of
            parts, all of them texts.
        where: The record's place, for messages.

    Raises:
        DataError: A message has no role or no text, or the assistant says nothing.
    """
    name = next(n for n in LISTS if n in record)
    others = {k: v for k, v in record.items() if k != name}
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    answers: list[dict[str, Any]] = []
    for role, text in _turns(record[name], f"{where}: field {name!r}"):
        if role == "system":
            system.append(text)
        elif role == "assistant":
            answers.append({**others, "input": _request(turns), "output": text})
        if role != "system":
            turns.append((role, text))
    if not answers:
        raise DataError(f"{where}: field {name!r} holds no message of the assistant; each record needs an answer")
    for number, answer in enumerate(answers, 1):
        if system:
            answer[SYSTEM] = "\n".join(system)
        if len(answers) > 1 and record.get("id") is not None:
            answer["id"] = f"{record['id']}#{number}"
        yield answer


def _request(turns: Sequence[tuple[str, str]]) -> str:
    if all(role == "user" for role, _ in turns):
        return "\n".join(text for _, text in turns)
    return "\n".join(f"{role}: {text}" for role, text in turns)


def _turns(messages: object, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise DataError(f"{where} must be a list of messages with role and content")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: message {number} must be an object with role and content")
        role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{where}: message {number} has the role {role!r:.40}; use system, user and assistant")
        yield ROLES[role], _text(content, f"{where}: message {number}")


def _text(content: object, where: str) -> str:
    parts = [content] if isinstance(content, str) else content
    if isinstance(parts, Sequence):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        if texts and all(isinstance(text, str) for text in texts):
            return "\n".join(str(text) for text in texts)
    raise DataError(f"{where}: its content must be text, got {content!r:.60}; leave calls and pictures out")
