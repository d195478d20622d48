"""PlugConfig: everything needed to rebuild a plug, as a frozen, validated, versioned dataclass."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import warnings
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Self

from persona_plug.errors import ConfigError, CorruptFileError, nearest, unknown_setting

FORMAT_VERSION = 3
CONFIG_NAME = "config.json"
TASK_TOKENS, BESIDE_WORDS = 4, 12  # task tokens by default, and beside a words memory
SMOOTHING = 1.0  # pseudo-counts over all answers in a user's label frequencies

PLACEMENTS = ("suffix", "prefix")
AGGREGATORS = ("attention", "mean", "paper", "uem", "persoma_mlp", "persoma_transformer", "persoma_perceiver")

_ALONE = {"use_request": False, "answer_head": False}
# A recipe is a named set of choices; explicit keyword arguments of PlugConfig.create win over it.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"words": True},
    "mean": {"aggregator": "mean"},
    # PPlug as published: eq. 3-5, one user token and one instruction token in front of the input, the label
    # not part of an item, no other input to the projector than the pooled history.
    "paper": {
        "aggregator": "paper",
        "placement": "prefix",
        "user_tokens": 1,
        "task_tokens": 1,
        "item_outputs": False,
        "use_request": False,
        "use_answer_counts": False,
        "answer_head": False,
    },
    # The neighbours of PPlug, on the frozen LLM. They read the history alone: no request, no answer head.
    "uem": {**_ALONE, "aggregator": "uem", "max_history": 50},
    "persoma": {**_ALONE, "aggregator": "persoma_perceiver"},
    "persoma_mlp": {**_ALONE, "aggregator": "persoma_mlp"},
    "persoma_transformer": {**_ALONE, "aggregator": "persoma_transformer"},
    # Task tokens that know no user: for free text the words memory alone does.
    "words": {"words": True, "user_tokens": 0, "task_tokens": 16},
}


PARTS = ("soft", "answers")  # what of a plug a score may count: the LLM behind soft tokens, and the answers head

# A plug that adds nothing of its own to a prompt but the user's items as chat turns.
TURNS_ALONE = {**_ALONE, "user_tokens": 0, "task_tokens": 0, "words": False, "lora": 0}


@dataclass(frozen=True, slots=True)
class PlugConfig:
    """Architecture and identity of a plug.

    Attributes:
        llm: Short name, folder or Hub id of the frozen LLM.
        encoder: Short name, folder or Hub id of the frozen sentence encoder.
        llm_fingerprint: Identity of the LLM the plug was trained with (see `persona_plug.models.fingerprint`).
        encoder_fingerprint: Identity of the encoder, its pooling, maximum length and prefix included.
        llm_width: H, the width of the LLM's input embeddings.
        encoder_dim: d, the width of the encoder's vectors.
        prompt_width: D, the width of the summary that the LLM's kept states give of a prompt; 0 if it gives none.
        recipe: Name of the set of defaults the plug was created from.
        placement: Where the soft tokens go: `suffix` (behind the input) or `prefix` (in front of it).
        aggregator: `attention` (default), `mean`, `paper` (eq. 3-4 of PPlug), `uem` (one token per item) or
            `persoma_mlp`, `persoma_transformer`, `persoma_perceiver` (resampled to k tokens).
        heads: Attention heads of the default aggregator; head 0 starts as the plain mean.
        key_dim: Width of the learned request and key views.
        user_tokens: k, soft tokens that depend on the user (`uem` has one per item instead, and one more).
        task_tokens: m, soft tokens shared by all users; by default 4, and 12 beside a words memory.
        projector_hidden: Width of the projector's hidden layer.
        fixed_scale: Length of every user token, and seven times that of a task token, in place of learned gains; 0 for
            these. PPlug's released code multiplies so, by 539.9738 for FlanT5-XXL, which its paper does not mention;
            there the vectors in front of the factor have no fixed length, here they are unit vectors.
        item_outputs: Whether an item's value holds its output beside its input.
        use_request: Whether the projector also sees the request's own vector.
        train_request: Whether requests are read by a copy of the encoder that is trained, as PPlug does; items stay
            with the frozen one. The plug's file then holds that copy.
        use_answer_counts: Whether the projector also sees how often the user gave each answer in `answers`.
        answer_head: Whether scores of `answers` also get what a head says of request and user: it reads the request's
            vector, with `suffix` also the LLM's own states of the prompt, and the user's answers.
        answers: The answer space of a labelling task, or None for free text.
        template: The LLM's instruction; `{input}` stands for the request's text.
        words: Whether, for free text, a memory of the user's own words is mixed into what the LLM writes.
        lora: Rank of LoRA adapters that are trained in the LLM, one set for all users; 0 for none.
        retrieve: The user's items, nearest to the request, that stand in the prompt as chat turns.
        max_words: Items whose words are read for a request; the latest (last in order) are taken.
        max_history: Items used per user; the latest (last in order) are kept.
        max_input_tokens: Tokens of the templated input; the middle part `{input}` is cut from its end.
        max_answer_tokens: Tokens of an answer, in training and as default in generation.
        chat_template_args: Arguments of the LLM's chat template, such as `{"enable_thinking": False}`.
        template_day: The day (ISO) that a chat template writes where it would write today's: the prompt stays the same.
        prompt_digest: Identity of what the chat template writes around a request, and of the end token.
        format_version: Version of the file format.
    """

    llm: str
    encoder: str
    llm_fingerprint: str = ""
    encoder_fingerprint: str = ""
    llm_width: int = 0
    encoder_dim: int = 0
    prompt_width: int = 0
    recipe: str = "default"
    placement: str = "suffix"
    aggregator: str = "attention"
    heads: int = 2
    key_dim: int = 64
    user_tokens: int = 4
    task_tokens: int | None = None
    projector_hidden: int = 256
    fixed_scale: float = 0.0
    item_outputs: bool = True
    use_request: bool = True
    train_request: bool = False
    use_answer_counts: bool = True
    answer_head: bool = True
    answers: tuple[str, ...] | None = None
    template: str = "{input}"
    words: bool = False
    lora: int = 0
    retrieve: int = 0
    max_words: int = 40
    max_history: int = 512
    max_input_tokens: int = 256
    max_answer_tokens: int = 64
    chat_template_args: dict[str, Any] = field(default_factory=dict, hash=False)
    template_day: str = ""
    prompt_digest: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the field."""
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if type(value) is not kind:
                raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}")
        if self.task_tokens is not None and type(self.task_tokens) is not int:
            raise ConfigError(f"task_tokens={self.task_tokens!r} must be of type int")
        _one_of("placement", self.placement, PLACEMENTS)
        _one_of("aggregator", self.aggregator, AGGREGATORS)
        _one_of("recipe", self.recipe, tuple(RECIPES))
        for name in (
            "heads",
            "key_dim",
            "projector_hidden",
            "max_history",
            "max_input_tokens",
            "max_answer_tokens",
            "max_words",
        ):
            if int(getattr(self, name)) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1")
        widths = ("llm_width", "encoder_dim", "prompt_width")
        for name in ("user_tokens", "task_tokens", "lora", "retrieve", *widths):
            if int(getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must not be negative")
        if not 0 <= self.fixed_scale < float("inf"):
            raise ConfigError(f"fixed_scale={self.fixed_scale!r} must be 0 or a positive number")
        if not (self.soft_tokens or self.lora or self.retrieve):
            raise ConfigError("user_tokens and task_tokens are both 0: a plug needs a soft token, or lora or retrieve")
        if self.train_request and self.answer_head:
            raise ConfigError("train_request=True needs answer_head=False: the head is fitted to frozen vectors")
        if self.template.count("{input}") != 1:
            raise ConfigError(f"template must contain {{input}} exactly once, got {self.template!r}")
        args: object = self.chat_template_args
        if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
            raise ConfigError(f"chat_template_args must be an object of names and values, got {args!r:.80}")
        try:
            json.dumps(args)
            date.fromisoformat(self.template_day or "2000-01-01")
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"chat_template_args or template_day cannot be saved ({exc})") from exc
        if self.answers is not None:
            answers: object = self.answers
            if not isinstance(answers, tuple | list) or not all(isinstance(a, str) for a in answers):
                raise ConfigError(f"answers must be a list of texts, got {self.answers!r}")
            object.__setattr__(self, "answers", tuple(self.answers))
            if len(self.answers) < 2 or len(set(self.answers)) != len(self.answers) or "" in self.answers:
                raise ConfigError(f"answers must be two or more different, non-empty texts, got {self.answers!r}")

    @classmethod
    def create(cls, llm: str, encoder: str, recipe: str = "default", **overrides: Any) -> Self:  # noqa: ANN401
        """Build a config from a recipe; overrides given as None keep the recipe's value.

        Raises:
            ConfigError: A name is unknown or a value is out of range.
        """
        _one_of("recipe", recipe, tuple(RECIPES))
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(overrides) - known):
            raise unknown_setting(unknown[0], sorted(known))
        changes = {k: v for k, v in overrides.items() if v is not None}
        return cls(**{"llm": llm, "encoder": encoder, "recipe": recipe, **RECIPES[recipe], **changes})

    @property
    def judges(self) -> bool:
        """Whether this plug has an answers head: for labels alone, and where soft tokens know the user."""
        return self.answer_head and bool(self.answers) and self.user_tokens > 0

    @property
    def remembers(self) -> bool:
        """Whether this plug has a words memory: for free text alone."""
        return self.words and self.answers is None

    @property
    def reads_texts(self) -> bool:
        """Whether soft tokens or answer head depend on what the encoder says of a request or its user."""
        return self.user_tokens > 0 or (self.answer_head and self.answers is not None)

    @property
    def shared_tokens(self) -> int:
        """m, the task tokens that this plug has."""
        return (BESIDE_WORDS if self.remembers else TASK_TOKENS) if self.task_tokens is None else self.task_tokens

    @property
    def soft_tokens(self) -> int:
        """All soft tokens of a request, in their order: task, user."""
        return self.shared_tokens + self.user_tokens

    def replace(self, **changes: Any) -> Self:  # noqa: ANN401
        """Return a validated copy with the given fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Return the config as sorted JSON text."""
        fields = {**dataclasses.asdict(self), "format_version": FORMAT_VERSION}
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = CONFIG_NAME) -> Self:
        """Read a config; an unknown key is ignored with a warning, a newer format version is refused.

        Raises:
            CorruptFileError: The text is not a JSON object or lacks a required field.
            ConfigError: The file comes from a newer version, or a value is out of range.
        """
        try:
            raw = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as exc:
            raise CorruptFileError(f"{source} is not JSON ({exc}); save the plug again") from exc
        if not isinstance(raw, dict):
            raise CorruptFileError(f"{source} holds no JSON object; save the plug again")
        version = raw.get("format_version", 1)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ConfigError(
                f"{source} has format version {version}, this persona_plug reads up to {FORMAT_VERSION}; "
                "upgrade persona_plug"
            )
        # Earlier plugs blended the first words of a user's outputs into soft tokens: for free text, beside user tokens.
        quoted = raw.pop("quote_tokens", 0)
        if quoted and raw.get("answers") is None and raw.get("user_tokens") != 0:
            raise ConfigError(
                f"{source} asks for quoted tokens (quote_tokens={quoted!r}), which are gone: fit the plug again, with "
                "words=True for users' own words"
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - set(fields)):
            warnings.warn(
                f"{source}: unknown setting(s) {', '.join(unknown)} ignored; a newer persona_plug may know them",
                stacklevel=2,
            )
        known = {k: v for k, v in raw.items() if k in fields}
        if isinstance(known.get("answers"), list):
            known["answers"] = tuple(known["answers"])
        missing = [n for n in ("llm", "encoder") if not isinstance(known.get(n), str)]
        if missing:
            raise CorruptFileError(f"{source} lacks the field {missing[0]!r}; save the plug again")
        try:
            return cls(**known)
        except (TypeError, ValueError) as exc:
            raise CorruptFileError(f"{source} holds a value of the wrong type ({exc}); save the plug again") from exc

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `config.json` of a plug folder."""
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise CorruptFileError(f"{path} is missing: {folder} is not a saved plug")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as exc:
            raise CorruptFileError(f"{path} is not UTF-8 text; save the plug again") from exc
        return cls.from_json(text, str(path))


def field_texts(kind: type[Any]) -> dict[str, str]:
    """Return what the docstrings of a dataclass and of those that it extends say of its fields, under `Attributes:`."""
    texts = {}
    for base in reversed(kind.__mro__):
        entries = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("\nAttributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", entries, re.MULTILINE):
            texts[name] = " ".join(text.split())
    return texts


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}")


# Fields that the models or the data decide on.
_DECIDED = {"llm", "llm_fingerprint", "llm_width", "encoder", "encoder_fingerprint", "encoder_dim", "prompt_width"}
_DECIDED |= {"prompt_digest", "template", "answers", "format_version"}
SETTABLE = tuple(f.name for f in dataclasses.fields(PlugConfig) if f.name not in _DECIDED)
"""Fields that a user may set."""

_KINDS = {
    f.name: {"str": str, "int": int, "bool": bool, "float": float}[str(f.type)]
    for f in dataclasses.fields(PlugConfig)
    if f.type in ("str", "int", "bool", "float")
}
