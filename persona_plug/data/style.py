"""A user's manner as a card that people can read: what the user does, and other users do not."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from persona_plug.data.labels import label_counts, label_of

CLEAR = 1.96  # z above which a habit is the user's own
SHOWN = 5  # habits of a kind
MOSTLY = 0.75  # a longer habit stands for a shorter one in it that has at most so much more of the texts
EDGE_WORDS = 6  # words of an opening or a closing at most
PHRASE_WORDS = range(2, 9)
_SIGN = "[\u2600-\u27bf\u2b00-\u2bff\U0001f300-\U0001faff]"
EMOJI = re.compile(
    f"[\U0001f1e6-\U0001f1ff]{{2}}|{_SIGN}[\ufe0f\U0001f3fb-\U0001f3ff]*(?:\u200d{_SIGN}[\ufe0f\U0001f3fb-\U0001f3ff]*)*"
    "|[:;]-?[)(DP](?!\\w)"
)


@dataclass(frozen=True, slots=True)
class Habit:
    """Something that a user does.

    Attributes:
        text: What.
        share: Share of the user's texts.
        others: Share of the others' texts.
        z: By how many standard errors the user's log-odds are above the others'.
    """

    text: str
    share: float
    others: float
    z: float

    def __str__(self) -> str:
        """Return the habit with its shares."""
        return f"{self.text}  ({self.share:.0%} of texts; others {self.others:.0%})"


@dataclass(frozen=True, slots=True)
class Style:
    """A user's manner, computed from the texts: whoever deletes or corrects a text changes it. Nothing is stored.

    Attributes:
        texts: The user's texts.
        others: Texts of other users that they are compared with.
        words: Words of a text: what one in ten lies below, the median, and what one in ten lies above.
        others_words: The median of the others, None without any.
        case: The letter case that the user writes in most.
        openings: How the user begins, unlike others.
        closings: How the user ends.
        phrases: What the user says between.
        emoji: Emoji and emoticons.
        labels: Of labels in place of texts: which the user gives more often than others. All else is then empty.
    """

    texts: int
    others: int
    words: tuple[int, int, int]
    others_words: int | None
    case: Habit
    openings: list[Habit]
    closings: list[Habit]
    phrases: list[Habit]
    emoji: list[Habit]
    labels: list[Habit]

    def __str__(self) -> str:
        """Return the card as lines of a name and what belongs to it."""
        low, middle, high = self.words
        usual = "" if self.others_words is None else f"; others {self.others_words}"
        lines = [f"{self.texts} texts, compared with {self.others} of other users"]
        lines.append(f"length    {middle} words, mostly {low} to {high}{usual}")
        lines.append(f"case      {self.case}")
        for name in ("openings", "closings", "phrases", "emoji", "labels"):
            habits = getattr(self, name)
            lines += [f"{name if at == 0 else '':<10}{habit}" for at, habit in enumerate(habits)]
        return "\n".join(lines)


def style_of(texts: Sequence[str], others: Sequence[str]) -> Style:
    """Return a user's manner, told apart from others' by log-odds with a Dirichlet prior.

    The method is that of Monroe, Colaresi and Quinn (Fightin' Words, 2008), with texts counted in place of words.

    Args:
        texts: What the user wrote, at least one text.
        others: What other users wrote.
    """
    labels = label_counts([*texts, *others]) is not None
    own = _Habits(texts, others)
    openings = [] if labels else own.of(_openings)
    closings = [] if labels else own.of(_closings)
    edges = [habit.text for habit in (*openings, *closings)]
    lengths, others_lengths = (sorted(len(text.split()) for text in part) for part in (texts, others))
    low, middle, high = (lengths[round(q * (len(lengths) - 1))] for q in (0.1, 0.5, 0.9))
    return Style(
        len(texts),
        len(others),
        (low, middle, high),
        others_lengths[len(others_lengths) // 2] if others_lengths else None,
        max(own.all(lambda text: [_case(text)]), key=lambda habit: (habit.share, habit.text)),
        openings,
        closings,
        [] if labels else own.of(_phrases, edges),
        [] if labels else own.of(lambda text: EMOJI.findall(text)),
        own.of(lambda text: [label_of(text)]) if labels else [],
    )


class _Habits:
    """Counts in how many texts of a user and of others something is found."""

    def __init__(self, texts: Sequence[str], others: Sequence[str]) -> None:
        self.texts, self.others = texts, others

    def of(self, found: Callable[[str], Iterable[str]], known: Sequence[str] = ()) -> list[Habit]:
        """Return the clearest habits that are seen twice, none that overlaps with another or with `known`."""
        least = min(2, len(self.texts)) / len(self.texts)
        clear = [habit for habit in self.all(found) if habit.z > CLEAR and habit.share >= least]
        clear.sort(key=lambda habit: (-habit.z, -len(habit.text), habit.text))
        chosen: list[Habit] = []
        for habit in clear:
            longer = [h for h in clear if f" {habit.text} " in f" {h.text} " and h.share >= MOSTLY * habit.share]
            habit = max(longer, key=lambda h: len(h.text.split()))  # itself is one of these
            if len(chosen) < SHOWN and not any(_overlap(habit.text, s) for s in [*known, *(h.text for h in chosen)]):
                chosen.append(habit)
        return chosen

    def all(self, found: Callable[[str], Iterable[str]]) -> list[Habit]:
        """Return all that is found in the user's texts."""
        own, theirs = (Counter(w for text in part for w in set(found(text))) for part in (self.texts, self.others))
        n, m = len(self.texts), len(self.others)
        habits = []
        for text, count in own.items():
            common = (count + theirs[text]) / (n + m)
            mine, other = _log_odds(count, n, common), _log_odds(theirs[text], m, common)
            z = (mine[0] - other[0]) / math.sqrt(mine[1] + other[1])
            habits.append(Habit(text, count / n, theirs[text] / m if m else 0.0, z))
        return habits


def _log_odds(count: int, total: int, common: float) -> tuple[float, float]:
    """Return log-odds and their variance; shares near 1 are usual here, so that both sides count.

    The prior weighs as much as two texts: one with the common share, and a half each way, without which what others
    never write would have a variance without bound.
    """
    yes, no = count + common + 0.5, total - count + (1 - common) + 0.5
    return math.log(yes / no), 1 / yes + 1 / no


def _openings(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[:k]) for k in range(1, min(EDGE_WORDS, len(words)) + 1)]


def _closings(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[-k:]) for k in range(1, min(EDGE_WORDS, len(words)) + 1)]


def _phrases(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[i : i + k]) for k in PHRASE_WORDS for i in range(len(words) - k + 1)]


def _case(text: str) -> str:
    if text == text.lower() and text != text.upper():
        return "all lower case"
    return "ALL CAPITALS" if text == text.upper() and text != text.lower() else "usual case"


def _overlap(a: str, b: str) -> bool:
    """Return whether one text is a part of the other, or two words in a row stand in both."""
    if f" {a} " in f" {b} " or f" {b} " in f" {a} ":
        return True
    return not set(pairwise(a.split())).isdisjoint(pairwise(b.split()))
