"""Which splicer an LLM gets: by its family where that is known, and always by a check on the very model.

A family in `TREES` reads trees of answers and keeps the states of prompts; `make test-families` has shown that of each,
with windows shorter than the prompts. Any other decoder-only LLM reads plain rows. Whichever it is, a few tokens run
through it when a plug is made, against one plain pass of the LLM: what differs is refused, by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_plug.errors import ConfigError
from persona_plug.models.llm import TOKENS
from persona_plug.splice.base import Splicer
from persona_plug.splice.causal import CausalSplicer
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.rows import RowSplicer
from persona_plug.splice.seq2seq import Seq2SeqSplicer
from persona_plug.splice.states import StateCache

TREES = frozenset(
    """
    afmoe apertus apertus1p5_text arcee aria_text beam biogpt bitnet codegen cohere cohere2 cohere2_moe cwm
    diffllama ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text
    glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa
    granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama mellum minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi
    phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2
    vaultgemma xglm
    """.split()  # noqa: SIM905 - a list would take a line for each name
)
"""Families (`config.model_type`) whose layers follow a mask of trees, positions that are given, and kept states."""

LOCAL_ENCODERS = {"bigbird_pegasus", "led", "longt5", "pegasus_x"}
"""Encoder-decoders whose encoder cuts a row into blocks, so that padding moves what a token sees."""

LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that a mask of trees is made for."""

# How far a score may be from the plain pass, as a share of the largest log-probability: the order of sums differs.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
LOW_PRECISION_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class _Way:
    """How an LLM is run: its splicer, and for encoder-decoders whether the encoder's rows may be padded."""

    kind: type[Splicer]
    pads: bool = True

    def splicer(self, llm: Any, cache: StateCache) -> Splicer:  # noqa: ANN401
        made = self.kind(llm, cache)
        if not self.pads:
            made.pads = False  # type: ignore[attr-defined]
        return made


_WAYS: weakref.WeakKeyDictionary[Any, _Way] = weakref.WeakKeyDictionary()


def splicer_for(llm: Any, cache: StateCache) -> Splicer:  # noqa: ANN401
    """Return the splicer for a frozen LLM, after a check of it; each LLM is checked once.

    Also takes the LLM's own habits of generation off it: greedy means greedy, and what a caller passes counts alone.

    Raises:
        ConfigError: No way of running this LLM around soft tokens gives what its plain pass gives.
    """
    if llm not in _WAYS:
        plain_generation(llm)
        _WAYS[llm] = _find_way(llm)
    return _WAYS[llm].splicer(llm, cache)


def splicer_of_copy(llm: Any, copy: Any) -> Splicer:  # noqa: ANN401
    """Return a splicer without a cache for a copy of an LLM that has one; what was checked is not checked again."""
    _WAYS[copy] = _WAYS[llm]
    return _WAYS[copy].splicer(copy, StateCache(0))


def plain_generation(llm: Any) -> None:  # noqa: ANN401
    """Leave of the LLM's generation settings its special tokens alone, those included that it is forced to write."""
    from transformers import GenerationConfig

    known = llm.generation_config
    llm.generation_config = GenerationConfig(
        **{name: getattr(known, name) for name in TOKENS if getattr(known, name, None) is not None}
    )


def end_with(llm: Any, token: int) -> None:  # noqa: ANN401
    """Let the LLM's generate end at a token, beside those where it ends by itself."""
    known = llm.generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or ())
    if token not in ends:
        llm.generation_config.eos_token_id = [*ends, token]


def ways(llm: Any) -> list[_Way]:  # noqa: ANN401
    """Return how an LLM may be run, the fastest first."""
    if llm.config.is_encoder_decoder:
        alone = _Way(Seq2SeqSplicer, pads=False)
        return [alone] if llm.config.model_type in LOCAL_ENCODERS else [_Way(Seq2SeqSplicer), alone]
    config = llm.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or LAYERS)
    quick = config.model_type in TREES and layers <= LAYERS and not getattr(config, "alibi", False)
    return [*([_Way(CausalSplicer)] if quick else []), _Way(RowSplicer)]


@torch.no_grad()
def _find_way(llm: Any) -> _Way:  # noqa: ANN401
    """Return the first way whose scores and first tokens are the LLM's own."""
    name = f"LLM {llm.config.name_or_path or type(llm).__name__} (family {llm.config.model_type})"
    training, reasons = llm.training, []
    llm.eval()
    try:
        probe = _Probe.of(llm)
        for way in ways(llm):
            try:
                reason = probe.differs(way.splicer(llm, StateCache(0)))
            except Exception as exc:  # a family's own code may raise anything
                reason = _raised(exc)
            if reason is None:
                return way
            reasons.append(reason)
    except Exception as exc:
        reasons.append(_raised(exc))
    finally:
        llm.train(training)
    parts = [key for key in ("vision_config", "audio_config") if getattr(llm.config, key, None) is not None]
    hint = "; it is multimodal" if parts else ""
    raise ConfigError(f"{name} cannot carry a plug: {reasons[-1]}{hint}; use a text LLM of docs/families.md")


def _raised(exc: Exception) -> str:
    if isinstance(exc, ConfigError):
        return str(exc)
    line = next(iter(str(exc).splitlines()), "")[:160]
    return f"it does not run on embeddings ({type(exc).__name__}: {line})"


