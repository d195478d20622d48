"""Profiles in words: what a frozen LLM writes about a user's history once, and what counting says without any LLM.

The first is the summary of PAG (arXiv 2310.20081), the second a profile for the system prompt in the line of LangPTune
(arXiv 2410.18870) and GenUP (arXiv 2410.20643). `with_profile` puts either in front of a request, with retrieved items
or without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import sqlite3
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from eval.prompts.lamp import count_tokens, first_tokens, render, token_ends
from persona_plug.clock import clock
from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, CorruptFileError
from persona_plug.plug import PersonaPlug
from training.tasks import Task

logger = logging.getLogger(__name__)

# What the LLM is asked for, by what the items hold; it stands behind them.
REQUESTS = {
    "label": "All these answers were given by one person. In at most three short sentences, say which answers this "
    "person prefers and what decides between them.",
    "rating": "All these scores were given by one person. In at most three short sentences, say how strict or generous "
    "this person is, and what earns high and low scores.",
    "text": "All these texts were written by one person. In at most three short sentences, describe this person's "
    "topics, tone, wording and length.",
}
SUMMARY_PROMPT = "{items}.\n\n{input}"
PROFILE_PROMPT = "{profile}\n\n{input}"
MOSTLY, ALSO, AVERAGE = "This person mostly answers {first}", ", also {others}", " The average is {mean:.1f}."
NO_REPEAT = 4  # small LLMs, decoded greedily, fall into loops
NAMED = 5  # answers that a counted profile names


def with_profile(profile: str, text: str) -> str:
    """Put a profile in front of a request; without one the request stays as it is."""
    return PROFILE_PROMPT.format(profile=profile, input=text) if profile.strip() else text


def fitting(profile: str, text: str, tokenizer: Any, max_tokens: int) -> str:  # noqa: ANN401
    """Return as much of a profile's beginning as leaves room for the whole request behind it."""
    ends = token_ends(tokenizer, profile)
    length = len(ends)
    while length and (over := count_tokens(tokenizer, with_profile(profile, text)) - max_tokens) > 0:
        length = max(0, length - over)
        profile = first_tokens(profile, ends, length)
    return profile


def profile_text(items: Sequence[HistoryItem]) -> str:
    """Return what a labelling task's user mostly answers, with counts, and for numbers the average; "" for no items.

    Equally frequent answers are named in alphabetical order, so that the order of the items does not matter.
    """
    counts = Counter(answer for item in items if (answer := item.output.strip()))
    if not counts:
        return ""
    frequent = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:NAMED]
    first, *others = [f'"{answer}" ({count})' for answer, count in frequent]
    total = counts.total()
    text = MOSTLY.format(first=first.removesuffix(")") + f" of {total})")
    if others:
        text += ALSO.format(others=" and ".join([", ".join(others[:-1]), others[-1]] if others[1:] else others))
    text += "."
    try:
        mean = sum(float(answer) * count for answer, count in counts.items()) / total
    except ValueError:
        return text
    return text + AVERAGE.format(mean=mean) if math.isfinite(mean) else text


