"""Answers of labelling tasks: their canonical spelling, and whether outputs are labels at all."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from persona_plug.errors import DataError

ALIKE = "in letter case, white space or spelling only"
_NUMBER = re.compile(r"(-?(?:0|[1-9]\d*))(?:[.,](\d{1,2}))?")


def label_of(output: str) -> str:
    """Return a label's canonical spelling: without white space around it, and 5.0 or 5,0 as 5, 4,5 as 4.5.

    Numbers with leading zeros are codes, and those with three digits behind a mark may be thousands: they stay.
    """
    text = output.strip()
    match = _NUMBER.fullmatch(text)
    if match is None or match[2] is None:
        return text
    return match[1] if not match[2].strip("0") else f"{match[1]}.{match[2]}"


def label_counts(outputs: Sequence[str], limit: int = 32) -> Counter[str] | None:
    """Return how often each label occurs if the outputs look like labels (few, short, repeated), else None."""
    counts = Counter(label_of(o) for o in outputs)
    labels = 2 <= len(counts) <= min(limit, len(outputs) // 5) and max(len(c) for c in counts) <= 48
    return counts if labels else None


def levels_of(answers: Sequence[str] | None) -> list[float] | None:
    """Return the answers as numbers where all of them are, so that they have an order and errors a size; else None."""
    try:
        levels = [float(answer) for answer in answers or ()]
    except ValueError:
        return None
    return levels if levels and all(map(math.isfinite, levels)) else None


def detect_answers(outputs: Sequence[str], limit: int = 32) -> tuple[str, ...] | None:
    """Return the sorted answer space if the outputs look like labels, else None.

    Raises:
        DataError: Two labels look alike.
    """
    counts = label_counts(outputs, limit)
    if counts is None:
        return None
    if alike := look_alikes(counts):
        shown = " and ".join(f"{a!r} ({counts[a]})" for a in alike)
        raise DataError(f"labels {shown} differ {ALIKE}; make them one, or name the answers")
    return tuple(sorted(counts))


def look_alikes(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the first labels that `plain` makes one, or none."""
    spellings: dict[str, list[str]] = {}
    for label in sorted(labels):
        spellings.setdefault(plain(label), []).append(label)
    return tuple(next((same for same in spellings.values() if len(same) > 1), ()))


def plain(label: str) -> str:
    """Return what a reader sees of a label: no letter case, single spaces, one encoding; of a number its value."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
    text = " ".join(seen.casefold().split())
    number = levels_of([text])
    return repr(number[0]) if number else text
