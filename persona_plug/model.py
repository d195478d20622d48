"""PlugModel: a frozen LLM, a frozen history encoder, and the user embedder between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig
from persona_plug.data.history import Example, HistoryItem
from persona_plug.embedder.batch import HistoryBatch, VectorTable
from persona_plug.embedder.user_embedder import Embedded, UserEmbedder
from persona_plug.errors import ConfigError
from persona_plug.models.encoder import HistoryEncoder, RequestEncoder
from persona_plug.models.fingerprint import llm_fingerprint
from persona_plug.models.llm import Limits, embedding_norm, freeze, sample_embeddings
from persona_plug.pairing import History, Requests, pair
from persona_plug.splice.base import Splicer
from persona_plug.splice.families import end_with, splicer_for
from persona_plug.splice.prompts import AnswerTree, Prompter, PromptParts, template_day
from persona_plug.splice.states import StateCache
from persona_plug.store.batches import StoredExample, StoredTable

if TYPE_CHECKING:
    from persona_plug.store.history_store import HistoryStore

QUOTE_LEAD = '\nA similar one: "'  # where the task tokens in front of quoted ones start
STATE_BUDGET = 4 << 30  # bytes of frozen states kept across epochs


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text with what stood behind it.

    Attributes:
        text: The answer.
        weights: (item, weight) of the history items that were used, heaviest first.
        input_tokens_cut: Tokens of the request that did not fit `max_input_tokens`.
        items_dropped: History items beyond `max_history`.
        prompt_tokens: Positions of the LLM's input, soft tokens included.
        items_unquoted: Items out of a store without texts, which a plug that quotes could not quote.
    """

    text: str
    weights: list[tuple[HistoryItem, float]]
    input_tokens_cut: int
    items_dropped: int
    prompt_tokens: int
    items_unquoted: int = 0


