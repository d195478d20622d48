"""The methods a comparison can name: what each changes about the plain LLM.

Soft tokens and adapters come from a training recipe, text from the history comes into the prompt, and controls give a
trained plug another history than the user's. A new method is a line here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from persona_plug.config import PARTS
from persona_plug.errors import ConfigError, nearest
from persona_plug.retrieval import METHODS as RANKINGS

TURNS = "turns"
PROMPTS = (*RANKINGS, "graph", "summary", "profile", TURNS)
HISTORIES = ("own", "other", "none")


@dataclass(frozen=True, slots=True)
class Method:
    """A method.

    Attributes:
        recipe: What is trained, a name in `training.recipes`; None for nothing.
        prompt: How the history enters the prompt: a ranking of `persona_plug.retrieval`, `graph` (with items of similar
            users), `summary` (a text the LLM wrote, beside the nearest items), `profile` (the answers' counts in
            words) or `turns` (the nearest items as chat turns); None for not at all.
        items: History items in the prompt at most.
        history: Whose history soft tokens and prompt see at the time of the question: `own`, `other`, `none`.
        user_adapter: Whether the adapters are trained further on each user's history.
        train_prompt: Whether training sees the same kind of prompt.
        parts: What of a plug counts for labels, see `PlugModel.score`.
        llm: Whether the LLM is asked; what does without it is a family of its own, reported row by row.
    """

    recipe: str | None = None
    prompt: str | None = None
    items: int = 4
    history: str = "own"
    user_adapter: bool = False
    train_prompt: bool = True
    parts: tuple[str, ...] = PARTS
    llm: bool = True

    def __post_init__(self) -> None:
        """Refuse a choice that does not exist."""
        for name, value, values in (("prompt", self.prompt, (None, *PROMPTS)), ("history", self.history, HISTORIES)):
            if value not in values:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, values))}")

    @property
    def training(self) -> str:
        """What is trained for the method, "" for nothing; methods that share it share its name."""
        prompt = f"+{self.prompt}-{self.items}" if self.prompt and self.train_prompt else ""
        return self.recipe + prompt if self.recipe else ""

    @property
    def personal(self) -> bool:
        """Whether a plug adds something to the LLM's input, scores or text."""
        return self.recipe is not None or self.prompt == TURNS

    @property
    def repeats(self) -> str:
        """Why the method gives for free text just what another one gives; "" if it does not."""
        if self.parts != PARTS:
            return "it is the plug itself, which has no answers head"
        return "it is summary, as there are no labels to count" if self.prompt == "profile" else ""


PRIOR = "user_prior"
METHODS: dict[str, Method] = {
    "none": Method(),
    "task_prompt": Method("task_prompt"),
    "prefix_tuning": Method("prefix_tuning"),
    "plug": Method("plug"),
    "plug_llm_alone": Method("plug", parts=("soft",)),
    "plug_head_alone": Method("plug", parts=("answers",)),
    "plug_paper": Method("plug_paper"),
    "plug_paper_full": Method("plug_paper_full"),
    "plug_mean": Method("plug_mean"),
    "uem": Method("uem"),
    "persoma": Method("persoma"),
    "persoma_mlp": Method("persoma_mlp"),
    "persoma_transformer": Method("persoma_transformer"),
    "persoma_lora": Method("persoma_lora"),
    "random": Method(prompt="random"),
    "recency": Method(prompt="recency"),
    "bm25": Method(prompt="bm25"),
    "dense": Method(prompt="dense"),
    "rrf": Method(prompt="rrf"),
    "graph_rag": Method(prompt="graph"),
    "summary": Method(prompt="summary", items=2),
    "summary_profile": Method(prompt="profile", items=2),
    TURNS: Method(prompt=TURNS),
    "plug_rag": Method("plug", prompt="bm25"),
    "lora": Method("lora"),
    "lora_rag": Method("lora", prompt="bm25"),
    "lora_turns": Method("lora_turns"),
    "lora_user": Method("lora", user_adapter=True),
    "plug_lora": Method("plug_lora"),
    "words": Method("words"),
    "words_lora": Method("words_lora"),
    "words_lora_turns": Method("words_lora_turns"),
    PRIOR: Method(llm=False),
}
READ_WITH = {
    "plug": ("plug_shuffled", "plug_empty"),
    "lora_user": ("lora_user_shuffled",),
    "plug_lora": ("plug_lora_shuffled",),
    TURNS: ("turns_shuffled",),
    "words": ("words_shuffled", "words_empty"),
    "words_lora": ("words_lora_shuffled",),
}
CONTROLS = {"_shuffled": "other", "_empty": "none"}  # whose history a method is shown, by its name's end
# Every method, followed by those of its controls that its row is read with.
ALL = tuple(name for stem in METHODS for name in (stem, *READ_WITH.get(stem, ())))


def find_method(name: str) -> Method:
    """Return a method by name; `bm25-8` is `bm25` with 8 items, `plug_shuffled` is `plug` with another user's history.

    Raises:
        ConfigError: There is no such method.
    """
    stem, _, count = name.rpartition("-")
    if name in METHODS:
        return METHODS[name]
    if stem in METHODS and METHODS[stem].prompt and count.isdigit() and int(count) > 0:
        return dataclasses.replace(METHODS[stem], items=int(count))
    for ending, history in CONTROLS.items():
        basis = METHODS.get(name.removesuffix(ending))
        if basis and basis.personal:
            return dataclasses.replace(basis, history=history)
    hint = nearest(name, METHODS) or ";"
    raise ConfigError(
        f"no method {name!r}{hint} known are {', '.join(METHODS)}; NAME-K puts K items into the prompt, "
        "NAME_shuffled and NAME_empty ask turns or a trained one with another user's history, or none"
    )


def by_training(names: Sequence[str]) -> list[str]:
    """Return method names so that those that share a training stand together."""
    trainings = [find_method(name).training for name in names]
    return sorted(names, key=lambda name: trainings.index(find_method(name).training))
