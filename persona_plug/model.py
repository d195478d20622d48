"""PlugModel: a frozen LLM, a frozen history encoder, and the user embedder between them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from persona_plug.config import PARTS, PlugConfig
from persona_plug.data.history import Example
from persona_plug.embedder.architectures import make_embedder
from persona_plug.embedder.batch import HistoryBatch, VectorTable
from persona_plug.embedder.contract import Embedded, Embedder
from persona_plug.embedder.strength import embed_by_strength
from persona_plug.errors import ConfigError
from persona_plug.generation import Generation, details, mark_texts, write_texts
from persona_plug.heads.answers import AnswersHead, combine, counted, judge
from persona_plug.heads.recollection import Recollection
from persona_plug.heads.states import StateMap
from persona_plug.heads.words import SIZE, WordsHead, WordsReader
from persona_plug.models.adapters import Adapters
from persona_plug.models.caching import uncached
from persona_plug.models.encoder import HistoryEncoder, RequestEncoder
from persona_plug.models.fingerprint import llm_fingerprint
from persona_plug.models.llm import Limits, embedding_norm, freeze, sample_embeddings
from persona_plug.pairing import History, Requests, candidates_of, nearest, pair
from persona_plug.splice.base import Splicer
from persona_plug.splice.families import end_with, splicer_for, splicer_of_copy
from persona_plug.splice.prompts import AnswerTree, Prompter, PromptParts, Turns, template_day
from persona_plug.splice.soft import Soft
from persona_plug.splice.states import StateCache
from persona_plug.store.batches import StoredExample, StoredTable

if TYPE_CHECKING:
    from persona_plug.store.history_store import HistoryStore

STATE_BUDGET = 4 << 30  # bytes of frozen states cached across epochs


class PlugModel(nn.Module):
    """What a plug does with its parts: embed, score, choose, generate.

    Only embedder, heads and adapters are registered submodules: the parameters of this module are what is trained and
    saved, and nothing that moves, saves or trains it can touch the LLM.

    Attributes:
        plain_splicer: The LLM as it is, around soft tokens.
        splicer: The LLM as this plug runs it: with its LoRA adapters where it has some, else `plain_splicer`.
    """

    def __init__(
        self,
        config: PlugConfig,
        llm: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        encoder: HistoryEncoder,
        seed: int = 0,
        state_budget: int = STATE_BUDGET,
    ) -> None:
        """Join the parts; `build` and `from_pretrained` are the usual ways here."""
        super().__init__()
        for name, part in {"tokenizer": tokenizer, "encoder": encoder}.items():
            object.__setattr__(self, name, part)  # past nn.Module, which would register them as what is trained
        self.splicer: Splicer = splicer_for(freeze(llm), StateCache(state_budget))
        self.plain_splicer = self.splicer
        self.seed = seed
        self.reset(config)

    tokenizer: Any
    encoder: HistoryEncoder
    embedder: Embedder

    @property
    def llm(self) -> Any:  # noqa: ANN401
        """The frozen LLM as this plug runs it."""
        return self.splicer.llm

    def reset(self, config: PlugConfig) -> None:
        """Start over with an untrained embedder and adapters for `config`, drawn from the plug's seed."""
        self.splicer, self.adapters = self.plain_splicer, None
        self.prompter = Prompter(self.tokenizer, config, bool(self.llm.config.is_encoder_decoder), Limits.of(self.llm))
        self.config = config = config.replace(prompt_digest=self.prompter.digest)
        end_with(self.llm, self.prompter.eos)
        start = sample_embeddings(self.llm, config.soft_tokens, self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            reader = RequestEncoder(self.encoder) if config.train_request and config.user_tokens else None
            embedder = make_embedder(config, embedding_norm(self.llm), start, reader)
            self.embedder = embedder.to(self.llm.device, torch.float32).eval()
            self.words = WordsHead(StateMap.of(self.llm, SIZE), config.encoder_dim) if config.remembers else None
        self.answers = AnswersHead.of(config, self.llm.device)
        self.splicer.begin_with(self.prompter.head)
        if config.lora > config.llm_width:
            raise ConfigError(f"lora={config.lora} is above the LLM's width {config.llm_width}; give a rank such as 8")
        if config.lora:
            self.adapters = Adapters(self.llm, config.lora, self.seed)
            self.splicer = splicer_of_copy(self.llm, self.adapters.llm)
            self.splicer.frozen = False  # no state that the adapters made outlives them
        self.recollection = None
        if self.words is not None:
            joined = (self.words, self.splicer, self.prompter, self.encoder)
            self.recollection = Recollection(*joined, self._nobodys_tokens, self.parts)

    def parts(self) -> dict[str, nn.Module]:
        """Return what is learned and saved: the embedder; the heads and the adapters where there are some."""
        heads: dict[str, nn.Module | None] = {"words.": self.words, "answers.": self.answers}
        parts = {"": self.embedder, **heads, "adapters.": self.adapters}
        return {name: part for name, part in parts.items() if part is not None}

    def _nobodys_tokens(self, requests: Sequence[str]) -> Soft:
        """Return the soft tokens of requests of a user nobody knows."""
        examples = [Example("", request, "") for request in requests]
        with uncached():
            return self.embed(self.table(examples).batch(examples)).soft

    def readers(self, examples: Sequence[Example]) -> list[WordsReader] | None:
        """Return what reads each example's words, or None where this plug remembers none."""
        return None if self.recollection is None else self.recollection.readers(examples)

    @classmethod
    def join(
        cls,
        config: PlugConfig,
        llm: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        encoder: HistoryEncoder,
        quantization: str | None = None,
        seed: int = 0,
        state_budget: int = STATE_BUDGET,
    ) -> Self:
        """Make an untrained plug from loaded parts, filling widths and fingerprints into the config."""
        config = config.replace(
            llm_width=int(llm.get_input_embeddings().weight.shape[1]),
            encoder_dim=encoder.dim,
            prompt_width=splicer_for(llm, StateCache(0)).summary_width,
            llm_fingerprint=llm_fingerprint(llm, quantization),
            encoder_fingerprint=encoder.fingerprint,
            template_day=config.template_day or template_day(tokenizer),
        )
        return cls(config, llm, tokenizer, encoder, seed, state_budget)

    def twin(
        self,
        config: PlugConfig | None = None,
        *,
        seed: int | None = None,
        share_states: bool = True,
    ) -> Self:
        """Return a second, untrained plug on the same frozen models.

        Args:
            config: Its config; default this plug's.
            seed: Seed of its untrained weights; default this plug's.
            share_states: Whether both use one cache of frozen states, where their prompts are split and begin alike.
        """
        twin = type(self)(
            config or self.config,
            self.plain_splicer.llm,
            self.tokenizer,
            self.encoder,
            self.seed if seed is None else seed,
            self.plain_splicer.cache.budget,
        )
        alike = twin.config.placement == self.config.placement and twin.prompter.head == self.prompter.head
        if share_states and alike:
            if twin.splicer is twin.plain_splicer:
                twin.splicer = self.plain_splicer
            twin.plain_splicer = self.plain_splicer
        return twin

    def keep_nothing(self) -> None:
        """Cache neither vectors of texts nor frozen states of prompts from now on, on disk and in memory.

        A cached vector would tell by its speed who else wrote the same text.
        """
        self.encoder.cache = None
        for splicer in (self.splicer, self.plain_splicer):
            splicer.keep_nothing()

    def forward(
        self,
        history: HistoryBatch | None,
        parts: Sequence[PromptParts],
        trees: Sequence[AnswerTree],
        readers: Sequence[WordsReader] | None = None,
        folds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the LLM on B prompts and score candidate answers.

        Args:
            history: The requests' vectors and histories; None for the plain LLM, without adapters.
            parts: The prompts.
            trees: The candidates of each.
            readers: What mixes each user's own words in; None for soft tokens alone.
            folds: (B,) which answers head judges each row in training, see `AnswersHead.forward`.

        Returns:
            Log-likelihoods (B, C) of candidates, (B,) of the gold's end token, and what the answers head adds, or None.
        """
        bias, states = judge(self.answers, self.plain_splicer, history, parts, folds)
        splicer = self.plain_splicer if history is None else self.splicer
        states = states if splicer is self.plain_splicer else None  # adapters make states of their own
        loglik, end = splicer.loglik(parts, self.embed(history, len(parts)).soft, trees, readers, states)
        return loglik, end, bias

    def embed(self, history: HistoryBatch | None, rows: int = 1) -> Embedded:
        """Return what the embedder makes of a batch; for None no soft tokens in any of the rows: the plain LLM."""
        if history is None:
            return Embedded(torch.zeros(rows, 0, self.config.llm_width, device=self.llm.device), None)
        return embed_by_strength(self.embedder, history.to(self.llm.device))

    def table(self, examples: Sequence[Example]) -> VectorTable | StoredTable:
        """Return what makes batches: all texts are encoded once, histories out of a store not at all."""
        kind = StoredTable if any(isinstance(e, StoredExample) for e in examples) else VectorTable
        return kind(self.encoder, examples, self.config)

    @torch.no_grad()
    def soft_prompt(
        self,
        input: str,
        history: History | None = None,
        *,
        user: str | None = None,
        store: HistoryStore | None = None,
    ) -> Tensor:
        """Return the soft tokens of one request, a dense finite float32 tensor (m + k, H) on the CPU."""
        batches = self._batches(pair(self.config, input, history, user, store), True, 1)
        return self.embed(next(batches)[1]).soft[0].float().cpu()

    @torch.no_grad()
    def score(
        self,
        inputs: Requests,
        candidates: Sequence[str] | None = None,
        history: History | Sequence[History] | None = None,
        *,
        user: str | Sequence[str] | None = None,
        store: HistoryStore | None = None,
        personal: bool = True,
        strength: float = 1.0,
        parts: Collection[str] = PARTS,
        batch_size: int = 16,
    ) -> Tensor:
        """Return log-scores (B, C) of candidate answers, float32 on the CPU.

        A score is the LLM's log-likelihood of the candidate behind the soft tokens; for the plug's own answer space it
        is weighted, and what the answers head says of request and user is added. All candidates of a request share one
        pass over its prompt. The end token counts where one candidate begins another, or where there is only one.

        Args:
            inputs: One request or B of them, or B examples with their histories.
            candidates: Answers to score; default the plug's own answer space.
            history: One history, or one for each request.
            user: In place of a history, the user in `store` whose history counts, or one user for each request.
            store: Where the users' histories are.
            personal: False for the plain LLM, without all that the plug adds.
            strength: See `generate`.
            parts: What of the plug counts, of `PARTS`: `soft` (the LLM behind the soft tokens), `answers` (the head).
            batch_size: Rows at a time.

        Raises:
            ConfigError: There are no candidates, or a part is not one that the plug has for them.
        """
        candidates, known = candidates_of(self.config, candidates), self.config.answers or ()
        examples, personal = pair(self.config, inputs, history, user, store, strength), personal and strength > 0
        tree = AnswerTree.build(self.prompter.candidates(candidates), self.prompter.eos)
        head = self.answers if all(c in known for c in candidates) else None
        soft, judged = counted(parts if personal else (), head)
        splicer = self.splicer if soft else self.plain_splicer

        def scores(batch: list[Example], history: HistoryBatch | None, prompts: list[PromptParts]) -> Tensor:
            self.prompter.check_trees(prompts, self.config.soft_tokens if soft else 0, [tree] * len(batch))
            bias, states = judge(head if judged else None, self.plain_splicer, history, prompts)
            if bias is not None and head is not None:
                bias = bias[:, [known.index(c) for c in candidates]]
                if not (soft and head.llm_share):
                    return bias
            states = states if splicer is self.plain_splicer else None
            readers, tokens = self.readers(batch) if soft else None, self.embed(history, len(batch)).soft
            return combine(head, splicer.loglik(prompts, tokens, [tree] * len(batch), readers, states)[0], bias)

        return torch.cat([scores(*b).float().cpu() for b in self._batches(examples, soft or judged, batch_size)])

    def choose(
        self,
        inputs: Requests,
        candidates: Sequence[str] | None = None,
        history: History | Sequence[History] | None = None,
        *,
        user: str | Sequence[str] | None = None,
        store: HistoryStore | None = None,
        strength: float = 1.0,
    ) -> tuple[list[str], Tensor]:
        """Return the most probable candidate of each request and calibrated probabilities (B, C)."""
        names = candidates_of(self.config, candidates)
        scores = self.score(inputs, names, history, user=user, store=store, strength=strength)
        probabilities = (scores / (self.embedder.score_temperature.cpu() if strength else 1)).softmax(-1)
        return [names[i] for i in probabilities.argmax(-1).tolist()], probabilities

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is itself a sequence of texts
        self, inputs: str, history: History | None = None, *, user: str | None = None,
        store: HistoryStore | None = None, personal: bool = True, strength: float = 1.0,
        return_details: Literal[False] = False, batch_size: int = 16, **generation: object,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is itself a sequence of texts
        self, inputs: str, history: History | None = None, *, user: str | None = None,
        store: HistoryStore | None = None, personal: bool = True, strength: float = 1.0,
        return_details: Literal[True], batch_size: int = 16, **generation: object,
    ) -> Generation: ...  # fmt: skip

    @overload
    def generate(
        self, inputs: Sequence[str] | Sequence[Example], history: History | Sequence[History] | None = None, *,
        user: str | Sequence[str] | None = None, store: HistoryStore | None = None, personal: bool = True,
        strength: float = 1.0, return_details: Literal[False] = False, batch_size: int = 16, **generation: object,
    ) -> list[str]: ...  # fmt: skip

    @overload
    def generate(
        self, inputs: Sequence[str] | Sequence[Example], history: History | Sequence[History] | None = None, *,
        user: str | Sequence[str] | None = None, store: HistoryStore | None = None, personal: bool = True,
        strength: float = 1.0, return_details: Literal[True], batch_size: int = 16, **generation: object,
    ) -> list[Generation]: ...  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        inputs: Requests,
        history: History | Sequence[History] | None = None,
        *,
        user: str | Sequence[str] | None = None,
        store: HistoryStore | None = None,
        personal: bool = True,
        strength: float = 1.0,
        return_details: bool = False,
        batch_size: int = 16,
        **generation: object,
    ) -> str | list[str] | Generation | list[Generation]:
        """Generate an answer to each request in its user's manner; with `config.answers` the most probable of these.

        Args:
            inputs: One request or a list of them, or of examples with their histories. A text gives a text, a list a
                list. With `num_return_sequences` above 1, a text gives a list, too.
            history: One history, or one for each request; a batch may mix users.
            user: In place of a history, the user in `store` whose history counts, or one user for each request.
            store: Where the users' histories are; an unknown user has none.
            personal: False for the plain LLM, without all that the plug adds.
            strength: How much the history counts: 1 as trained, less nearer to a user nobody knows, 0 is the plain LLM.
            return_details: Return `Generation` objects in place of texts: text, item weights, marks, what was cut.
            batch_size: Rows at a time.
            generation: Passed to the LLM's `generate`, where it writes: `max_new_tokens`, `num_beams`, `do_sample`,
                `temperature`, `streamer` (one request only). Greedy by default. A text that repeats a run
                of ten tokens or more ends there (`stop_loops=False` lets it go on).

        Raises:
            DataError: Inputs and histories differ in number, or an item is malformed.
        """
        examples, personal = pair(self.config, inputs, history, user, store, strength), personal and strength > 0
        splicer = self.splicer if personal else self.plain_splicer
        labels = iter(self.choose(examples)[0]) if personal and self.config.answers else None
        results: list[Generation] = []
        for batch, read, parts in self._batches(examples, personal, batch_size):
            embedded = self.embed(read, len(batch))
            soft, readers = embedded.soft, self.readers(batch) if personal and labels is None else None
            if labels is not None:
                written = [[next(labels)] for _ in batch]
            else:
                written = write_texts(splicer, self.prompter, parts, soft, readers, generation)
            marked = mark_texts(self.recollection if return_details else None, readers, parts, soft, written)
            results += details(self.config, marked, batch, parts, embedded)
        told = results if return_details else [result.text for result in results]
        return told[0] if isinstance(inputs, str) and len(results) == 1 else told

    def _batches(
        self, examples: Sequence[Example], personal: bool, size: int
    ) -> Iterator[tuple[list[Example], HistoryBatch | None, list[PromptParts]]]:
        """Yield (examples, their requests and histories, prompts) in order."""
        if size < 1:
            raise ConfigError(f"batch_size={size} must be at least 1")
        table = self.table(examples) if personal else None
        for start in range(0, len(examples), size):
            batch = list(examples[start : start + size])
            yield batch, table.batch(batch) if table else None, self.prompts(batch, personal)

    def prompts(self, examples: Sequence[Example], personal: bool = True) -> list[PromptParts]:
        """Return the prompts of examples, the users' turns in them where they are `personal`."""
        shown = self.turns(examples) if personal else [[]] * len(examples)
        return [self.prompter.parts(e.input, e.prompt, turns) for e, turns in zip(examples, shown, strict=True)]

    def turns(self, examples: Sequence[Example]) -> list[list[Turns]]:
        """Return the items of each user that stand in the prompt, the nearest to the request last."""
        count = self.config.retrieve
        return nearest(self.encoder, examples, count, self.config.max_history) if count else [[] for _ in examples]
