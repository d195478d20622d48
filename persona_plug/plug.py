"""PersonaPlug, the façade: build, fit, save, load, push."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from persona_plug import persistence
from persona_plug.config import SETTABLE, PlugConfig
from persona_plug.data.rows import local_path
from persona_plug.errors import ConfigError
from persona_plug.fit.config import FitConfig
from persona_plug.model import STATE_BUDGET, PlugModel
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.models.llm import Quantization, load_llm

if TYPE_CHECKING:
    from persona_plug.fit.report import FitReport

TRAINING = {field.name for field in dataclasses.fields(FitConfig)}


class PersonaPlug(PlugModel):
    """A plug: build one, fit it, generate with it, save it.

    Attributes:
        fit_report: What the last `fit` found on held-out users, None before; it is saved with the plug.
    """

    fit_report: FitReport | None = None

    @classmethod
    def build(
        cls,
        llm: str,
        encoder: str | HistoryEncoder = "minilm-l6",
        *,
        recipe: str = "default",
        quantization: Quantization | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
        state_budget: int = STATE_BUDGET,
        **settings: Any,  # noqa: ANN401
    ) -> Self:
        """Join a frozen LLM and a frozen encoder with an untrained plug.

        Args:
            llm: Short name (`persona-plug models list`), folder or Hub id.
            encoder: The same for the sentence encoder, or a `HistoryEncoder`.
            recipe: `default` (for free text with a memory of users' own words), `words` (that memory beside task tokens
                alone), `mean`, `paper` (PPlug as published), or another of `persona_plug.config.RECIPES`.
            quantization: `int8` or `nf4` for the LLM's matrices.
            dtype: Dtype of the LLM.
            device: Device of LLM and encoder.
            seed: Seed of the untrained weights.
            state_budget: Bytes of frozen states cached across epochs.
            settings: Any field of `PlugConfig`.

        Raises:
            ModelUnavailable: Weights cannot be had; the message says what to do.
            ConfigError: A setting is unknown or out of range.
        """
        for setting in settings:
            if setting not in SETTABLE and setting in TRAINING:
                raise ConfigError(f"{setting} is a setting of training, not of the plug: give it to fit")
        name = encoder if isinstance(encoder, str) else encoder.name
        config = PlugConfig.create(llm, name, recipe, **settings)
        model, tokenizer = load_llm(llm, dtype=dtype, quantization=quantization, device=device)
        reader = encoder if isinstance(encoder, HistoryEncoder) else HistoryEncoder(encoder, device=device)
        return cls.join(config, model, tokenizer, reader, quantization, seed, state_budget)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        llm: str | None = None,
        encoder: str | HistoryEncoder | None = None,
        quantization: Quantization | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        state_budget: int = STATE_BUDGET,
    ) -> Self:
        """Load a plug with the LLM and encoder it names, or with others given here that have the same fingerprints.

        Args:
            folder: A folder written by `save_pretrained`, or a Hub id.
            llm: Another place of the same LLM.
            encoder: Another place of the same encoder.
            quantization: `int8` or `nf4`; a plug trained on dense weights may run on quantised ones.
            dtype: Dtype of the LLM.
            device: Device of LLM and encoder.
            state_budget: Bytes of frozen states cached across epochs.

        Raises:
            MismatchError: LLM or encoder is another than the plug was trained with.
            CorruptFileError: The folder's files are incomplete or altered.
        """
        path = persistence.local_folder(folder)
        config = PlugConfig.load(path)
        weights = persistence.read_weights(path)
        persistence.check_weights(config, weights, path)
        lora = persistence.read_lora(config, path)
        source = config.encoder if encoder is None else encoder
        reader = source if isinstance(source, HistoryEncoder) else persistence.load_encoder(path, source, device)
        persistence.check_encoder(config, reader)
        model, tokenizer = load_llm(llm or config.llm, dtype=dtype, quantization=quantization, device=device)
        persistence.check_llm(config, model, quantization)
        plug = cls(config, model, tokenizer, reader, state_budget=state_budget)
        persistence.check_prompt(config, plug.config)
        persistence.apply_weights(plug.parts(), weights, path, lora)
        return plug

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write what was learned, with config and model card; nothing of the LLM or any user."""
        return persistence.save(local_path(folder), self.config, self.parts(), self.encoder, self.fit_report)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the saved plug to the Hub (private by default) and return its address."""
        with tempfile.TemporaryDirectory() as folder:
            return persistence.push(self.save_pretrained(folder), repo_id, private=private, token=token)

    def fit(self, data: Any, **settings: Any) -> FitReport:  # noqa: ANN401
        """Train on a file of events, a LaMP folder or examples; hold users out, and report the lift.

        See `persona_plug.fit.run.fit` for the arguments. Progress goes to standard error; the report's `str` is its
        table.
        """
        from persona_plug.fit.run import fit

        self.fit_report = fit(self, data, **settings)
        return self.fit_report

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # noqa: ANN401
        """Refuse what `half`, `to` and the like would do: what is trained stays float32, where the LLM is."""
        probe = torch.zeros(1, dtype=torch.float32, device=self.llm.device)
        made = fn(probe)
        if (made.dtype, made.device) != (probe.dtype, probe.device):
            raise ConfigError(
                "a plug's own numbers stay float32, on the device of its LLM; "
                "choose both for the LLM, by build or from_pretrained (dtype=..., device=...)"
            )
        return super()._apply(fn, recurse)
