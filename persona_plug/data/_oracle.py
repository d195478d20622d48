"""The best prediction for generated users with and without a history, and the scores that it allows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from persona_plug.data._words import TOPIC_OF
from persona_plug.data.records import RecordSet
from persona_plug.errors import DataError


class Exchange(Protocol):
    """Anything with an input and the output that the user gave to it, such as `history.HistoryItem`."""

    @property
    def input(self) -> str:
        """What the user reacted to."""

    @property
    def output(self) -> str:
        """What the user wrote or chose."""


Item: TypeAlias = Mapping[str, Any] | Exchange
"""A record, or an object with `input` and `output`."""
Example: TypeAlias = tuple[Sequence[Item], Item]
"""What is known of the user, and the item to predict."""
Probabilities: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """How well a predictor does on examples, in nats and as a share.

    Attributes:
        nll: Mean of -log p(output).
        accuracy: Share of examples whose most probable answer is the output.
        expected_nll: Mean of nll over the outputs that the true posterior predictive could have drawn.
        expected_accuracy: The same for the accuracy.
    """

    nll: float
    accuracy: float
    expected_nll: float
    expected_accuracy: float


@dataclass(frozen=True)
class Bounds:
    """Floor (`prior`: no history) and ceiling (`bayes`: the exact posterior) over `n` examples."""

    n: int
    prior: Score
    bayes: Score


@dataclass(frozen=True)
class SyntheticSet(RecordSet):
    """Records of generated users; the subclasses know the exact posterior."""

    def examples(self) -> list[Example]:
        """Return every record as a target with all other records of its user as history (leave one out)."""
        users: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            users.setdefault(record["user_id"], []).append(record)
        return [(rows[:i] + rows[i + 1 :], row) for rows in users.values() for i, row in enumerate(rows)]


@dataclass(frozen=True)
class LabelSet(SyntheticSet):
    """Users who choose among C answers.

    P(answer = c | type z, topic t) = `table[z, t, c]`, P(type = z) = `weights[z]`.

    Attributes:
        answers: The C answers, in the order of every probability vector.
        topics: The T topics' names; `topic_of` recovers an item's topic from its text.
        weights: (Z,), sums to 1.
        table: (Z, T, C), sums to 1 over the answers.
    """

    answers: tuple[str, ...]
    topics: tuple[str, ...]
    weights: Probabilities = field(repr=False, compare=False)
    table: Probabilities = field(repr=False, compare=False)

    def topic_of(self, text: str) -> int:
        """Return the index of the topic whose words stand in `text`; DataError when it is not exactly one."""
        found = {TOPIC_OF[word] for word in text.split() if word in TOPIC_OF}
        if len(found) != 1 or not found.issubset(self.topics):
            raise DataError(f"text {text[:60]!r} shows no single topic of this set; give one of its inputs")
        return self.topics.index(found.pop())

    def prior(self, text: str) -> Probabilities:
        """Return P(answer | topic) without a history, (C,): sum_z weights[z] table[z, t]."""
        return self.weights @ self.table[:, self.topic_of(text)]

    def bayes(self, history: Sequence[Item], text: str) -> Probabilities:
        """Return the exact posterior predictive P(answer | history, topic), (C,).

        w_z = weights[z] prod_i table[z, t_i, c_i] over the history, normalised; then sum_z w_z table[z, t].

        Args:
            history: Other items of the user, with `input` and `output`; their order does not matter.
            text: The request.

        Raises:
            DataError: A text or an answer is not of this set.
        """
        log = np.log(self.weights)
        for item in history:
            source, output = _pair(item)
            log = log + np.log(self.table[:, self.topic_of(source), self._index(output)])
        return _softmax(log) @ self.table[:, self.topic_of(text)]

    def bounds(self, examples: Iterable[Example] | None = None) -> Bounds:
        """Return floor and ceiling over `examples`; None takes `self.examples()`, leave one out."""
        rows = []
        for history, target in self.examples() if examples is None else examples:
            source, output = _pair(target)
            rows.append((self.prior(source), self.bayes(history, source), self._index(output)))
        return _bounds(rows)

    def _index(self, answer: str) -> int:
        """Return an answer's place in `answers`."""
        if answer not in self.answers:
            raise DataError(f"unknown answer {answer[:60]!r}; use one of: {', '.join(self.answers)}")
        return self.answers.index(answer)


