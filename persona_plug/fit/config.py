"""How a plug is trained: one frozen, validated object."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from persona_plug.config import SETTABLE
from persona_plug.errors import ConfigError, unknown_setting

_KINDS: dict[str, type] = {"int": Integral, "float": Real, "bool": bool, "str": str}


@dataclass(frozen=True, slots=True)
class FitConfig:
    """How a plug is trained.

    Attributes:
        steps: Optimiser steps at most; early stopping may end sooner.
        flops: FLOPs of the steps at most, see `fit.work.sample_flops`: fewer steps may be taken. 0 sets no limit.
        batch_size: Samples per process and step: several processes (`accelerate launch`) take as many each.
        gradient_accumulation: Batches per optimiser step.
        lr: Peak learning rate of AdamW; linear decay after `warmup` (share of the steps).
        warmup: Share of steps with rising learning rate.
        weight_decay: AdamW's decay.
        history_dropout: Each row loses a share of its items drawn from [0, history_dropout].
        empty_history: Share of rows that lose their whole history.
        dropout: Dropout in the projector.
        token_weight: Weight of the token loss beside the loss over the candidate answers' scores (labelling tasks).
        eval_every: Steps between looks at the validation users.
        patience: Looks without improvement before training stops.
        eval_samples: Validation samples at most.
        bf16: Mixed precision where the hardware has it.
        seed: Seed of weights, order and dropout.
        report_to: `none`, `tensorboard`, `trackio`, ...
    """

    steps: int = 200
    flops: float = 0.0
    batch_size: int = 32
    gradient_accumulation: int = 1
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    history_dropout: float = 0.5
    empty_history: float = 0.25
    dropout: float = 0.1
    token_weight: float = 0.1
    eval_every: int = 20
    patience: int = 4
    eval_samples: int = 192
    bf16: bool = False
    seed: int = 0
    report_to: str = "none"

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the field."""
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), _KINDS[str(field.type)]
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ConfigError(f"{field.name}={value!r} must be of type {field.type}")
        for name in ("steps", "batch_size", "gradient_accumulation", "eval_every", "patience", "eval_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed!r} must be a whole number from 0 to {2**32 - 1}")
        for name in ("history_dropout", "dropout", "empty_history", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be in [0, 1)")
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"lr={self.lr!r} must be a positive number")
        for name in ("weight_decay", "token_weight", "flops"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)!r} must not be negative")

    @classmethod
    def of(cls, settings: dict[str, Any], others: Iterable[str] = ()) -> FitConfig:
        """Build from keyword settings, naming an unknown one.

        Args:
            settings: Fields by name.
            others: What else the caller takes; a wrong name may mean one of them.

        Raises:
            ConfigError: A setting is unknown, or is the plug's and not the training's.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in sorted(set(settings) - set(known)):
            if name in SETTABLE:
                raise ConfigError(f"{name} is a setting of the plug, not of its training: give it to PersonaPlug.build")
            raise unknown_setting(name, [*known, *others])
        return cls(**settings)
