"""What generation is asked for, and what it gives."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from persona_plug.config import PlugConfig
from persona_plug.data.history import Example, HistoryItem
from persona_plug.embedder.contract import Embedded
from persona_plug.errors import ConfigError, first_line, nearest
from persona_plug.heads.processor import WordsProcessor
from persona_plug.heads.recollection import Recollection, Span
from persona_plug.heads.words import WordsReader
from persona_plug.splice.base import Splicer
from persona_plug.splice.prompts import Prompter, PromptParts
from persona_plug.splice.soft import Soft
from persona_plug.store.batches import StoredExample

COUNTS = ("max_new_tokens", "num_beams", "num_return_sequences")
LOOP_TOKENS = 10  # of a run, at least
LOOP_TIMES = 2
OWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache",
       "encoder_outputs", "decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "labels",
       "logits_to_keep", "assistant_model", "assistant_tokenizer", "negative_prompt_ids",
       "negative_prompt_attention_mask", "synced_gpus", "custom_generate", "trust_remote_code")  # fmt: skip
"""Options of `generate` that say what the LLM reads or runs: the plug says that alone."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A generated text with what it was made from.

    Attributes:
        text: The answer.
        weights: (item, weight) of the history items that were used, largest weight first.
        input_tokens_cut: Tokens of the request that did not fit `max_input_tokens`.
        items_dropped: History items beyond `max_history`.
        prompt_tokens: Positions of the LLM's input, soft tokens included.
        marks: (start, end) characters of the text that the user's words memory brought: it gave more than half of
            these tokens' probability, slots that are filled from the request included.
    """

    text: str
    weights: list[tuple[HistoryItem, float]]
    input_tokens_cut: int
    items_dropped: int
    prompt_tokens: int
    marks: Sequence[Span] = ()


def greedy(options: Mapping[str, object]) -> dict[str, object]:
    """Return options of the LLM's `generate` that are greedy unless they sample; a count of None is its default.

    An option of `OWN` that is None is none.
    """
    options = {"do_sample": False, **{k: v for k, v in options.items() if k not in (*COUNTS, *OWN) or v is not None}}
    return options if options["do_sample"] else {**options, "temperature": None, "top_p": None, "top_k": None}


Written = TypeVar("Written", list[int], str)


def end_runs(written: Written) -> Iterator[Written]:
    """Yield the runs of at least `LOOP_TOKENS` tokens or characters that end a text `LOOP_TIMES` times in a row."""
    for size in range(LOOP_TOKENS, len(written) // LOOP_TIMES + 1):
        if written[-size - 1] != written[-1]:  # most sizes end here, before anything is copied
            continue
        run = written[-size:]
        if all(written[-(i + 1) * size : -i * size] == run for i in range(1, LOOP_TIMES)):
            yield run


def is_loop(written: list[int]) -> bool:
    """Return whether tokens end with the same run of at least `LOOP_TOKENS`, `LOOP_TIMES` times in a row."""
    return next(end_runs(written), None) is not None


def without_loop(written: Written) -> Written:
    """Return what is written with the run that it ends with once."""
    run = next(end_runs(written), None)
    return written if run is None else written[: len(written) - (LOOP_TIMES - 1) * len(run)]


def is_text_loop(text: str, tokenizer: Any) -> bool:  # noqa: ANN401
    """Return what `is_loop` does, where the text alone is known."""
    return any(len(tokenizer(run, add_special_tokens=False)["input_ids"]) >= LOOP_TOKENS for run in end_runs(text))


class LoopStop(StoppingCriteria):
    """Ends each row of a batch that repeats itself."""

    def __init__(self, start: int) -> None:
        """Take how many tokens stand in front of every answer in the ids that `generate` hands on."""
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Return (rows,) which rows end."""
        return torch.tensor([is_loop(ids[self.start :].tolist()) for ids in input_ids], device=input_ids.device)


@contextmanager
def _named_options(options: Mapping[str, object]) -> Iterator[None]:
    """Turn what `generate` of transformers says of its options into one line.

    Raises:
        ConfigError: An option is unknown or out of range, or the LLM cannot generate so.
    """
    for name in OWN:
        if options.get(name) is not None:
            raise ConfigError(f"{name} is no option here: the plug says itself what the LLM reads; leave it out")
    for name in COUNTS:
        value = options.get(name, 1)
        if not isinstance(value, int | None) or (value is not None and value < 1):
            raise ConfigError(f"{name}={value!r} must be a whole number from 1 up")
    try:
        yield
    except (ValueError, TypeError, ZeroDivisionError) as exc:
        unknown = re.search(r"`model_kwargs` are not used by the model: \['(\w+)'", str(exc))
        if unknown is None:
            raise ConfigError(f"the LLM cannot generate with these options: {first_line(exc)}") from exc
        from transformers import GenerationConfig

        hint = nearest(unknown[1], GenerationConfig().to_dict(), "; ")
        raise ConfigError(f"generate knows no option {unknown[1]!r}{hint}") from exc


def with_words(options: Mapping[str, object], readers: Sequence[WordsReader] | None, start: int) -> dict[str, object]:
    """Return options with the users' words mixed in, in front of the caller's own logits processors.

    Args:
        options: Of the LLM's `generate`.
        readers: One per row of the batch, or None.
        start: Tokens that stand in front of every answer in the ids that `generate` hands on.
    """
    if readers is None:
        return dict(options)
    others = options.get("logits_processor") or []
    return {**options, "logits_processor": [WordsProcessor(readers, start), *others]}  # type: ignore[misc]