@dataclass(frozen=True, slots=True)
class _Probe:
    """Two prompts of unlike length, two answers, and what the LLM's plain pass over ids says of them.

    Attributes:
        prompts: Token ids of each prompt.
        answers: Token ids of each answer, two each.
        scores: (2, 2) log-likelihoods of the answers behind the prompts.
        first: (2, V) log-probabilities of the first token behind each prompt.
        tolerance: What is taken as equal.
    """

    llm: Any
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    scores: Tensor
    first: Tensor
    tolerance: float

    @classmethod
    def of(cls, llm: Any) -> _Probe:  # noqa: ANN401
        """Draw tokens and run the plain passes.

        Raises:
            ConfigError: The LLM reads what stands behind the place that it predicts.
        """
        config = llm.config.get_text_config(decoder=True)
        rows = min(llm.get_input_embeddings().weight.shape[0], getattr(config, "vocab_size", None) or 1 << 60)
        special = {getattr(config, name, None) for name in TOKENS}
        draw = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
        ids = [i for i in draw[:64] if i not in special][:13]
        if len(ids) < 13:
            raise ConfigError(f"its vocabulary has {rows} tokens only")
        prompts, answers = (tuple(ids[:3]), tuple(ids[3:9])), (tuple(ids[9:11]), tuple(ids[11:13]))
        logps = [_plain(llm, prompt, answers) for prompt in prompts]
        alone = [_plain(llm, prompt, [answers[0][:1]])[0, 0] for prompt in prompts]
        scores = torch.stack([_sums(logp, answers) for logp in logps])
        share = TOLERANCE.get(llm.dtype, LOW_PRECISION_TOLERANCE)
        if getattr(llm, "is_quantized", False):
            share = LOW_PRECISION_TOLERANCE
        tolerance = share * max(1.0, float(scores.abs().max()))
        for logp, end in zip(logps, alone, strict=True):  # the place behind the prompt must not know what follows
            behind = float((logp[:, 0] - end).abs().max())
            if not behind <= tolerance:
                raise ConfigError(
                    f"its answers depend on tokens behind them (by {behind:.3g}), as an encoder's do, not a decoder's"
                )
        return cls(llm, prompts, answers, scores, torch.stack([logp[0, 0] for logp in logps]), tolerance)

    def differs(self, splicer: Splicer) -> str | None:
        """Return in which way a splicer's scores or texts are not the LLM's own, or None."""
        tree = AnswerTree.build(list(self.answers), eos=0)
        none = self.scores.new_zeros(2, 0, self.llm.get_input_embeddings().weight.shape[1])
        parts: list[PromptParts] = []
        known = isinstance(splicer, CausalSplicer)  # a family of `TREES`: what it keeps and pads is enough to look at
        for cut in (None,) if known else (0, None):  # everything behind the soft tokens, everything in front of them
            parts = [PromptParts(p[:cut], p[len(p[:cut]) :]) for p in self.prompts]
            scores = splicer.loglik(parts, none, [tree, tree])[0]
            gap = float((scores.float() - self.scores).abs().max())
            if not gap <= self.tolerance:  # NaN too
                return f"a score through the plug's path is {gap:.3g} away from its plain pass"
        return None if known else self._writes(splicer, parts, none)

    def _writes(self, splicer: Splicer, parts: Sequence[PromptParts], none: Tensor) -> str | None:
        """Compare the first two greedy tokens with the plain passes; one more is written, which may be a forced end."""
        start = len(getattr(splicer, "start", ()))
        new = 2 + max(1, start)  # a decoder's start token is not new, a token that is forced behind it is
        ends = self.llm.generation_config.eos_token_id
        known = {ends} if isinstance(ends, int) else set(ends or ())
        pad = self.llm.generation_config.pad_token_id
        for rows in splicer.together(parts, none):
            inputs = splicer.generation_inputs([parts[i] for i in rows], none[rows])
            out = self.llm.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=pad or 0)
            for i, row in zip(rows, out.tolist(), strict=True):
                first, second = row[start : start + 2] if len(row) > start + 1 else (row[start], None)
                gap = float(self.first[i].max() - self.first[i, first])
                if gap <= self.tolerance and first not in known and second is not None:
                    after = _plain(self.llm, self.prompts[i], ((first, 0),))[0, 1]
                    gap = float(after.max() - after[second])
                if not gap <= self.tolerance:
                    return f"it writes another text from embeddings than from ids (by {gap:.3g})"
        return None


def _plain(llm: Any, prompt: tuple[int, ...], answers: Sequence[tuple[int, ...]]) -> Tensor:  # noqa: ANN401
    """Return log-probabilities (answers, tokens, V) of one pass over ids, without cache, padding or mask."""
    device, count = llm.device, len(answers[0])
    if llm.config.is_encoder_decoder:
        start = Seq2SeqSplicer(llm, StateCache(0)).start
        decoder = torch.tensor([[*start, *a[:-1]] for a in answers], device=device)
        ids = torch.tensor([prompt] * len(answers), device=device)
        logits = llm(input_ids=ids, decoder_input_ids=decoder, use_cache=False).logits
    else:
        ids = torch.tensor([[*prompt, *a[:-1]] for a in answers], device=device)
        logits = llm(input_ids=ids, use_cache=False).logits
    return logits[:, -count:].float().log_softmax(-1)


def _sums(logp: Tensor, answers: Sequence[tuple[int, ...]]) -> Tensor:
    ids = torch.tensor([list(a) for a in answers], device=logp.device)
    return logp.gather(2, ids.unsqueeze(-1)).squeeze(-1).sum(1)
