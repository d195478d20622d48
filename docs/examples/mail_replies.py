"""Replies to mail in one's own manner, through the gateway and OpenAI's client (pip install openai).

    persona-plug serve my-plug --store sqlite:///users.db --keep-text
    python docs/examples/mail_replies.py ann sent.jsonl          # once: {"input": a mail, "output": ann's reply} a line
    python docs/examples/mail_replies.py ann < mail.txt          # a draft; TAKE=yes adds it to the history

The address is taken from PLUG_URL (default http://127.0.0.1:8000/v1), the key from PLUG_KEY.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from openai import APIError, OpenAI

URL = os.environ.get("PLUG_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=URL, api_key=os.environ.get("PLUG_KEY", "-"))


def learn(user: str, file: Path) -> int:
    """Add past replies to a user's history and return how many were new; other users' records are passed over."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    own = [row for row in rows if row.get("user_id", user) == user]
    events = [{name: row[name] for name in ("input", "output", "timestamp", "id") if name in row} for row in own]
    parts = [events[start : start + 100] for start in range(0, len(events), 100)]
    return sum(tell(user, {"events": part})["added"] for part in parts)


def tell(user: str, body: dict[str, Any]) -> Any:  # noqa: ANN401
    """Add to a user's history what `body` says."""
    return client.post(f"/users/{quote(user, safe='')}/events", body=body, cast_to=object)


def draft(user: str, mail: str) -> tuple[str, str]:
    """Return a reply in the user's manner and the completion's id."""
    model = client.models.list().data[0].id
    asked = [{"role": "user", "content": mail}]
    made = client.chat.completions.create(model=model, messages=asked, user=user, max_tokens=200)  # type: ignore[arg-type]
    return made.choices[0].message.content or "", made.id


def main() -> None:
    """Learn from a file, or draft a reply to the mail on standard input."""
    user, *files = sys.argv[1:]
    if files:
        sys.stdout.write(f"{learn(user, Path(files[0]))} new replies\n")
        return
    text, completion = draft(user, sys.stdin.read())
    sys.stdout.write(text + "\n")
    if os.environ.get("TAKE") == "yes":  # an accepted draft becomes a part of the history
        tell(user, {"accept": completion})


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, APIError) as exc:
        sys.exit(f"error: {exc}")