@dataclass(frozen=True)
class StyleSet(SyntheticSet):
    """Users who rewrite a text with their own habits.

    For every habit on its own, with values x: a user's habit v is drawn from prior[x]; an item shows x with
    P(x | v) = (1 - slip) [x = v] + slip prior[x], so that an item without a history shows x with prior[x].

    Attributes:
        habits: Values of each habit, in the order of its probability vectors.
        priors: P(value) of each habit, (values,).
        slip: Probability that an item's value is drawn afresh, 0 to 1; 1 means that the user does not matter.
        brief_words: How many words "brief" keeps.
    """

    habits: dict[str, tuple[str, ...]]
    priors: dict[str, Probabilities] = field(repr=False, compare=False)
    slip: float
    brief_words: int

    def shown(self, habit: str) -> Probabilities:
        """Return P(an item shows x | the user's habit is v), (v, x)."""
        prior = self.priors[habit]
        return (1 - self.slip) * np.eye(len(prior)) + self.slip * prior

    def rewrite(self, text: str, values: Mapping[str, str]) -> str:
        """Return `text` rewritten with one value of each habit."""
        words = text.split()
        kept = words[: self.brief_words] if values["length"] == "brief" else words
        body = " ".join(kept) + values["punctuation"]
        output = " ".join(part for part in (values["opening"], body, values["closing"]) if part)
        return output[:1].upper() + output[1:] if values["case"] == "upper" else output

    def read(self, text: str, output: str) -> dict[str, str | None]:
        """Return which value of each habit `output`, any text, shows as a rewrite of `text`.

        Length is None when the body is neither the whole text nor its first words; no other habit ever is.
        """
        found: dict[str, str | None] = {"case": "upper" if output[:1].isupper() else "lower"}
        rest = output[:1].lower() + output[1:]
        found["opening"] = next((v for v in self.habits["opening"] if v and rest.startswith(v + " ")), "")
        rest = rest.removeprefix(found["opening"] or "").strip()
        found["closing"] = next((v for v in self.habits["closing"] if v and rest.endswith(" " + v)), "")
        rest = rest.removesuffix(found["closing"] or "").strip()
        found["punctuation"] = next((v for v in self.habits["punctuation"] if v and rest.endswith(v)), "")
        words, body = text.split(), rest.removesuffix(found["punctuation"] or "").split()
        forms = {"full": words, "brief": words[: self.brief_words]}
        found["length"] = next((value for value, form in forms.items() if form == body), None)
        return {habit: found[habit] for habit in self.habits}

    def prior(self) -> dict[str, Probabilities]:
        """Return each habit's probabilities without a history: its prior."""
        return {habit: prior.copy() for habit, prior in self.priors.items()}

    def bayes(self, history: Sequence[Item]) -> dict[str, Probabilities]:
        """Return each habit's exact posterior predictive; it does not depend on the request's text.

        w_v = prior[v] prod_i P(x_i | v) over the history, normalised; result: sum_v w_v P(. | v).

        Raises:
            DataError: An output of the history is no rewrite of its input.
        """
        seen = [self._values(item) for item in history]
        result = {}
        for habit, prior in self.priors.items():
            shown = self.shown(habit)
            log = np.log(prior)
            for values in seen:
                log = log + np.log(shown[:, values[habit]])
            result[habit] = _softmax(log) @ shown
        return result

    def bounds(self, examples: Iterable[Example] | None = None) -> dict[str, Bounds]:
        """Return floor and ceiling of each habit over `examples`; None takes `self.examples()`."""
        rows: dict[str, list[tuple[Probabilities, Probabilities, int]]] = {habit: [] for habit in self.habits}
        for history, target in self.examples() if examples is None else examples:
            best, values = self.bayes(history), self._values(target)
            for habit in self.habits:
                rows[habit].append((self.priors[habit], best[habit], values[habit]))
        return {habit: _bounds(found) for habit, found in rows.items()}

    def _values(self, item: Item) -> dict[str, int]:
        """Return the index of the value that an item of this set shows of each habit."""
        text, output = _pair(item)
        values = self.read(text, output)
        known = {habit: value for habit, value in values.items() if value is not None}
        if len(known) < len(values) or self.rewrite(text, known) != output:
            raise DataError(f"output {output[:60]!r} is no rewrite of its input; give items of this set")
        return {habit: self.habits[habit].index(value) for habit, value in known.items()}


def _pair(item: Item) -> tuple[str, str]:
    """Return an item's input and output."""
    if isinstance(item, Mapping):
        return item["input"], item["output"]
    return item.input, item.output


def _softmax(log: Probabilities) -> Probabilities:
    """Return exp(log), normalised, without overflow or underflow of the largest."""
    weights = np.exp(log - log.max())
    return weights / weights.sum()


def _bounds(rows: Sequence[tuple[Probabilities, Probabilities, int]]) -> Bounds:
    """Score prior and posterior predictive, given as (prior, bayes, index of the output) of each example."""
    if not rows:
        raise DataError("no examples to score; give at least one")
    scores = []
    for with_history in (False, True):
        figures = []
        for prior, true, y in rows:
            told = true if with_history else prior
            best = int(np.argmax(told))
            figures.append((-np.log(told[y]), best == y, -np.sum(true * np.log(told)), true[best]))
        scores.append(Score(*np.array(figures, dtype=float).mean(axis=0).tolist()))
    return Bounds(len(rows), *scores)
