"""What an answer holds beside its manner: facts of nobody's, the request itself, a length."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import regex

from persona_plug.measure.overlap import words

USUAL = 0.5  # a word that stands in so many of a user's outputs is one that the user always writes
# A number, or a name: a capital letter behind a small one or a comma, so not at the beginning of a sentence.
_FACT = regex.compile(r"[A-Za-z\d]*\d[A-Za-z\d]*|(?<=[\p{Ll}\p{Nd},]\s+)\p{Lu}[\p{L}\p{M}'’-]*\p{L}", regex.VERSION1)
_BREAK = re.compile(r"\n+")


def facts(text: str) -> list[str]:
    """Return the numbers and names of a text, in lower case.

    A name is a word with a capital inside a sentence. Scripts without capitals have numbers alone.
    """
    return [fact.casefold() for line in _BREAK.split(text) for fact in _FACT.findall(line)]


def foreign_facts(text: str, request: str, outputs: Sequence[str]) -> tuple[int, int]:
    """Return how many of a text's facts are foreign, and how many it has.

    Foreign is what stands neither in the request nor in half of what the user wrote.

    Args:
        text: The answer.
        request: What was asked.
        outputs: What this user wrote before.
    """
    counts = Counter(word for output in outputs for word in set(words(output)))
    usual = {word for word, count in counts.items() if count >= USUAL * len(outputs)}
    known = usual | set(words(request))
    stated = facts(text)
    return sum(not set(words(fact)) <= known for fact in stated), len(stated)


def text_values(
    texts: Sequence[str], references: Sequence[str], requests: Sequence[str], outputs: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Return (N,) values of "foreign", "copied" and "length" by their names in `METRICS`.

    Args:
        texts: N answers.
        references: What the users wrote.
        requests: What was asked.
        outputs: What each user wrote before.
    """
    shares, copies, lengths = [], [], []
    for text, reference, request, own in zip(texts, references, requests, outputs, strict=True):
        foreign, stated = foreign_facts(text, request, own)
        shares.append(foreign / max(1, stated))
        copies.append(float(words(text) == words(request)))
        lengths.append(math.log(max(1, len(words(text))) / max(1, len(words(reference)))) ** 2)
    return {"foreign": np.array(shares), "copied": np.array(copies), "length": np.array(lengths)}