class Summaries:
    """Profiles that the plain LLM of a plug writes, each once: they are kept in `summaries.sqlite`.

    A summary is known by the LLM's fingerprint and the very tokens of its prompt, and so by the items, the task's
    wording and the chat template. Each batch is stored in one transaction; several processes may share the file. It
    holds text about users: delete it when theirs has to go.

    Attributes:
        count: Summaries that the LLM had to write, so far.
        seconds: Seconds of these.
        price: Seconds that all summaries took that were asked for, whenever they were written.
    """

    def __init__(
        self,
        plug: PersonaPlug,
        cache_dir: str | os.PathLike[str],
        *,
        sample: int = 8,
        max_tokens: int = 768,
        max_new_tokens: int = 96,
    ) -> None:
        """Prepare the LLM and open or create the file.

        Args:
            plug: Gives LLM and tokenizer; its soft tokens and its template are not used.
            cache_dir: Folder of the file.
            sample: Items the LLM is shown, evenly spaced over a longer history, the last one among them.
            max_tokens: Tokens of a prompt; items are cut to fit, as in `render`.
            max_new_tokens: Tokens of a summary.

        Raises:
            ConfigError: `sample` is below 1.
            CorruptFileError: The file is there and is no database of summaries.
        """
        if sample < 1:
            raise ConfigError(f"sample={sample} must be at least 1: the LLM has to see something of the history")
        # The plug's own template would wrap the summary's prompt into its task's instruction.
        config = plug.config.replace(template="{input}", answers=None, max_input_tokens=max_tokens)
        self.plain = plug.twin(config, share_states=False)
        self.sample, self.max_tokens, self.max_new_tokens = sample, max_tokens, max_new_tokens
        self.count, self.seconds, self.price = 0, 0.0, 0.0
        self.path = Path(cache_dir) / "summaries.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = "key BLOB PRIMARY KEY, text TEXT, seconds REAL"
        self._run(f"CREATE TABLE IF NOT EXISTS profiles ({columns}) WITHOUT ROWID", [()])

    def of(self, task: Task, histories: Sequence[Sequence[HistoryItem]], batch_size: int = 8) -> list[str]:
        """Return the summary of each history, on one line; "" where no item has an output, without asking the LLM.

        Args:
            task: Gives the wording of items and what is asked.
            histories: B histories; equal prompts are answered once.
            batch_size: Prompts at a time, and stored at a time.

        Raises:
            ConfigError: Not one item fits into `max_tokens`.
            CorruptFileError: The file is damaged.
        """
        prompts = [self._prompt(task, items) for items in histories]
        keys = {prompt: self._key(prompt) for prompt in dict.fromkeys(prompts) if prompt}
        rows = {p: row[0] for p, key in keys.items() if (row := self._read(key))}
        texts = {prompt: text for prompt, (text, _) in rows.items()}
        self.price += sum(seconds for _, seconds in rows.values())
        missing = [prompt for prompt in keys if prompt not in texts]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            began = clock(self.plain.llm)
            summaries = self._write(batch)
            seconds = clock(self.plain.llm) - began
            fresh = {prompt: " ".join(text.split()) for prompt, text in zip(batch, summaries, strict=True)}
            if empty := sum(not text for text in fresh.values()):
                logger.warning("the LLM wrote nothing for %d of %d summaries", empty, len(fresh))
            self._store({keys[prompt]: (text, seconds / len(fresh)) for prompt, text in fresh.items()})
            self.count, self.seconds, self.price = self.count + len(fresh), self.seconds + seconds, self.price + seconds
            texts |= fresh
        return [texts[prompt] if prompt else "" for prompt in prompts]

    def _write(self, prompts: list[str]) -> list[str]:
        with warnings.catch_warnings():
            # transformers tells that the prompt's own n-grams are free to occur again, which is as it should be.
            warnings.filterwarnings("ignore", message=".*no_repeat_ngram_size")
            options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "no_repeat_ngram_size": NO_REPEAT}
            return self.plain.generate(prompts, personal=False, batch_size=len(prompts), **options)

    def _prompt(self, task: Task, items: Sequence[HistoryItem]) -> str:
        usable = [item for item in items if item.output.strip()]
        if not usable:
            return ""
        count = min(self.sample, len(usable))
        sample = [usable[len(usable) * (i + 1) // count - 1] for i in range(count)]
        wording = dataclasses.replace(task, prompt=SUMMARY_PROMPT, insert_after="")
        # LaMP-1 asks for a label, but its items are titles that the user wrote.
        kind = task.kind if any(item.output.strip() in (task.answers or ()) for item in sample) else "text"
        request = render(wording, REQUESTS[kind], sample, self.plain.tokenizer, self.max_tokens)
        if not request.items_used:
            raise ConfigError(f"max_tokens={self.max_tokens} leaves no room for a history item in a summary; raise it")
        return request.text

    def _key(self, prompt: str) -> bytes:
        parts = self.plain.prompter.parts(prompt)
        fingerprint = self.plain.config.llm_fingerprint
        identity = (fingerprint, parts.left, parts.right, self.max_new_tokens, NO_REPEAT)
        return hashlib.sha256(repr(identity).encode()).digest()

    def _read(self, key: bytes) -> list[tuple[str, float]]:
        return self._run("SELECT text, seconds FROM profiles WHERE key = ?", [(key,)])

    def _store(self, rows: Mapping[bytes, tuple[str, float]]) -> None:
        self._run("INSERT OR REPLACE INTO profiles VALUES (?, ?, ?)", [(key, *row) for key, row in rows.items()])

    def _run(self, statement: str, rows: Sequence[tuple[object, ...]]) -> list[tuple[str, float]]:
        """Run a statement for every row in one transaction, and return what the last one found."""
        results: list[tuple[str, float]] = []
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
                for row in rows:
                    results = db.execute(statement, row).fetchall()
        except sqlite3.OperationalError:
            raise  # locked, or the disk is full: the file is as it should be
        except sqlite3.DatabaseError as exc:
            raise CorruptFileError(f"{self.path} is damaged ({exc}); delete it, to have it written again") from exc
        return results
