"""Generated users with known habits, for whom the best possible score with and without the history is exact.

Kind "label": each user belongs to an unobserved type; each item has a topic that its text shows; the answer
depends on both. Kind "style": each user rewrites a text with habits (opening, case, length, punctuation,
closing). In both a user's items are exchangeable, and the posterior over what is hidden is a finite sum.

`prior` is the best prediction without a history, `bayes` the best with one: in expectation no model does
better. With `personal=False` the outputs do not depend on the user and everything else is equal: a negative
control, in which `bayes` equals `prior` and any personal lift is an artefact.
"""

from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np

from persona_plug.data._oracle import Bounds, LabelSet, Probabilities, Score, StyleSet, SyntheticSet
from persona_plug.data._words import ANSWERS, HABITS, LINKS, SENTENCE_WORDS, TOPICS
from persona_plug.data.records import count_items
from persona_plug.errors import ConfigError

__all__ = ["Bounds", "LabelSet", "Score", "StyleSet", "SyntheticSet", "build"]

LABEL_TEMPLATE = "Which of {answers} would this person choose for this sentence? {{input}}"
STYLE_TEMPLATE = "Rewrite this text the way this person would write it: {input}"


class Options(TypedDict, total=False):
    """The keyword arguments of `build`."""

    personal: bool
    slip: float
    topics: int
    answers: int
    types: int
    brief_words: int


@overload
def build(
    kind: Literal["label"] = ...,
    users: int = ...,
    items_per_user: int = ...,
    seed: int = ...,
    **options: Unpack[Options],
) -> LabelSet: ...
@overload
def build(
    kind: Literal["style"],
    users: int = ...,
    items_per_user: int = ...,
    seed: int = ...,
    **options: Unpack[Options],
) -> StyleSet: ...
@overload
def build(
    kind: Literal["label", "style"],
    users: int = ...,
    items_per_user: int = ...,
    seed: int = ...,
    **options: Unpack[Options],
) -> LabelSet | StyleSet: ...
def build(
    kind: Literal["label", "style"] = "label",
    users: int = 200,
    items_per_user: int = 20,
    seed: int = 0,
    *,
    personal: bool = True,
    slip: float = 0.15,
    topics: int = 4,
    answers: int = 5,
    types: int = 6,
    brief_words: int = 3,
) -> LabelSet | StyleSet:
    """Generate users and their records.

    The same arguments give the same records, and more users or items leave the first ones as they were.

    Args:
        kind: "label" (choose an answer) or "style" (rewrite the text).
        users: Number of users.
        items_per_user: Records of each user; timestamps count up from 0.
        seed: Chooses everything that is drawn, 0 to 2**32 - 1.
        personal: False makes the outputs independent of the user. Inputs, ids, timestamps and the
            distribution of the outputs over the population stay as they are.
        slip: Share of items in which a habit is not kept, above 0 and up to 1. "label": the answer is then
            drawn evenly; "style": the habit's value is then drawn from its prior.
        topics: Number of topics of the sentences, 1 to 6.
        answers: "label" only: number of answers C, 2 to 8.
        types: "label" only: number of user types Z, 2 to 1000; P(type = z) goes as 1 / sqrt(z + 1).
        brief_words: "style" only: words that the brief form keeps, 1 to 6.

    Returns:
        The records with their prompt template and the exact predictors `prior` and `bayes`; `bounds` scores
        them. `build(**meta["parameters"])` makes the set again.

    Raises:
        ConfigError: An argument is unknown or out of range; the message names it.
    """
    for name, value, low, high in (
        ("users", users, 1, 10_000_000),
        ("items_per_user", items_per_user, 1, 10_000_000),
        ("seed", seed, 0, 2**32 - 1),
        ("topics", topics, 1, len(TOPICS)),
        ("answers", answers, 2, len(ANSWERS)),
        ("types", types, 2, 1000),
        ("brief_words", brief_words, 1, SENTENCE_WORDS - 1),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}={value} is out of range; use {low} to {high}")
    if not 0 < slip <= 1:
        raise ConfigError(f"slip={slip} is out of range; use a share above 0 and up to 1")
    parameters: dict[str, Any] = {"kind": kind, "users": users, "items_per_user": items_per_user}
    parameters |= {"seed": seed, "personal": personal, "slip": slip, "topics": topics}
    if kind == "label":
        return _label(parameters, answers, types)
    if kind == "style":
        return _style(parameters, brief_words)
    raise ConfigError(f"unknown kind {kind!r}; use 'label' or 'style', or the command's third kind 'replies'")


