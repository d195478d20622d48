"""Samples as prompts, answer trees and batches: what training and measuring stand on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from persona_plug.data.history import Example
from persona_plug.errors import DataError
from persona_plug.model import PlugModel
from persona_plug.splice.prompts import AnswerTree


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
        self.examples = list(examples)
        self.table = plug.table(examples) if personal else None
        self.offsets: Tensor | None = None  # (N, C) what the answer head says in training
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

    def collate(self, indices: Sequence[int]) -> dict[str, Any]:
        """Make the trainer's batch."""
        trees = [self.trees[i] for i in indices]
        gold = [self.gold[i] for i in indices]
        lengths = [len(t.paths[g]) + (t.gold_end is not None) for t, g in zip(trees, gold, strict=True)]
        return {
            "history": None if self.table is None else self.table.batch([self.examples[i] for i in indices]),
            "parts": [self.parts[i] for i in indices],
            "trees": trees,
            "gold": torch.tensor(gold),
            "lengths": torch.tensor(lengths),
            "offset": None if self.offsets is None else self.offsets[list(indices)],
        }
