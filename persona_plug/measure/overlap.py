"""What two texts share: ROUGE over the words of any script, and chrF over their characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import regex

# Scripts that are written without spaces between words: there each character counts as a word.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_JOINERS = r"\u200c\u200d"  # inside words of Persian and of Indian scripts
_WORD = regex.compile(
    rf"[[{_SPACELESS}]--\p{{M}}]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}]--[{_SPACELESS}]][[\p{{L}}\p{{N}}\p{{M}}{_JOINERS}]--[{_SPACELESS}]]*"
    r"|\p{So}",
    regex.VERSION1,
)


def words(text: str) -> list[str]:
    """Return a text's words in lower case, for ROUGE.

    A word is a run of letters, digits and their combining marks. In scripts without spaces it is one character with its
    marks. A symbol such as an emoji is a word, too. Different encodings of one character are one. Of ASCII text these
    are the words of rouge_score.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text.casefold()))


class _Tokenizer:
    """What rouge_score asks for the words of a text."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Return (N,) F-measures of "rouge-1" and "rouge-L" over `words`, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=_Tokenizer())
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    names = {"rouge-1": "rouge1", "rouge-L": "rougeL"}
    return {name: np.array([row[key].fmeasure for row in scores], dtype=float) for name, key in names.items()}


def chrf(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return (N,) chrF scores by sacreBLEU with its defaults, from 0 to 100."""
    from sacrebleu import CHRF

    metric = CHRF()
    nfc = [[unicodedata.normalize("NFC", text.strip()) for text in texts] for texts in (predictions, references)]
    return np.array([metric.sentence_score(p, [r]).score for p, r in zip(*nfc, strict=True)], dtype=float)


def overlaps(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Return (N,) values of every metric here by its name in `METRICS`."""
    return {**rouge(predictions, references), "chrf": chrf(predictions, references)}
