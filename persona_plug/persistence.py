"""A plug on disk: `model.safetensors` (what was learned), `config.json`, `README.md`; LoRA adapters in `adapter/`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from persona_plug.config import CONFIG_NAME, SMOOTHING, PlugConfig
from persona_plug.data.rows import local_path
from persona_plug.embedder.architectures import make_embedder
from persona_plug.errors import ConfigError, CorruptFileError, MismatchError, PersonaPlugError, first_line
from persona_plug.files import write_atomically
from persona_plug.heads.answers import AnswersHead
from persona_plug.models.adapters import ADAPTER, FILES, Adapters, read_adapters
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.models.fingerprint import llm_fingerprint, same_llm
from persona_plug.models.hub import hub_answers
from persona_plug.models.tensors import read_tensors, state_digest, write_tensors

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
REPORT_NAME = "fit_report.json"
# Where models were found, and what the settings were called: other names make no other plug.
_NAMES = ("llm", "encoder", "recipe", "format_version")


class Report(Protocol):
    """What is saved beside a plug about its training."""

    def to_json(self) -> str:
        """Return everything as JSON text."""

    def to_markdown(self) -> str:
        """Return what the model card shows."""


def save(
    folder: Path,
    config: PlugConfig,
    parts: Mapping[str, nn.Module],
    encoder: HistoryEncoder,
    report: Report | None = None,
) -> Path:
    """Write a plug's files, each atomically, and return the folder.

    Args:
        folder: Where to; it is made if it is not there.
        config: The plug's config.
        parts: What was learned: the embedder under an empty name, a head or adapters under the name that their tensors
            begin with.
        encoder: The frozen encoder, whose settings are saved.
        report: The report of its training, if there is one.
    """
    make_folder(folder)
    settings = {"pooling": encoder.pooling, "max_length": encoder.max_length, "prefix": encoder.prefix}
    metadata = {"encoder": json.dumps(settings)}
    for part in parts.values():
        if isinstance(part, Adapters):  # in files of their own, which PEFT reads
            part.save(folder / ADAPTER, config.llm, config.llm_fingerprint)
            metadata["adapters"] = part.digest
    if "adapters" not in metadata:  # an earlier plug's: whoever serves the folder would take them for this one's
        for name in FILES:
            (folder / ADAPTER / name).unlink(missing_ok=True)
    others = {name: part for name, part in parts.items() if not isinstance(part, Adapters)}
    write_tensors(folder / WEIGHTS_NAME, state_of(others), metadata)
    write_atomically(folder / CONFIG_NAME, config.to_json().encode())
    if report is not None:
        write_atomically(folder / REPORT_NAME, report.to_json().encode())
    write_atomically(folder / CARD_NAME, model_card(config, parts, report).encode())
    return folder


def make_folder(folder: Path) -> Path:
    """Make the folder that a plug goes into, and return it.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"{str(folder)!r} cannot be a plug's folder ({reason}); choose another one") from exc
    return folder


