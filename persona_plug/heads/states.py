"""The LLM's last hidden state, had back from its logits by a fixed linear map.

Logits are the output embeddings times the last hidden state, so enough of them give the state back (least squares).
What reads states this way needs no hook into the model: a logits processor of any engine sees all it needs.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from persona_plug.errors import ConfigError

ROWS = 1024  # logits that are read, or twice the width where that is more
CONDITION = 1e-6  # smallest over largest singular value of the output embeddings' rows, at least


class StateMap(nn.Module):
    """Maps logits (..., V) to unit vectors (..., d) in which states are compared.

    Attributes:
        rows: (R,) the vocabulary's entries that are read.
        matrix: (R, d) their map.
    """

    rows: Tensor
    matrix: Tensor

    def __init__(self, size: int, rows: int, softcap: float | None = None) -> None:
        """Create an empty map that reads so many rows; `fit` fills it."""
        super().__init__()
        self.register_buffer("rows", torch.zeros(rows, dtype=torch.long))
        self.register_buffer("matrix", torch.zeros(rows, size))
        self.softcap = softcap

    @classmethod
    def of(cls, llm: Any, size: int) -> Self:  # noqa: ANN401
        """Create an empty map for an LLM."""
        vocabulary, width = output_embeddings(llm).shape
        return cls(size, min(vocabulary, max(ROWS, 2 * width)), softcap(llm.config))

    @torch.no_grad()
    def fit(self, llm: Any, logits: Tensor, seed: int = 0) -> None:  # noqa: ANN401
        """Solve for the states, and keep the directions in which those of some logits differ most.

        Args:
            llm: The LLM.
            logits: (N, V) logits of texts like those that will be read.
            seed: Of the draw of rows.

        Raises:
            ConfigError: The output layer cannot be inverted.
        """
        weight = output_embeddings(llm)
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randperm(weight.shape[0], generator=draw)[: len(self.rows)].sort().values
        part = weight[rows.to(weight.device)].float().cpu()
        values = torch.linalg.svdvals(part)
        if len(values) < weight.shape[1] or float(values[-1] / values[0]) < CONDITION:
            name = type(llm.get_output_embeddings()).__name__
            raise ConfigError(
                f"the LLM's output layer ({name}, {weight.shape[0]} x {weight.shape[1]}) cannot be inverted, so the "
                "words memory cannot read its states: build the plug with words=False"
            )
        # A constant is solved for as well: log-probabilities are logits less one, and give the same states.
        inverse = torch.linalg.pinv(torch.cat([part, torch.ones(len(part), 1)], 1))[:-1]  # (H, R)
        states = nn.functional.normalize(self._uncapped(logits[:, rows.to(logits.device)]).cpu() @ inverse.T, dim=-1)
        directions = torch.linalg.svd(states, full_matrices=False).Vh[: self.matrix.shape[1]]  # (d, H)
        matrix = inverse.T @ directions.T
        self.rows.copy_(rows)
        self.matrix.zero_()
        self.matrix[:, : matrix.shape[1]] = matrix

    def forward(self, logits: Tensor) -> Tensor:
        """Return unit vectors (..., d), float32."""
        return nn.functional.normalize(self._uncapped(logits[..., self.rows]) @ self.matrix, dim=-1)

    def _uncapped(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        if self.softcap is None:
            return logits
        return torch.atanh((logits / self.softcap).clamp(-1 + 1e-6, 1 - 1e-6)) * self.softcap


def output_embeddings(llm: Any) -> Tensor:  # noqa: ANN401
    """Return the weight (V, H) of the layer that makes logits.

    Raises:
        ConfigError: The layer has a bias, is quantised, or there is none.
    """
    layer = llm.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if (
        weight is None
        or weight.dim() != 2
        or not weight.is_floating_point()
        or getattr(layer, "bias", None) is not None
    ):
        raise ConfigError(
            "the words memory needs an output layer that is one dense matrix, and this LLM's is "
            f"{type(layer).__name__}: build the plug with words=False"
        )
    return weight.detach()


def softcap(config: Any) -> float | None:  # noqa: ANN401
    """Return what an LLM's config says its logits are squeezed into, or None."""
    value = getattr(config.get_text_config(decoder=True), "final_logit_softcapping", None)
    return None if value is None else float(value)
