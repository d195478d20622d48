"""Generated support and mail replies: users with manners of their own, requests with facts of their own.

A user greets, closes, signs, writes emoji and letter case in one manner, and has wordings of their own for each matter.
A request names a customer, a product and a number; a right reply names no other. `check` says which habits a reply
keeps and whether its facts are the request's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np

from persona_plug.data import _reply_words as words
from persona_plug.data.records import RecordSet, count_items, refuse_other
from persona_plug.data.rows import local_path
from persona_plug.errors import ConfigError, DataError

TEMPLATE = "Write the reply that this person would send to this message:\n{input}"
SPLITS = ("train", "held_out")
LENGTHS = {"short": (10, 30), "medium": (24, 48), "long": (40, 80)}
"""Length class -> the fewest and the most words of a reply. The classes overlap."""
HABITS = ("greeting", "sign_off", "name", "emoji", "case", "length")
CHECKS = (*HABITS, "product", "no_foreign_number", "no_foreign_product", "no_foreign_name")
"""Keys of `check`, in its order."""
START = datetime(2024, 1, 8, 8, tzinfo=UTC)
_EMOJI = re.compile("[\u2728\U0001f300-\U0001faff]")


@dataclass(frozen=True, slots=True)
class Habits:
    """The manner of one user.

    Attributes:
        greeting: First words with their mark; "{customer}" stands for the customer's name.
        sign_off: Last words with their mark.
        name: The user's own name, behind the sign-off.
        emoji: The one emoji of every reply, or an empty text.
        case: "lower", or "usual".
        length: A class of `LENGTHS`.
        tone: A key of the tones, whose lines the user writes.
        desk: A number behind the name, or None.
        breaks: Whether greeting, text and sign-off stand on lines of their own.
        emoji_last: Whether the emoji stands at the very end, not behind the text.
        leads: Whether a line of the tone comes before the answer.
        lines: Places of the tone's lines, in the user's order.
        wordings: Matter -> place of the user's own wording.
    """

    greeting: str
    sign_off: str
    name: str
    emoji: str
    case: str
    length: str
    tone: str
    desk: int | None
    breaks: bool
    emoji_last: bool
    leads: bool
    lines: tuple[int, ...]
    wordings: Mapping[str, int]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """Return the habits that the JSON of facts holds of a user."""
        return cls(**{**facts, "lines": tuple(facts["lines"])})


@dataclass(frozen=True, slots=True)
class Request:
    """What a request asks, and its facts."""

    text: str
    matter: str
    customer: str
    product: str
    number: str


@dataclass(frozen=True)
class ReplySet(RecordSet):
    """Generated replies, with what is known of them.

    Attributes:
        habits: User -> manner.
        facts: Id of a record -> its request's facts, whose manner the reply has, and the habit that it departure from.
    """

    habits: dict[str, Habits] = field(repr=False)
    facts: dict[str, dict[str, Any]] = field(repr=False)

    def write_facts(self, path: str | os.PathLike[str], overwrite: bool = True) -> Path:
        """Write habits and facts as one JSON: `{"held_out", "users", "records"}`.

        Raises:
            DataError: The file cannot be written or replaced.
        """
        users = {user: asdict(habits) for user, habits in self.habits.items()}
        content = {"held_out": self.meta["held_out"], "users": users, "records": self.facts}
        file, body = local_path(path), (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
        if not overwrite:
            refuse_other(file, body)
        try:
            file.write_bytes(body)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; choose another file") from error
        return file


def build(
    users: int = 60,
    items_per_user: int = 15,
    seed: int = 0,
    *,
    held_out: float = 0.2,
    personal: bool = True,
    slip: float = 0.1,
) -> ReplySet:
    """Generate users and their replies.

    The same arguments give the same records. Held-out users have greetings, sign-offs, emoji and names that no other
    user has; `meta["held_out"]` names them.

    Args:
        users: Number of users, at least 2.
        items_per_user: Replies of each user.
        seed: Chooses everything that is drawn, 0 to 2**32 - 1.
        held_out: Share of users with forms of their own, 0 to below 1.
        personal: False gives each reply the manner of a user drawn at random: a control in which nothing is personal.
        slip: Share of replies that depart from one habit, 0 to 1.

    Raises:
        ConfigError: An argument is out of range; the message names it.
    """
    for name, value, low, high in (
        ("users", users, 2, 10_000),
        ("items_per_user", items_per_user, 1, 10_000),
        ("seed", seed, 0, 2**32 - 1),
        ("slip", slip, 0, 1),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}={value} is out of range; use {low} to {high}")
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out={held_out} is out of range; use a share of users from 0 to below 1")
    counts = {"held_out": round(held_out * users)}
    counts["train"] = users - counts["held_out"]
    habits = {f"{prefix}-{n:04d}": _draw_habits(split, n, seed)
              for split, prefix in (("train", "agent"), ("held_out", "new-agent"))
              for n in range(counts[split])}  # fmt: skip
    names = list(habits)
    records, facts = [], {}
    for user in names:
        for item in range(items_per_user):
            request = _draw_request(_chance(seed, 1, user, item))
            chance = _chance(seed, 2, user, item)
            author = user if personal else names[int(chance.integers(len(names)))]
            other = habits[names[int(chance.integers(len(names)))]]
            output, departure = _reply(habits[author], other, request, slip, chance)
            at = START + timedelta(hours=19 * item, minutes=int(chance.integers(600)))
            key = f"{user}-{item:04d}"
            records.append({"user_id": user, "input": request.text, "output": output,
                            "timestamp": at.isoformat(), "id": key})  # fmt: skip
            request_facts = {k: v for k, v in asdict(request).items() if k != "text"}
            facts[key] = {**request_facts, "author": author, "departure": departure}
    meta = {"data": "replies", "counts": count_items(records), "held_out": names[counts["train"] :]}
    meta["parameters"] = {"users": users, "items_per_user": items_per_user, "seed": seed, "held_out": held_out,
                          "personal": personal, "slip": slip}  # fmt: skip
    return ReplySet(records, TEMPLATE, meta, habits, facts)


def _chance(seed: int, purpose: int, user: str, item: int = 0) -> np.random.Generator:
    """Return the random numbers of one purpose (0 habits, 1 requests, 2 replies), user and item."""
    return np.random.default_rng([seed, purpose, len(user), int(user[-4:]), item])


def _pick(choices: Collection[str], chance: np.random.Generator) -> str:
    return list(choices)[int(chance.integers(len(choices)))]


def _draw_habits(split: str, number: int, seed: int) -> Habits:
    chance = np.random.default_rng([seed, 0, SPLITS.index(split), number])

    def own(forms: tuple[str, ...], purpose: int) -> str:
        """Return a form that users share only when there are more users than forms."""
        order = np.random.default_rng([seed, 3, purpose]).permutation(len(forms))
        return forms[order[number % len(forms)]]

    customer = " {customer}" if chance.random() < 0.6 else ""
    initial = chr(ord("A") + number // len(words.AGENTS[split]) - 1) if number >= len(words.AGENTS[split]) else ""
    tone = _pick(words.TONES, chance)
    return Habits(
        greeting=own(words.GREETINGS[split], 0) + customer + _pick(words.GREETING_MARKS, chance),
        sign_off=own(words.SIGN_OFFS[split], 1) + _pick(words.SIGN_OFF_MARKS, chance),
        name=f"{own(words.AGENTS[split], 2)} {initial}".strip(),
        emoji=_pick(words.EMOJI[split], chance) if chance.random() < 0.5 else "",
        case="lower" if chance.random() < 0.3 else "usual",
        length=_pick(LENGTHS, chance),
        tone=tone,
        desk=int(chance.integers(10, 100)) if chance.random() < 0.25 else None,
        breaks=bool(chance.random() < 0.5),
        emoji_last=bool(chance.random() < 0.5),
        leads=bool(chance.random() < 0.5),
        lines=tuple(int(i) for i in chance.permutation(len(words.TONES[tone]))),
        wordings={matter: int(chance.integers(len(answers))) for matter, (_, answers) in words.MATTERS.items()},
    )


def _draw_request(chance: np.random.Generator) -> Request:
    matter, customer, product = (_pick(c, chance) for c in (words.MATTERS, words.CUSTOMERS, words.PRODUCTS))
    number = str(int(chance.integers(1_000, 100_000)))
    question = _pick(words.MATTERS[matter][0], chance).format(product=product, number=number)
    text = _pick(words.FRAMES, chance).format(question=question, customer=customer)
    return Request(text, matter, customer, product, number)


def _reply(
    habits: Habits, other: Habits, request: Request, slip: float, chance: np.random.Generator
) -> tuple[str, str | None]:
    """Return a reply and the habit that it departure from; what replaces that habit may come from another user."""
    bounds = LENGTHS[habits.length]
    departure = _pick(HABITS, chance) if chance.random() < slip else None
    if departure == "length":
        bounds = LENGTHS["short"] if habits.length == "long" else (LENGTHS[habits.length][1] + 1, LENGTHS["long"][1])
    elif departure == "case":
        habits = dataclasses.replace(habits, case="usual" if habits.case == "lower" else "lower")
    elif departure == "name":
        habits = dataclasses.replace(habits, name="", desk=None)
    elif departure == "emoji":
        emoji = _pick([e for e in words.EMOJI["train"] if e != habits.emoji], chance)
        habits = dataclasses.replace(habits, emoji="" if habits.emoji else emoji)
    elif departure is not None:
        form = getattr(other, departure)
        if form.casefold() == getattr(habits, departure).casefold():
            departure = None
        else:
            habits = dataclasses.replace(habits, **{departure: form})
    return _render(habits, request, bounds, chance), departure


def _render(habits: Habits, request: Request, bounds: tuple[int, int], chance: np.random.Generator) -> str:
    """Return a reply in one manner, as many lines long as the bounds on its words ask for."""
    core = words.MATTERS[request.matter][1][habits.wordings[request.matter]]
    core = core.format(product=request.product, number=request.number)
    greeting = habits.greeting.format(customer=request.customer)
    name = habits.name + (f", desk {habits.desk}" if habits.desk is not None else "")
    tone, least, most = words.TONES[habits.tone], *bounds
    goal = least + int(chance.integers((most - least) // 2 + 1))
    total = len(" ".join((greeting, core, habits.sign_off, name, habits.emoji)).split())
    places: list[int] = []
    for place in chance.permutation(len(tone)):
        size = len(tone[place].split())
        if total < goal and total + size <= most:
            places.append(int(place))
            total += size
    body = [tone[place] for place in habits.lines if place in places]
    body.insert(min(int(habits.leads), len(body)), core)
    if not habits.emoji_last:
        body.append(habits.emoji)
    parts = [greeting, " ".join(body).strip(), habits.sign_off, name]
    if habits.emoji_last:
        parts[-1] += f" {habits.emoji}"
    text = ("\n" if habits.breaks else " ").join(part.strip() for part in parts if part.strip())
    return text.lower() if habits.case == "lower" else text


def check(reply: str, request: str, habits: Habits) -> dict[str, bool]:
    """Say which habits a reply keeps, and whether its facts are right.

    White space and letter case count for "case" alone. A sign-off may be followed by at most four words. A number or a
    name is foreign where it stands neither in the request nor among what the user always writes.

    Args:
        reply: Any text.
        request: A request of this set; its customer and its product are looked up in it.
        habits: The manner that the reply should have.

    Returns:
        `CHECKS` -> whether it is right. True of the last three means that the reply holds nothing foreign.

    Raises:
        DataError: The request names no customer or no product of this set.
    """
    question, text = _plain(request), _plain(_EMOJI.sub(" ", reply))
    customers, products = _names(words.CUSTOMERS, question), _products(question)
    if len(customers) != 1 or len(products) != 1:
        raise DataError(f"request {request!r:.60} names no customer or product of this set; give one of its requests")
    mentions, name = _products(text), _plain(habits.name)
    greeting = _plain(habits.greeting.format(customer=next(iter(customers))))
    closing = rf"(?:^|[.!?,:] ){re.escape(_plain(habits.sign_off))}(?: \S+){{0,4}}$"
    least, most = LENGTHS[habits.length]
    people = {*words.CUSTOMERS, *words.AGENTS["train"], *words.AGENTS["held_out"]}
    desk = set() if habits.desk is None else {str(habits.desk)}
    right = (
        text.startswith(greeting),
        re.search(closing, text) is not None,
        re.search(rf"\b{re.escape(name)}\b", " ".join(text.split()[-5:])) is not None,
        set(_EMOJI.findall(reply)) == set(habits.emoji),
        (reply == reply.lower()) == (habits.case == "lower"),
        least <= len(reply.split()) <= most,
        products <= mentions,
        _numbers(text) <= _numbers(question) | desk,
        mentions <= products,
        _names(people, text) <= customers | _names(people, name),
    )
    return dict(zip(CHECKS, right, strict=True))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _names(names: Collection[str], text: str) -> set[str]:
    """Return which names, of one word each, stand in a plain text; a name may carry its own letter case."""
    return {n.casefold() for n in names} & set(re.findall(r"\w+", text))


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+", text))


def _products(text: str) -> set[str]:
    return {p for p in words.PRODUCTS if re.search(rf"\b{p}\b", text)}
