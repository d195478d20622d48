"""Samples as prompts, answer trees and batches: what training and measuring stand on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from persona_plug.config import PARTS
from persona_plug.data.history import Example
from persona_plug.embedder.batch import HistoryBatch
from persona_plug.errors import DataError
from persona_plug.heads.answers import AnswersHead, combine
from persona_plug.model import PlugModel
from persona_plug.splice.prompts import AnswerTree, PromptParts


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples, ready for `PlugModel.forward` and the loss.

    Attributes:
        history: The requests' vectors and histories.
        parts: B prompts.
        trees: B trees of candidate answers.
        gold: (B,) int64, the number of each gold answer.
        lengths: (B,) int64, the tokens of each gold answer, its end token included.
        folds: (B,) int64, in training: which answers head has not seen the row's user; None for the head itself.
    """

    history: HistoryBatch
    parts: list[PromptParts]
    trees: list[AnswerTree]
    gold: Tensor
    lengths: Tensor
    folds: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            history=self.history.to(device),
            gold=self.gold.to(device),
            lengths=self.lengths.to(device),
            folds=None if self.folds is None else self.folds.to(device),
        )

    def loss(
        self,
        output: tuple[Tensor, Tensor, Tensor | None],
        head: AnswersHead | None,
        token_weight: float,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a plug's output (see `PlugModel.forward`); for free text the token loss alone.

        Args:
            output: Log-likelihoods (B, C) of the answers, (B,) of the gold's end token, and what the head adds (B, C)
                or None.
            head: The plug's answers head, if it has one.
            token_weight: Weight of the token loss beside that over the answers' scores.
            tokens: Answer tokens that the token loss is divided by; default those of the batch.
        """
        loglik, end, bias = output
        batch = self.to(loglik.device)
        gold_loglik = loglik.gather(1, batch.gold.unsqueeze(1)).squeeze(1)
        # Every answer token counts the same, as in the LLM's own next-token loss.
        token: Tensor = -(gold_loglik + end).sum() / (batch.lengths.sum() if tokens is None else tokens)
        if loglik.shape[1] == 1:
            return token
        scores = combine(head, loglik, bias)
        loss = torch.nn.functional.cross_entropy(scores, batch.gold)
        return loss + token_weight * token if token_weight else loss


class PlugDataset(Dataset[int]):
    """Samples as prompts, answer trees and row numbers of encoded histories."""

    def __init__(self, plug: PlugModel, examples: Sequence[Example]) -> None:
        """Tokenise prompts and answers, and encode all texts (from the vector cache where known).

        Args:
            plug: Whose prompter, answers and encoder are used.
            examples: The samples, at least one.

        Raises:
            DataError: There are no samples, or a prompt with its answer is longer than the LLM's positions.
        """
        if not examples:
            raise DataError("there are no samples to train on")
        self.examples = list(examples)
        self.table = plug.table(examples)
        self.folds: Tensor | None = None  # (N,) see `Batch.folds`
        prompter, answers = plug.prompter, plug.config.answers
        self.parts = plug.prompts(self.examples)
        self.cut = sum(p.cut > 0 for p in self.parts)
        if answers:
            ids = prompter.candidates(answers)
            trees = [AnswerTree.build(ids, prompter.eos, gold=i) for i in range(len(answers))]
            self.gold = [answers.index(e.output.strip()) for e in self.examples]
            self.trees = [trees[g] for g in self.gold]
        else:
            self.gold = [0] * len(self.examples)
            self.trees = [AnswerTree.build([prompter.answer(e.output)], prompter.eos, gold=0) for e in self.examples]
        prompter.check_trees(self.parts, plug.config.soft_tokens, self.trees)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        """Return the index itself; `collate` makes the batch."""
        return index

    def collate(self, indices: Sequence[int]) -> Batch:
        """Return samples as a batch on the CPU."""
        trees = [self.trees[i] for i in indices]
        gold = [self.gold[i] for i in indices]
        lengths = [len(t.paths[g]) + (t.gold_end is not None) for t, g in zip(trees, gold, strict=True)]
        return Batch(
            self.table.batch([self.examples[i] for i in indices]),
            [self.parts[i] for i in indices],
            trees,
            torch.tensor(gold),
            torch.tensor(lengths),
            None if self.folds is None else self.folds[list(indices)],
        )


@torch.no_grad()
def score_outputs(
    plug: PlugModel,
    examples: Sequence[Example],
    personal: bool = True,
    parts: Collection[str] = PARTS,
    batch_size: int = 32,
) -> Tensor:
    """Return scores (N, C) of the plug's own answers; for free text log-likelihoods (N, 1) of what the users wrote.

    Args:
        plug: The plug.
        examples: N requests with their histories, and for free text their outputs, whose end token counts.
        personal: False for the plain LLM, without all that the plug adds.
        parts: What of the plug counts for labels, see `PlugModel.score`.
        batch_size: Rows at a time.
    """
    prompter = plug.prompter
    if plug.config.answers:
        return plug.score(examples, personal=personal, parts=parts, batch_size=batch_size)
    table = plug.table(examples) if personal else None
    rows = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        trees = [AnswerTree.build([prompter.answer(e.output)], prompter.eos) for e in batch]
        history, readers = (table.batch(batch), plug.readers(batch)) if table else (None, None)
        rows.append(plug(history, plug.prompts(batch, personal), trees, readers)[0].float().cpu())
    return torch.cat(rows)
