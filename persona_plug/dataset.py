"""Samples as prompts, answer trees and batches: what training and measuring stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from persona_plug.data.history import Example
from persona_plug.embedder.batch import HistoryBatch
from persona_plug.errors import DataError
from persona_plug.heads.words import WordsReader
from persona_plug.model import PlugModel
from persona_plug.splice.prompts import AnswerTree, PromptParts


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples, ready for `PlugModel.forward` and the loss.

    Attributes:
        history: The requests' vectors and histories; None for the plain LLM.
        parts: B prompts.
        trees: B trees of candidate answers.
        gold: (B,) int64, the number of each gold answer.
        lengths: (B,) int64, the tokens of each gold answer, its end token included.
        offset: (B, C) float32, scores of the answer head by heads that did not see the row's user; None outside
            training and for plugs without a head.
    """

    history: HistoryBatch | None
    parts: list[PromptParts]
    trees: list[AnswerTree]
    gold: Tensor
    lengths: Tensor
    offset: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            history=None if self.history is None else self.history.to(device),
            gold=self.gold.to(device),
            lengths=self.lengths.to(device),
            offset=None if self.offset is None else self.offset.to(device),
        )


class PlugDataset(Dataset[int]):
    """Samples as prompts, answer trees and row numbers of encoded histories."""

    def __init__(self, plug: PlugModel, examples: Sequence[Example], personal: bool = True) -> None:
        """Tokenise prompts and answers, and encode all texts (from the vector cache where known).

        Args:
            plug: Whose prompter, answers and encoder are used.
            examples: The samples, at least one.
            personal: False for the plain LLM, which reads no history: nothing is encoded.

        Raises:
            DataError: There are no samples.
        """
        if not examples:
            raise DataError("there are no samples to train on")
        self.examples, self.plug = list(examples), plug
        self.table = plug.table(examples) if personal else None
        self.offsets: Tensor | None = None  # (N, C) scores of the answer head in training
        prompter, answers = plug.prompter, plug.config.answers
        self.parts = [prompter.parts(e.input, e.prompt) for e in self.examples]
        self.cut = sum(p.cut > 0 for p in self.parts)
        if answers:
            ids = prompter.candidates(answers)
            trees = [AnswerTree.build(ids, prompter.eos, gold=i) for i in range(len(answers))]
            self.gold = [answers.index(e.output.strip()) for e in self.examples]
            self.trees = [trees[g] for g in self.gold]
        else:
            self.gold = [0] * len(self.examples)
            self.trees = [AnswerTree.build([prompter.answer(e.output)], prompter.eos, gold=0) for e in self.examples]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        """Return the index itself; `collate` makes the batch."""
        return index

    def readers(self, indices: Sequence[int]) -> list[WordsReader] | None:
        """Return what reads the words of samples' users; None where the plug remembers none."""
        return self.plug.readers([self.examples[i] for i in indices]) if self.table is not None else None

    def collate(self, indices: Sequence[int]) -> Batch:
        """Return samples as a batch on the CPU."""
        trees = [self.trees[i] for i in indices]
        gold = [self.gold[i] for i in indices]
        lengths = [len(t.paths[g]) + (t.gold_end is not None) for t, g in zip(trees, gold, strict=True)]
        return Batch(
            None if self.table is None else self.table.batch([self.examples[i] for i in indices]),
            [self.parts[i] for i in indices],
            trees,
            torch.tensor(gold),
            torch.tensor(lengths),
            None if self.offsets is None else self.offsets[list(indices)],
        )

    @torch.no_grad()
    def scores(self, batch_size: int = 32) -> Tensor:
        """Return the answers' scores (N, C), for free text with the end token included, on the CPU."""
        rows = []
        for start in range(0, len(self), batch_size):
            indices = range(start, min(start + batch_size, len(self)))
            batch = self.collate(indices)
            loglik, _, bias = self.plug(batch.history, batch.parts, batch.trees, self.readers(indices))
            rows.append(self.plug.embedder.combine(loglik, bias).float().cpu())
        return torch.cat(rows)