def _label(parameters: dict[str, Any], n_answers: int, n_types: int) -> LabelSet:
    """Draw the types' table, then each user's type and answers."""
    answers, topics = ANSWERS[:n_answers], tuple(TOPICS)[: parameters["topics"]]
    weights = 1 / np.sqrt(1 + np.arange(n_types))
    weights /= weights.sum()
    table = np.full((n_types, len(topics), n_answers), parameters["slip"] / n_answers)
    world = _stream(parameters, 0)
    for topic in range(len(topics)):  # in each topic the types' favourites spread over all answers
        order, favourites = np.argsort(world.random(n_types)), np.argsort(world.random(n_answers))
        table[order, topic, favourites[np.arange(n_types) % n_answers]] += 1 - parameters["slip"]
    if not parameters["personal"]:
        table[:] = np.einsum("z,ztc->tc", weights, table)
    shell = LabelSet([], "", {}, answers, topics, weights, table)
    records = []
    for user in range(parameters["users"]):
        rows, chance = _rows(parameters, user, topics), _stream(parameters, 2, user)
        hidden = _draw(weights, chance)
        for row in rows:
            row["output"] = answers[_draw(table[hidden, shell.topic_of(row["input"])], chance)]
        records += rows
    parameters = parameters | {"answers": n_answers, "types": n_types}
    meta = {"data": "synthetic", "parameters": parameters, "counts": count_items(records)}
    meta |= {"answers": list(answers), "topics": list(topics)}
    template = LABEL_TEMPLATE.format(answers=", ".join(answers))
    return LabelSet(records, template, meta, answers, topics, weights, table)


def _style(parameters: dict[str, Any], brief_words: int) -> StyleSet:
    """Draw each user's habits, then what each item shows of them."""
    topics = tuple(TOPICS)[: parameters["topics"]]
    habits = {habit: tuple(shares) for habit, shares in HABITS.items()}
    priors = {habit: np.array(list(shares.values())) for habit, shares in HABITS.items()}
    slip = parameters["slip"] if parameters["personal"] else 1.0
    shell = StyleSet([], "", {}, habits, priors, slip, brief_words)
    shown = {habit: shell.shown(habit) for habit in habits}
    records = []
    for user in range(parameters["users"]):
        rows, chance = _rows(parameters, user, topics), _stream(parameters, 2, user)
        hidden = {habit: _draw(priors[habit], chance) for habit in habits}
        for row in rows:
            values = {habit: habits[habit][_draw(shown[habit][hidden[habit]], chance)] for habit in habits}
            row["output"] = shell.rewrite(row["input"], values)
        records += rows
    parameters = parameters | {"brief_words": brief_words}
    meta = {"data": "synthetic", "parameters": parameters, "counts": count_items(records)}
    meta["habits"] = {habit: dict(shares) for habit, shares in HABITS.items()}
    return StyleSet(records, STYLE_TEMPLATE, meta, habits, priors, slip, brief_words)


def _rows(parameters: dict[str, Any], user: int, topics: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a user's records, inputs drawn and outputs still empty; kind and habits do not change them."""
    chance = _stream(parameters, 1, user)
    rows = []
    for item in range(parameters["items_per_user"]):
        words = TOPICS[_pick(topics, chance)]
        adjective, noun, verb, link, other = (
            _pick(choices, chance) for choices in (words.adjectives, words.nouns, words.verbs, LINKS, words.nouns)
        )
        text = f"the {adjective} {noun} {verb} {link} the {other}"
        name = f"user-{user:04d}"
        key = f"{name}-{item:04d}"
        rows.append({"user_id": name, "input": text, "output": "", "timestamp": item, "id": key})
    return rows


def _stream(parameters: dict[str, Any], *key: int) -> np.random.Generator:
    """Return the random numbers of one purpose (0 world, 1 inputs, 2 outputs) and user."""
    return np.random.default_rng([parameters["seed"], *key])


def _draw(shares: Probabilities, chance: np.random.Generator) -> int:
    """Draw an index with the given probabilities, by one uniform number."""
    return min(int(np.searchsorted(np.cumsum(shares), chance.random(), side="right")), len(shares) - 1)


def _pick(choices: tuple[str, ...], chance: np.random.Generator) -> str:
    """Draw one of `choices` evenly."""
    return choices[int(chance.random() * len(choices))]