class PlugModel(nn.Module):
    """What a plug does with its parts: embed, score, choose, generate.

    Only `embedder` is a registered submodule: the parameters of this module are what is trained and saved, and nothing
    that moves, saves or trains it can touch the LLM.
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
        parts: dict[str, Any] = {"llm": freeze(llm), "tokenizer": tokenizer, "encoder": encoder}
        for name, part in parts.items():
            object.__setattr__(self, name, part)  # past nn.Module: frozen parts are not registered
        self.splicer: Splicer = splicer_for(llm, StateCache(state_budget))
        self.seed = seed
        self.reset(config)

    llm: Any
    tokenizer: Any
    encoder: HistoryEncoder

    def reset(self, config: PlugConfig) -> None:
        """Start over with an untrained embedder for `config`, drawn from the plug's seed."""
        self.prompter = Prompter(self.tokenizer, config, bool(self.llm.config.is_encoder_decoder), Limits.of(self.llm))
        self.config = config = config.replace(prompt_digest=self.prompter.digest)
        end_with(self.llm, self.prompter.eos)
        start = sample_embeddings(self.llm, config.soft_tokens, self.seed)
        if config.quotes:
            lead = self.prompter.ids(QUOTE_LEAD)[-config.task_tokens :] if config.task_tokens else []
            start[config.task_tokens - len(lead) : config.task_tokens] = self.splicer.embed(lead).float().cpu()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            reader = RequestEncoder(self.encoder) if config.train_request and config.user_tokens else None
            made = UserEmbedder(config, embedding_norm(self.llm), start, reader)
            self.embedder = made.to(self.llm.device).eval()
        self.splicer.begin_with(self.prompter.head)

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
            llm_fingerprint=llm_fingerprint(llm, quantization),
            encoder_fingerprint=encoder.fingerprint,
            template_day=config.template_day or template_day(tokenizer),
        )
        return cls(config, llm, tokenizer, encoder, seed, state_budget)

    def forward(
        self, history: HistoryBatch, parts: Sequence[PromptParts], trees: Sequence[AnswerTree]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log-likelihoods (B, C) of candidates, (B,) of the gold's end token, and the answers' bias (B, C)."""
        embedded = self.embed(history)
        loglik, end = self.splicer.loglik(parts, embedded.soft, trees)
        return loglik, end, embedded.bias

    def embed(self, history: HistoryBatch) -> Embedded:
        """Return what the embedder says of a batch."""
        vocabulary = self.llm.get_input_embeddings().weight if self.config.quotes else None
        return self.embedder(history.to(self.llm.device), vocabulary)

    def table(self, examples: Sequence[Example]) -> VectorTable:
        """Return what makes batches: all texts are encoded once, histories out of a store not at all."""
        kind = StoredTable if any(isinstance(e, StoredExample) for e in examples) else VectorTable
        return kind(self.encoder, examples, self.config, self.prompter.ids_of_many)

    # -- use -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def soft_prompt(
        self,
        input: str,
        history: History | None = None,
        *,
        user: str | None = None,
        store: HistoryStore | None = None,
    ) -> Tensor:
        """Return the soft tokens of one request, a dense finite float32 tensor (m + T + k, H) on the CPU."""
        examples = self._examples(input, history, user, store)
        return next(self._batches(examples, True, 1))[1].soft[0].float().cpu()

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
        head: bool = True,
        batch_size: int = 16,
    ) -> Tensor:
        """Return log-scores (B, C) of candidate answers, float32 on the CPU.

        A score is the LLM's log-likelihood of the candidate behind the soft tokens; for the plug's own answer space it
        is weighted, and what request and answer frequencies say without the LLM is added (`head=False` leaves the
        log-likelihood alone). All candidates of a request share one pass over its prompt. The end token counts where
        one candidate begins another, or where there is only one.

        Args:
            inputs: One request or B of them, or B examples with their histories.
            candidates: Answers to score; default the plug's own answer space.
            history: One history, or one for each request.
            user: In place of a history, the user in `store` whose history counts, or one user for each request.
            store: Where the users' histories are.
            personal: False for the plain LLM, without soft tokens.
            head: Whether the answer head counts beside the LLM.
            batch_size: Rows at a time.

        Raises:
            ConfigError: There are no candidates.
        """
        known = self.config.answers or ()
        candidates = candidates or known
        if isinstance(candidates, str):
            raise ConfigError(f"candidates must be a list of texts, not the text {candidates!r:.60}")
        if not candidates:
            raise ConfigError("no candidates to score: pass candidates=[...] or fit the plug on a labelling task")
        ids = self.prompter.candidates(candidates)
        tree = AnswerTree.build(ids, self.prompter.eos)
        examples = self._examples(inputs, history, user, store)
        rows = []
        columns = [known.index(c) for c in candidates] if all(c in known for c in candidates) else []
        for batch, embedded, parts in self._batches(examples, personal, batch_size):
            scores = self.splicer.loglik(parts, embedded.soft, [tree] * len(batch))[0]
            if head and columns and embedded.bias is not None:
                scores = self.embedder.combine(scores, embedded.bias[:, columns])
            rows.append(scores.float().cpu())
        return torch.cat(rows)

    def choose(
        self,
        inputs: Requests,
        candidates: Sequence[str] | None = None,
        history: History | Sequence[History] | None = None,
        *,
        user: str | Sequence[str] | None = None,
        store: HistoryStore | None = None,
    ) -> tuple[list[str], Tensor]:
        """Return the most probable candidate of each request and calibrated probabilities (B, C)."""
        names = list(candidates or self.config.answers or ())
        scores = self.score(inputs, names or None, history, user=user, store=store)
        probabilities = (scores / self.embedder.score_temperature.cpu()).softmax(-1)
        return [names[i] for i in probabilities.argmax(-1).tolist()], probabilities

    @torch.no_grad()
    def generate(
        self,
        inputs: Requests,
        history: History | Sequence[History] | None = None,
        *,
        user: str | Sequence[str] | None = None,
        store: HistoryStore | None = None,
        personal: bool = True,
        return_details: bool = False,
        batch_size: int = 16,
        **generation: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Generate an answer to each request in its user's manner.

        Args:
            inputs: One request or a list of them, or of examples with their histories; a text gives a text.
            history: One history, or one for each request; a batch may mix users.
            user: In place of a history, the user in `store` whose history counts, or one user for each request.
            store: Where the users' histories are; an unknown user has none.
            personal: False for the plain LLM, without soft tokens.
            return_details: Return `Generation` objects: text, item weights, what was cut.
            batch_size: Rows at a time.
            generation: Passed to the LLM's `generate`: `max_new_tokens`, `num_beams`, `do_sample`, `temperature`,
                `streamer` (one request only). Greedy unless told otherwise.

        Raises:
            DataError: Inputs and histories differ in number, or an item is malformed.
        """
        examples = self._examples(inputs, history, user, store)
        options = {"max_new_tokens": self.config.max_answer_tokens, "do_sample": False, **generation}
        if options.get("stop_strings"):
            options["tokenizer"] = self.tokenizer
        if not options["do_sample"]:
            options |= {"temperature": None, "top_p": None, "top_k": None}
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.prompter.eos
        results: list[Generation] = []
        for batch, embedded, parts in self._batches(examples, personal, batch_size):
            answers: dict[int, list[str]] = {}
            for rows in self.splicer.together(parts, embedded.soft):
                inputs_for_llm = self.splicer.generation_inputs(
                    [parts[i] for i in rows], [embedded.soft[i] for i in rows]
                )
                out = self.llm.generate(**inputs_for_llm, pad_token_id=pad, **options)
                ids = out if isinstance(out, Tensor) else out.sequences  # return_dict_in_generate
                written = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                share = len(written) // len(rows)  # num_return_sequences
                answers |= {i: written[at * share : (at + 1) * share] for at, i in enumerate(rows)}
            for i, example in enumerate(batch):
                weights = None if embedded.weights is None else embedded.weights[i]
                for text in answers[i]:
                    results.append(self._details(text.strip(), example, parts[i], len(embedded.soft[i]), weights))
        if return_details:
            return results[0] if isinstance(inputs, str) and len(results) == 1 else results
        texts = [r.text for r in results]
        return texts[0] if isinstance(inputs, str) and len(texts) == 1 else texts

    def _details(
        self, text: str, example: Example, parts: PromptParts, soft: int, weights: Tensor | None
    ) -> Generation:
        used: Sequence[HistoryItem] = example.history[-self.config.max_history :]
        held, unquoted = len(example.history), 0
        if isinstance(example, StoredExample):
            used, held = example.stored.items, example.stored.total
            unquoted = len(used) if self.config.quotes and example.stored.texts is None else 0
        pairs = [] if weights is None else list(zip(used, weights[: len(used)].tolist(), strict=True))
        pairs.sort(key=lambda pair: -pair[1])
        tokens = len(parts.left) + soft + len(parts.right)
        return Generation(text, pairs, parts.cut, held - len(used), tokens, unquoted)

    def _batches(self, examples: Sequence[Example], personal: bool, size: int) -> Any:  # noqa: ANN401
        """Yield (examples, what the embedder says, prompt parts) in order."""
        table = self.table(examples) if personal else None
        for start in range(0, len(examples), size):
            batch = list(examples[start : start + size])
            parts = [self.prompter.parts(e.input, e.prompt) for e in batch]
            embedded = self.embed(table.batch(batch)) if table else self.plain(len(batch))
            yield batch, embedded, parts

    def plain(self, rows: int) -> Embedded:
        """Return no soft tokens at all for B rows: the plain LLM."""
        return Embedded(torch.zeros(rows, 0, self.config.llm_width, device=self.llm.device), None, None)

    def _examples(self, inputs: Requests, *histories: Any) -> Sequence[Example]:  # noqa: ANN401
        return pair(self.config, inputs, *histories)