def write_texts(
    splicer: Splicer,
    prompter: Prompter,
    parts: Sequence[PromptParts],
    soft: Soft,
    readers: Sequence[WordsReader] | None,
    generation: Mapping[str, object],
) -> list[list[str]]:
    """Return the stripped texts of each of B rows, several where `num_return_sequences` asks for them.

    Args:
        splicer: The LLM around soft tokens.
        prompter: Its prompts, tokenizer and usual length of an answer.
        parts: B prompts.
        soft: Their soft tokens.
        readers: What reads each user's words, or None.
        generation: Options of the LLM's `generate`, and `stop_loops`: whether a text ends that repeats itself, with
            what it repeats once. Default True without beams.

    Raises:
        ConfigError: An option is unknown or out of range, or the LLM cannot generate so.
    """
    tokenizer = prompter.tokenizer
    options = {"max_new_tokens": prompter.config.max_answer_tokens, **greedy(generation)}
    stop_loops = options.pop("stop_loops", None)
    if not isinstance(stop_loops, bool | None):
        raise ConfigError(f"stop_loops={stop_loops!r:.40} must be True or False")
    beams = options.get("num_beams", 1) != 1  # a beam that repeats itself loses to the others, or it is the best
    if beams and stop_loops:
        raise ConfigError("stop_loops=True does not go with num_beams: leave one of them out")
    stop_loops = not beams if stop_loops is None else stop_loops
    if stop_loops:
        others: Any = options.get("stopping_criteria") or []
        options["stopping_criteria"] = StoppingCriteriaList([*others, LoopStop(len(splicer.start))])
    options["pad_token_id"] = prompter.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if options.get("stop_strings"):
        options["tokenizer"] = tokenizer
    if isinstance(longest := options["max_new_tokens"], int):
        prompter.check_answer(max(len(part) + len(row) for part, row in zip(parts, soft, strict=True)), longest - 1)
    texts: dict[int, list[str]] = {}
    for rows in splicer.together(parts, soft):
        inputs = splicer.generation_inputs([parts[i] for i in rows], [soft[i] for i in rows])
        own = None if readers is None else [readers[i] for i in rows]
        with _named_options(options):
            out = splicer.llm.generate(**inputs, **with_words(options, own, len(splicer.start)))
        ids = (out if isinstance(out, Tensor) else out.sequences).tolist()  # return_dict_in_generate
        if stop_loops:
            ends = {options["pad_token_id"], prompter.eos}
            ids = [without_loop(_before(row, ends)) for row in ids]
        written = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        share = len(written) // len(rows)
        texts |= {i: written[at * share : (at + 1) * share] for at, i in enumerate(rows)}
    return [texts[i] for i in range(len(parts))]


def _before(row: list[int], ends: Collection[int]) -> list[int]:
    """Return a row without the tokens that fill its end."""
    size = len(row)
    while size and row[size - 1] in ends:
        size -= 1
    return row[:size]


def mark_texts(
    recollection: Recollection | None,
    readers: Sequence[WordsReader] | None,
    parts: Sequence[PromptParts],
    soft: Soft,
    written: Sequence[Sequence[str]],
) -> list[list[tuple[str, list[Span]]]]:
    """Return each row's texts with their marks, which are none without readers and a recollection.

    Args:
        recollection: What knows the users' words, or None.
        readers: One per row, or None.
        parts: The rows' prompts.
        soft: Their soft tokens.
        written: Their texts.
    """
    if recollection is None or readers is None:
        return [[(text, []) for text in texts] for texts in written]
    rows = [i for i, texts in enumerate(written) for _ in texts]
    flat = [text for texts in written for text in texts]
    marks = recollection.marks([readers[i] for i in rows], [parts[i] for i in rows], [soft[i] for i in rows], flat)
    pairs = iter(zip(flat, marks, strict=True))
    return [[next(pairs) for _ in texts] for texts in written]


def check_wordless(config: PlugConfig, what: str) -> None:
    """Refuse what would leave a plug's words memory out.

    Raises:
        ConfigError: The plug has one; the message names `what`, which cannot read it.
    """
    if config.remembers:
        raise ConfigError(f"{what} cannot read this plug's words memory; use generate, or a plug with words=False")


def details(
    config: PlugConfig,
    marked: Sequence[Sequence[tuple[str, Sequence[Span]]]],
    examples: Sequence[Example],
    parts: Sequence[PromptParts],
    embedded: Embedded,
) -> list[Generation]:
    """Return generated texts with what they were made from.

    Args:
        config: The plug's.
        marked: Each row's texts with their marks.
        examples: The rows' requests with their histories.
        parts: Their prompts.
        embedded: Their soft tokens and the weights of their histories' items.
    """
    results = []
    for i, example in enumerate(examples):
        weights = None if embedded.weights is None else embedded.weights[i]
        tokens = len(parts[i]) + len(embedded.soft[i])
        results += [_details(config, *one, example, parts[i].cut, tokens, weights) for one in marked[i]]
    return results


def _details(
    config: PlugConfig,
    text: str,
    marks: Sequence[Span],
    example: Example,
    cut: int,
    tokens: int,
    weights: Tensor | None,
) -> Generation:
    used: Sequence[HistoryItem] = example.history[-config.max_history :]
    total = len(example.history)
    if isinstance(example, StoredExample):
        used, total = example.stored.items, example.stored.total
    pairs = [] if weights is None else list(zip(used, weights[: len(used)].tolist(), strict=True))
    pairs.sort(key=lambda pair: -pair[1])
    return Generation(text, pairs, cut, total - len(used), tokens, marks)
