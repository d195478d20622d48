"""A frozen LLM with a plug and one user's history, behind prompts and continuations that somebody else made.

A prompt's text is taken as it is; the soft tokens go where the plug was trained to have them. With `suffix` placement
that is behind the prompt (before the assistant's header, where a chat template made one), with `prefix` in front of it
(behind the beginning-of-text token or the user's header). Only soft tokens act: an answer head belongs to the plug's
own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteriaList

from persona_plug.data.history import Example, HistoryItem, by_user, read_events
from persona_plug.errors import DataError
from persona_plug.plug import PersonaPlug
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.rows import RowSplicer
from persona_plug.splice.seq2seq import Seq2SeqSplicer
from persona_plug.splice.soft import Soft

LOOKBACK = 16  # tokens beyond a stop text's own letters that are decoded to find it


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt: its text (what the plug sees of it) and the ids that the LLM gets."""

    text: str
    ids: tuple[int, ...]


class UserPlug:
    """The plug with its LLM, for one user.

    Attributes:
        plug: The loaded plug.
        seq2seq: Whether the LLM is an encoder-decoder.
        soft_tokens: Positions that the soft tokens take; 0 if detached.
    """

    def __init__(self, plug: PersonaPlug, history: Sequence[HistoryItem] = (), detached: bool = False) -> None:
        """Take a plug over: its cached states are forgotten.

        Args:
            plug: The plug.
            history: The user's items.
            detached: Whether to leave the soft tokens out.
        """
        self.plug, self.history, self.detached = plug, tuple(history), detached
        # Prompts of a task differ: nothing is kept, and no head is shared.
        plug.splicer.keep_nothing()
        plug.splicer.begin_with(())
        self.seq2seq = bool(plug.llm.config.is_encoder_decoder)
        self.soft_tokens = 0 if detached else len(plug.soft_prompt("", self.history))

    def batches(
        self, rows: Sequence[Row], size: int, quiet: bool, what: str
    ) -> Iterator[tuple[list[Row], list[PromptParts], Soft]]:
        """Yield rows, their prompts, and their soft tokens (B, S, H), with a progress bar.

        Args:
            rows: The prompts.
            size: Rows at a time.
            quiet: Whether to show no bar even on a terminal.
            what: What the bar counts.
        """
        places = [self.place(row) for row in rows]
        examples = [Example("-", request, "", self.history) for _, request in places]
        table = None if self.detached or not rows else self.plug.table(examples)
        for start in tqdm(range(0, len(rows), size), desc=f"persona_plug: {what}", disable=quiet or None):
            part = slice(start, start + size)
            with torch.no_grad():
                output = self.plug.embed(table.batch(examples[part]) if table else None, len(rows[part]))
            yield list(rows[part]), [parts for parts, _ in places[part]], output.soft

    def place(self, row: Row) -> tuple[PromptParts, str]:
        """Return a prompt's ids on either side of the soft tokens, and the request that steers the plug.

        Where a chat template made the prompt, its headers are recognised and the request is what stands between.
        """
        ids, prompter = row.ids, self.plug.prompter
        if self.detached:  # one pass over everything, as without this library; an encoder's input is its left part
            return (PromptParts(ids, ()) if self.seq2seq else PromptParts((), ids)), ""
        suffix = self.plug.config.placement == "suffix"
        if self.seq2seq:
            return (PromptParts(ids, ()) if suffix else PromptParts((), ids)), row.text
        tokenizer, before = self.plug.tokenizer, tuple(prompter.before)
        tail = self._header(ids) if getattr(tokenizer, "chat_template", None) else 0
        has_header = len(before) > 0 and ids[: len(before)] == before
        if not has_header:  # no header, or one of another kind; a begin token stays in front all the same
            before = ids[:1] if ids[:1] == (tokenizer.bos_token_id,) else ()
        request = row.text
        if tail and has_header:
            request = tokenizer.decode(ids[len(before) : -tail], skip_special_tokens=True)
        at = len(ids) - tail if suffix else len(before)
        return PromptParts(ids[:at], ids[at:]), request

    def _header(self, ids: tuple[int, ...]) -> int:
        """Return how many ids at the end are the assistant's header.

        Its last line break may be missing: the harness counts white space in front of a continuation as a part of it.
        """
        after = tuple(self.plug.prompter.after)
        while after:
            if ids[-len(after) :] == after:
                return len(after)
            if self.plug.tokenizer.decode(after[-1:]).strip():
                break
            after = after[:-1]
        return 0

    def score(
        self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree]
    ) -> tuple[list[list[float]], list[list[bool]]]:
        """Return each row's log-likelihoods, and whether each continuation is what greedy decoding gives.

        Args:
            parts: B prompts.
            soft: (B, S, H) soft tokens.
            trees: Each row's continuations, see `open_tree`.
        """
        if isinstance(self.plug.splicer, RowSplicer) and (len(parts) > 1 or len(trees[0].paths) > 1):
            return self._score_alone(parts, soft, trees)
        logits: list[Tensor] = []

        def keep(module: Any, arguments: Any, output: Any) -> None:  # noqa: ANN401
            logits[:] = [output.logits]  # the last call is the one over the answers

        # The splicer gives sums of log-likelihoods; which token would have won stands in the logits behind them.
        handle = self.plug.llm.register_forward_hook(keep)
        try:
            with torch.no_grad():
                scores, _ = self.plug.splicer.in_one_pass(parts, soft, trees)
        finally:
            handle.remove()
        winners = logits[0].argmax(-1).tolist()
        greedy, at = [], 0
        nodes = max(len(tree.tokens) for tree in trees)
        for b, tree in enumerate(trees):
            row = []
            for path in tree.paths:
                if isinstance(self.plug.splicer, Seq2SeqSplicer):  # a decoder row for each path, behind its start
                    begin = len(self.plug.splicer.start) - 1
                    row.append(all(winners[at][begin + i] == token for i, (_, token) in enumerate(path)))
                elif isinstance(self.plug.splicer, RowSplicer):  # the one path's tokens stand at the end
                    row.append([token for _, token in path] == winners[0][-len(path) :])
                else:  # the last 1 + nodes columns: the prompt's end (node -1), then the nodes
                    row.append(all(winners[b][node - nodes] == token for node, token in path))
                at += 1
            greedy.append(row)
        return scores.float().tolist(), greedy

    def _score_alone(
        self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree]
    ) -> tuple[list[list[float]], list[list[bool]]]:
        """Score one continuation after the other, where each is a row of its own anyway."""
        scores, greedy = [], []
        for part, row, tree in zip(parts, soft, trees, strict=True):
            alone = [open_tree([tuple(token for _, token in path)]) for path in tree.paths]
            pairs = [self.score([part], row[None], [path]) for path in alone]
            scores.append([score[0][0] for score, _ in pairs])
            greedy.append([best[0][0] for _, best in pairs])
        return scores, greedy

    def write(
        self, parts: Sequence[PromptParts], soft: Soft, stops: list[str], new: int, options: dict[str, Any]
    ) -> list[str]:
        """Return the texts that the LLM writes behind B prompts, up to the first of `stops`.

        Args:
            parts: B prompts.
            soft: (B, S, H) soft tokens.
            stops: Texts that end an answer and do not belong to it.
            new: New tokens at most.
            options: What else the LLM's `generate` takes.
        """
        tokenizer = self.plug.tokenizer
        pad = tokenizer.pad_token_id
        texts = [""] * len(parts)
        for rows in self.plug.splicer.together(parts, soft):
            with torch.no_grad():
                out = self.plug.llm.generate(
                    **self.plug.splicer.generation_inputs([parts[i] for i in rows], [soft[i] for i in rows]),
                    pad_token_id=self.plug.prompter.eos if pad is None else pad,
                    max_new_tokens=new,
                    stopping_criteria=StoppingCriteriaList([_stop_at(tokenizer, stops)] if stops else []),
                    **options,
                )
            for i, text in zip(rows, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                texts[i] = text
        ends = [[at for stop in stops if (at := text.find(stop)) >= 0] for text in texts]
        return [text[: min(end)] if end else text for text, end in zip(texts, ends, strict=True)]


def open_tree(continuations: Sequence[tuple[int, ...]]) -> AnswerTree:
    """Return continuations as a tree without end tokens: what is scored are beginnings of texts, not whole answers.

    Args:
        continuations: Ids, one token each at least.
    """
    index: dict[tuple[int, ...], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    for ids in continuations:
        for end in range(1, len(ids)):  # what a continuation's last token leads to is not asked
            if ids[:end] not in index:
                index[ids[:end]] = len(tokens)
                tokens.append(ids[end - 1])
                parents.append(index.get(ids[: end - 1], -1))
    paths = tuple(tuple((index.get(ids[:i], -1), token) for i, token in enumerate(ids)) for ids in continuations)
    return AnswerTree(tuple(tokens), tuple(parents), paths)


def read_history(path: Path, user: str | None = None) -> tuple[HistoryItem, ...]:
    """Return one user's items.

    Args:
        path: JSONL or Parquet; records may leave `user_id` out where the file is one user's.
        user: Whose items, where the file holds several users.

    Raises:
        DataError: The file cannot be used, or it is not clear whose items are meant.
    """
    users = by_user(read_events(path, owner=None if user else "-").events)
    if user is None and len(users) > 1:
        raise DataError(f"{path}: holds {len(users)} users; choose one with user=ID")
    if user is not None and str(user) not in users:
        raise DataError(f"{path}: holds no user {str(user)!r}")
    return tuple(users[str(user)] if user is not None else next(iter(users.values())))


def _stop_at(tokenizer: Any, stops: list[str]) -> Callable[..., Any]:  # noqa: ANN401
    """Return a stopping criterion, (B, L) ids -> (B,) bool: whether a row's newest text holds a stop text."""
    back = max(len(s.encode()) for s in stops) + LOOKBACK  # a token is a byte at least

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ANN401
        ends = tokenizer.batch_decode(ids[:, -back:], skip_special_tokens=False)
        return torch.tensor([any(s in end for s in stops) for end in ends], device=ids.device)

    return stop