def state_of(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return all tensors of what was learned, on the CPU; see `save` for their names."""
    return {
        start + name: tensor.detach().cpu().contiguous()
        for start, part in parts.items()
        for name, tensor in part.state_dict().items()
    }


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """Return a local plug folder, fetching a Hub id (weights, config and card only)."""
    path = local_path(folder)
    if path.is_dir():
        return path
    if path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        raise CorruptFileError(f"{folder}: no such folder; give the folder save_pretrained wrote")
    from huggingface_hub import snapshot_download

    patterns = [WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, *(f"{ADAPTER}/{name}" for name in FILES)]
    online = hub_answers()
    try:
        return Path(snapshot_download(str(folder), allow_patterns=patterns, local_files_only=not online))
    except Exception as exc:  # hub, http and socket errors have no common base
        reason = first_line(exc)[:120] if online else "which does not answer"
        raise CorruptFileError(f"{folder}: neither a folder nor reachable on the Hub ({reason})") from exc


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read and check the weights of a plug folder.

    Raises:
        CorruptFileError: The file is missing, truncated, or does not match its own checksum.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing: {folder} is not a saved plug")
    return read_tensors(path)[0]


def load_encoder(folder: Path, name: str, device: Any) -> HistoryEncoder:  # noqa: ANN401
    """Make the encoder with the pooling, maximum length and prefix the plug was trained with."""
    try:
        settings = dict(json.loads(_header(folder).get("encoder", "{}")))
    except (ValueError, TypeError) as exc:
        raise CorruptFileError(f"{folder / WEIGHTS_NAME}: encoder settings are damaged; copy the plug again") from exc
    if unknown := sorted(set(settings) - {"pooling", "max_length", "prefix"}):
        raise CorruptFileError(
            f"{folder / WEIGHTS_NAME} names an unknown encoder setting {unknown[0]!r}; save it again"
        )
    for key, kind in (("pooling", str), ("max_length", int), ("prefix", str)):
        if key in settings and type(settings[key]) is not kind:
            raise CorruptFileError(
                f"{folder / WEIGHTS_NAME}: encoder setting {key}={settings[key]!r:.40} is damaged; copy the plug again"
            )
    return HistoryEncoder(name, device=device, **settings)


def read_lora(config: PlugConfig, folder: Path) -> dict[str, Tensor]:
    """Read and check the adapters of a plug folder; a plug without LoRA has none.

    Raises:
        CorruptFileError: A file is missing or damaged.
        MismatchError: They belong to another LLM, or to another plug.
    """
    if not config.lora:
        return {}
    state = read_adapters(folder / ADAPTER, config.llm_fingerprint)
    if _header(folder).get("adapters") != state_digest(state):
        raise MismatchError(f"{folder / ADAPTER} holds another plug's adapters; copy the whole plug")
    return state


def _header(folder: Path) -> dict[str, str]:
    """Return what the header of a plug's weights says beside them."""
    from safetensors import safe_open

    with safe_open(str(folder / WEIGHTS_NAME), "pt") as file:
        return file.metadata() or {}


def apply_weights(
    parts: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    folder: Path,
    lora: Mapping[str, Tensor] | None = None,
) -> None:
    """Load checked weights into the parts of a plug.

    Args:
        parts: See `save`.
        state: Their tensors, see `state_of`.
        folder: Where these come from.
        lora: Adapters by PEFT's names, where they come from files of their own (`read_lora`).

    Raises:
        MismatchError: Names or shapes are not those the config asks for.
    """
    state = current_names(state)
    try:
        for start, part in parts.items():
            if isinstance(part, Adapters) and lora is not None:
                part.load(folder / ADAPTER, lora)
                continue
            others = tuple(name for name in parts if name != start and name.startswith(start))
            own = {
                k.removeprefix(start): v for k, v in state.items() if k.startswith(start) and not k.startswith(others)
            }
            part.load_state_dict(own, strict=True)
    except RuntimeError as exc:
        reason = " ".join(str(exc).split())[:200]
        raise MismatchError(f"{folder}: {WEIGHTS_NAME} and {CONFIG_NAME} do not belong together ({reason})") from exc


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under today's names: before version 3 the answers head was a part of the embedder.

    That head read the request's vector alone, and counted all items alike.
    """
    if "answer_head.weight" not in state:
        return dict(state)
    moved = {"answer_head.weight": "weight", "answer_head.bias": "offset", "frequency_weight": "power"}
    moved |= {"population": "population", "llm_log_weight": "llm_log_weight"}
    fixed = {"pseudo": SMOOTHING, "sharpness": 0.0, "fading": 0.0, "spread": 0.0, "llm_share": 1.0}
    now = {f"answers.{moved[name]}" if name in moved else name: tensor for name, tensor in state.items()}
    return now | {f"answers.{name}": torch.tensor(value) for name, value in fixed.items()}


def begin_with(start: str | os.PathLike[str], config: PlugConfig, parts: Mapping[str, nn.Module]) -> str:
    """Give the parts of a plug the weights of a saved one, to train them further; return a digest of these.

    Args:
        start: The saved plug's folder or Hub id.
        config: The config of the plug that is to be trained.
        parts: Its parts, see `save`.

    Raises:
        CorruptFileError: A file is missing or damaged.
        MismatchError: The saved plug is another one; the first difference is named.
    """
    folder = local_folder(start)
    saved = PlugConfig.load(folder)
    for field in dataclasses.fields(PlugConfig):
        there, here = getattr(saved, field.name), getattr(config, field.name)
        if field.name not in _NAMES and there != here:
            raise MismatchError(
                f"{folder} cannot be trained further as this plug: {field.name} {there!r:.60} there, {here!r:.60} here;"
                " build with its settings, or fit without start"
            )
    state, lora = read_weights(folder), read_lora(saved, folder)
    apply_weights(parts, state, folder, lora)
    return state_digest({**state, **{f"lora.{name}": tensor for name, tensor in lora.items()}})[:16]


def check_weights(config: PlugConfig, state: dict[str, Tensor], folder: Path) -> None:
    """Refuse weights that are not a plug's of this config, before room is made for it.

    Raises:
        MismatchError: Names, shapes or dtypes are not those the config asks for.
        CorruptFileError: A number is not finite.
    """
    plain, state = config.replace(train_request=False), current_names(state)
    try:
        with torch.device("meta"):  # shapes alone
            expected = make_embedder(plain, 1.0).state_dict()
            head = AnswersHead.of(config)
            expected |= {} if head is None else {f"answers.{name}": t for name, t in head.state_dict().items()}
    except (RuntimeError, OverflowError) as exc:
        raise MismatchError(f"{folder / CONFIG_NAME}: no model has such sizes; copy the plug again") from exc
    scale = state.get("score_temperature")
    if scale is not None and not bool((scale > 0).all()):
        raise CorruptFileError(f"{folder}: score_temperature in {WEIGHTS_NAME} is not positive; copy the plug again")
    # What depends on the models themselves is checked when it is loaded.
    later = ("request_encoder.",) * config.train_request + ("words.",) * config.remembers
    present = {name: t for name, t in state.items() if not name.startswith(later)}
    for name in sorted(expected.keys() | present.keys()):
        want, have = (
            "nothing" if t is None else f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            for t in (expected.get(name), present.get(name))
        )
        if want != have:
            raise MismatchError(
                f"{folder}: {WEIGHTS_NAME} and {CONFIG_NAME} do not belong together ({name}: {have}, not {want}); "
                "copy the plug again"
            )


def check_encoder(config: PlugConfig, encoder: HistoryEncoder) -> None:
    """Refuse an encoder other than the plug's."""
    if encoder.fingerprint != config.encoder_fingerprint:
        raise MismatchError(
            f"the plug was trained with encoder {config.encoder} ({config.encoder_fingerprint}), "
            f"not {encoder.name} ({encoder.fingerprint}); pass the same encoder, pooling, max_length and prefix"
        )


def check_llm(config: PlugConfig, llm: Any, quantization: str | None) -> None:  # noqa: ANN401
    """Refuse an LLM other than the plug's."""
    present = llm_fingerprint(llm, quantization)
    width = int(llm.get_input_embeddings().weight.shape[1])
    if width != config.llm_width or not same_llm(config.llm_fingerprint, present):
        raise MismatchError(
            f"the plug was trained with LLM {config.llm} ({config.llm_fingerprint}, width {config.llm_width}), "
            f"the one given is {present}, width {width}; pass the same weights"
        )


def check_prompt(saved: PlugConfig, present: PlugConfig) -> None:
    """Refuse a chat template that writes something else around a request than when the plug was saved."""
    if saved.prompt_digest not in ("", present.prompt_digest):
        raise MismatchError(
            f"the chat template or tokenizer of {saved.llm} writes another prompt than when the plug was saved "
            f"({saved.prompt_digest}, now {present.prompt_digest}); pass the LLM's folder as it was then"
        )


def push(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload a saved plug's folder to the Hub and return its address."""
    from huggingface_hub import HfApi

    if not hub_answers():
        raise PersonaPlugError(f"{repo_id}: the Hub does not answer; check the network, and HF_HUB_OFFLINE")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Upload plug"))
    except Exception as exc:  # hub, http and socket errors have no common base
        raise PersonaPlugError(f"{repo_id}: upload failed ({str(exc).splitlines()[0][:160]})") from exc


def model_card(config: PlugConfig, parts: Mapping[str, nn.Module], report: Report | None = None) -> str:
    """Return the README of a saved plug."""
    count = sum(p.numel() for part in parts.values() for p in part.parameters() if p.requires_grad)
    lines = [
        "---",
        "library_name: persona-plug",
        "tags: [personalization, soft-prompt, persona-plug]",
        "---",
        "",
        "# A plug for a frozen language model",
        "",
        f"{config.user_tokens} user and {config.shared_tokens} task soft tokens ({count:,} trained parameters) for the "
        f"frozen LLM `{config.llm}` (fingerprint `{config.llm_fingerprint}`), from histories encoded by "
        f"`{config.encoder}` (`{config.encoder_fingerprint}`).",
        "",
        f"Recipe `{config.recipe}`, placement `{config.placement}`, aggregator `{config.aggregator}`, "
        f"template `{config.template!r}`, answers {', '.join(config.answers) if config.answers else 'free text'}.",
        *([f"LoRA of rank {config.lora} on the LLM lies in `{ADAPTER}/`."] if config.lora else []),
        *([f"A user's {config.retrieve} nearest items stand in the prompt."] if config.retrieve else []),
        "",
        "```python",
        "from persona_plug import PersonaPlug",
        "",
        'plug = PersonaPlug.from_pretrained("this-folder")',
        'plug.generate("a new request", history=[{"input": "an earlier request", "output": "what the person wrote"}])',
        "```",
        "",
        "The file holds no text, id or vector of any user. It was trained on users' data all the same: a plug can "
        "carry traces of what is common among them.",
    ]
    if report is not None:
        lines += ["", "## Held-out users", "", report.to_markdown()]
    return "\n".join(lines) + "\n"
