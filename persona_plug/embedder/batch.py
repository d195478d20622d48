"""From examples to the tensors that the embedder reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig
from persona_plug.data.history import Example
from persona_plug.data.labels import label_of
from persona_plug.errors import DataError
from persona_plug.models.encoder import HistoryEncoder


@dataclass(frozen=True, slots=True)
class HistoryBatch:
    """Vectors of B requests and of their users' histories, padded to n items.

    Attributes:
        request: (B, d) float32, the request's vector.
        keys: (B, n, d) float32, each item's input (its output where the input is empty).
        values: (B, n, v) float32, what is pooled: input, output and one-hot answer, as the config asks.
        mask: (B, n) bool, True where there is an item.
        request_ids: (B, L) int64, the encoder's ids of the requests, -1 beyond their ends; None unless the plug trains
            its own reading of requests.
        strength: (B,) float32, how much each history counts; None where all count as trained.
    """

    request: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor
    request_ids: Tensor | None = None
    strength: Tensor | None = None

    def to(self, device: torch.device) -> HistoryBatch:
        """Return the batch on a device."""
        return HistoryBatch(
            self.request.to(device),
            self.keys.to(device),
            self.values.to(device),
            self.mask.to(device),
            None if self.request_ids is None else self.request_ids.to(device),
            None if self.strength is None else self.strength.to(device),
        )


class VectorTable:
    """Vectors of every text a set of examples mentions, encoded once; makes batches without the encoder."""

    def __init__(self, encoder: HistoryEncoder, examples: Sequence[Example], config: PlugConfig) -> None:
        """Encode (or read from the cache) all requests and the used items of all histories.

        Args:
            encoder: The history encoder.
            examples: Examples whose texts are encoded.
            config: Says what an item's value holds, and how many items count.
        """
        self.config, self.encoder = config, encoder
        texts: dict[str, int] = {"": 0}
        for example in examples if config.reads_texts else ():
            texts.setdefault(example.input, len(texts))
            for item in example.history[-config.max_history :]:
                texts.setdefault(item.input, len(texts))
                texts.setdefault(item.output, len(texts))
        self.rows = texts
        self.vectors = encoder.encode(list(texts))
        self.answer_ids = {label_of(a): i for i, a in enumerate(config.answers or ())}

    def batch(self, examples: Sequence[Example]) -> HistoryBatch:
        """Collate examples whose texts are all in the table."""
        limit = self.config.max_history
        histories = [e.history[-limit:] if self.config.reads_texts else () for e in examples]
        n = max([len(h) for h in histories] + [1])
        shape = (len(examples), n)
        inputs, outputs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        answers = torch.full(shape, -1)
        mask = torch.zeros(shape, dtype=torch.bool)
        for b, history in enumerate(histories):
            for i, item in enumerate(history):
                inputs[b, i] = self.rows[item.input]
                outputs[b, i] = self.rows[item.output]
                answers[b, i] = self.answer_ids.get(label_of(item.output), -1)
                mask[b, i] = True
        request = self.vectors[torch.tensor([self.rows.get(e.input, 0) for e in examples], dtype=torch.long)]
        batch = collate(self.config, request, self.vectors[inputs], self.vectors[outputs], answers, mask)
        return with_requests(self.config, self.encoder, batch, examples)


def with_requests(
    config: PlugConfig, encoder: HistoryEncoder, batch: HistoryBatch, examples: Sequence[Example]
) -> HistoryBatch:
    """Return the batch with strengths, and the encoder's ids of the requests where the plug reads them itself."""
    if any(e.strength != 1 for e in examples):
        batch = replace(batch, strength=torch.tensor([e.strength for e in examples], dtype=torch.float))
    if not config.train_request:
        return batch
    rows = [torch.tensor(encoder.ids(e.input), dtype=torch.long) for e in examples]
    return replace(batch, request_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1))


def collate(
    config: PlugConfig,
    request: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    answers: Tensor,
    mask: Tensor,
) -> HistoryBatch:
    """Make a batch of vectors, wherever they come from.

    Args:
        config: Says what an item's value holds.
        request: (B, d) the requests' vectors.
        inputs: (B, n, d) the items' inputs, zero where there is none.
        outputs: (B, n, d) their outputs.
        answers: (B, n) int64, the number of each item's answer, -1 where it is none of the config's.
        mask: (B, n) bool, True where there is an item.
    """
    blank = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True) == 0
    keys = torch.where(blank, outputs, inputs)
    parts = [inputs, outputs] if config.item_outputs else [keys]
    if count := value_dim(config)[1]:
        one_hot = torch.nn.functional.one_hot(answers.clamp(min=0), count).float()
        parts.append(one_hot * (answers >= 0).unsqueeze(-1))
    return HistoryBatch(request, keys, torch.cat(parts, -1), mask)


def value_dim(config: PlugConfig) -> tuple[int, int]:
    """Return the width of an item's text part and of its one-hot answer part."""
    counted = config.use_answer_counts or config.answer_head
    answers = len(config.answers) if config.answers and counted else 0
    return config.encoder_dim * (2 if config.item_outputs else 1), answers


def check_finite(batch: HistoryBatch) -> None:
    """Refuse vectors that are not finite.

    Raises:
        DataError: Names the row and the kind of vector.
    """
    for name in ("request", "keys", "values"):
        tensor = getattr(batch, name)
        # A sum is much cheaper than a look at each number, and not finite if one of them is not.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            row = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
            raise DataError(f"row {row}: {name} vectors hold NaN or infinity; encode the history again")
