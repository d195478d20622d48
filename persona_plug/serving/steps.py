"""One token for each running call: in passes that calls of like length share, or each by the LLM's own `generate`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from persona_plug.serving.calls import Job
from persona_plug.splice.base import Splicer
from persona_plug.splice.causal import CausalSplicer
from persona_plug.splice.passes import last

CHUNK = 128  # tokens of a prompt that are read before others get their tokens
NEAR = 64  # tokens by which calls that share a pass may always differ
# What generation configs may ask for and passes of our own do not do, with the values that ask for nothing.
UNUSUAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "repetition_penalty": (None, 1.0),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "watermarking_config": (None,),
}


class Steps(Protocol):
    """Gives running calls their next tokens."""

    def step(self, jobs: Sequence[Job]) -> None:
        """Go on with these calls, and drop what is held for others."""


class Group:
    """Calls that share a pass: their keys and values, padded in front.

    Attributes:
        jobs: The calls.
        lengths: Positions of each so far.
        layers: (keys, values) of each layer, (B, heads, L, head_dim).
    """

    def __init__(self, jobs: list[Job], lengths: list[int], layers: list[tuple[Tensor, Tensor]]) -> None:
        """Take calls whose prompts have been read."""
        self.jobs, self.lengths, self.layers = jobs, lengths, layers

    @property
    def width(self) -> int:
        """L, the length of the longest."""
        return max(self.lengths)

    def takes(self, length: int) -> bool:
        """Whether a call of a length may join: padding must not cost more than a pass of its own."""
        longest, shortest = max(length, *self.lengths), min(length, *self.lengths)
        return longest <= 2 * shortest or longest - shortest <= NEAR

    def join(self, other: Group) -> None:
        """Take another group in."""
        width = max(self.width, other.width)
        self.layers = [
            (torch.cat([_front(a, width), _front(c, width)]), torch.cat([_front(b, width), _front(d, width)]))
            for (a, b), (c, d) in zip(self.layers, other.layers, strict=True)
        ]
        self.jobs, self.lengths = [*self.jobs, *other.jobs], [*self.lengths, *other.lengths]

    def leave(self) -> None:
        """Drop the calls that are done, and the padding that only they needed."""
        rows = [i for i, job in enumerate(self.jobs) if not job.done]
        if len(rows) == len(self.jobs):
            return
        self.jobs, self.lengths = [self.jobs[i] for i in rows], [self.lengths[i] for i in rows]
        width = max(self.lengths, default=0)
        index = torch.tensor(rows, dtype=torch.long, device=self.layers[0][0].device)
        self.layers = [(k[index][..., -width:, :], v[index][..., -width:, :]) for k, v in self.layers]


def _front(states: Tensor, width: int) -> Tensor:
    return pad(states, (0, 0, width - states.shape[-2], 0))


def _states(cache: Any) -> list[tuple[Tensor, Tensor]]:  # noqa: ANN401
    return [(layer.keys, layer.values) for layer in cache.layers]


class BatchedSteps:
    """Passes of our own, for decoder-only LLMs whose rows may be padded in front."""

    def __init__(self, splicer: CausalSplicer, chunk: int = CHUNK) -> None:
        """Take an LLM; `chunk` tokens of a prompt are read at a time."""
        self.splicer, self.llm, self.chunk = splicer, splicer.llm, chunk
        self.reading: dict[Job, tuple[Tensor, Any]] = {}  # what is left of a prompt, and the cache of what is read
        self.groups: list[Group] = []
        self.turn = 0

    @torch.no_grad()
    def step(self, jobs: Sequence[Job]) -> None:
        """See `Steps.step`; one part of one prompt is read, and every call behind its prompt gets a token."""
        running = set(jobs)
        self.reading = {job: state for job, state in self.reading.items() if job in running}
        grouped = set()
        for group in self.groups:
            group.leave()
            grouped |= set(group.jobs)
        self.groups = [group for group in self.groups if group.jobs]
        for job in jobs:
            if job not in self.reading and job not in grouped:
                self._guard([job], lambda job=job: self._begin(job))
        groups = list(self.groups)  # who joins now has just got a token
        if self.reading:
            self.turn += 1
            # The shortest first; by turns the one that has waited longest, so that it comes to an end.
            nearest = min(self.reading, key=lambda job: self.reading[job][0].shape[1])
            job = nearest if self.turn % 2 else next(iter(self.reading))
            self._guard([job], lambda: self._read(job))
        for group in groups:
            self._guard(group.jobs, lambda group=group: self._token(group))

    def _guard(self, jobs: list[Job], work: Any) -> None:  # noqa: ANN401
        """Run something for calls. Where it fails for several, each is begun again alone, to find whose fault it is."""
        try:
            work()
        except Exception as exc:
            self.groups = [group for group in self.groups if group.jobs is not jobs]
            for job in jobs:
                self.reading.pop(job, None)
            if len(jobs) == 1:
                jobs[0].fail(exc)
                return
            for job in jobs:
                self._guard([job], lambda job=job: self._begin(job))

    def _begin(self, job: Job) -> None:
        """Prepare a call's prompt, with the tokens that are written already."""
        from transformers import DynamicCache

        soft = [job.call.soft.to(self.llm.device)]
        embeds = self.splicer.generation_inputs([job.call.parts], soft)["inputs_embeds"]
        if job.written:
            embeds = torch.cat([embeds, self.splicer.embed(job.written).to(embeds.dtype).unsqueeze(0)], 1)
        # Without the config: a cache of sliding layers would drop what rows of other lengths still see.
        self.reading[job] = (embeds, DynamicCache())

    def _read(self, job: Job) -> None:
        """Read the next part of a prompt; behind its last one the call gets its first token, and joins the others."""
        embeds, cache = self.reading[job]
        past = cache.get_seq_length()
        part = embeds[:, : self.chunk]
        mask = torch.ones(1, past + part.shape[1], dtype=torch.long, device=part.device)
        positions = torch.arange(past, past + part.shape[1], device=part.device).unsqueeze(0)
        logits = self._pass({"inputs_embeds": part}, mask, positions, cache)
        if part.shape[1] < embeds.shape[1]:
            self.reading[job] = (embeds[:, self.chunk :], cache)
            return
        del self.reading[job]
        job.take(logits[0])
        if not job.done:
            self._place(Group([job], [past + part.shape[1]], _states(cache)))

    def _place(self, group: Group) -> None:
        fits = [g for g in self.groups if g.takes(group.width) and not group.jobs[0].written[1:]]
        if fits:
            min(fits, key=lambda g: abs(g.width - group.width)).join(group)
        else:
            self.groups.append(group)

    def _token(self, group: Group) -> None:
        """Give each call of a group its next token."""
        from transformers import DynamicCache

        device, width = self.llm.device, group.width
        ids = torch.tensor([[job.written[-1]] for job in group.jobs], device=device)
        lengths = torch.tensor(group.lengths, device=device).unsqueeze(1)
        columns = torch.arange(width + 1, device=device).unsqueeze(0)
        mask = (columns >= width - lengths).long()
        cache = DynamicCache(group.layers)
        logits = self._pass({"input_ids": ids}, mask, lengths, cache)
        group.layers = _states(cache)
        group.lengths = [length + 1 for length in group.lengths]
        for job, row in zip(group.jobs, logits, strict=True):
            if not job.done:
                job.take(row)

    def _pass(self, inputs: dict[str, Tensor], mask: Tensor, positions: Tensor, cache: Any) -> Tensor:  # noqa: ANN401
        """Return the logits (B, V) behind the last position."""
        argument = self.splicer.cache_argument
        out = self.llm(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=last(1, next(iter(inputs.values()))),
            **{argument: cache},
        )
        logits: Tensor = out.logits[:, -1]
        return logits


class SingleSteps:
    """The LLM's own `generate`, a thread for each call; they take turns at every token. For all other LLMs."""

    def __init__(self, splicer: Splicer, pad_token: int) -> None:
        """Take an LLM, and a token that fills rows behind their end."""
        self.splicer, self.pad_token = splicer, pad_token
        self.turns: dict[Job, threading.Semaphore] = {}
        self.ended: set[Job] = set()
        self.back = threading.Semaphore(0)

    def step(self, jobs: Sequence[Job]) -> None:
        """See `Steps.step`; one call after the other runs, up to its next token. What is done ends at its turn."""
        for job in jobs:
            if job not in self.turns:
                self.turns[job] = threading.Semaphore(0)
                threading.Thread(target=self._generate, args=(job,), daemon=True).start()
        for job, turn in list(self.turns.items()):
            turn.release()
            self.back.acquire()
            if job in self.ended:
                self.ended.remove(job)
                del self.turns[job]

    @torch.no_grad()
    def _generate(self, job: Job) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        splicer, start = self.splicer, len(self.splicer.start)
        turn = self.turns[job]

        def choose(ids: Tensor, scores: Tensor) -> Tensor:
            job.written = ids[0, start:].tolist()
            token = job.choose(scores[0])
            chosen = torch.full_like(scores, float("-inf"))
            chosen[0, token] = 0.0
            return chosen

        def write(ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ANN401
            if not job.done:
                job.write(int(ids[0, -1]))
            if not job.done:
                self.back.release()
                turn.acquire()
            return torch.tensor([job.done], device=ids.device)

        turn.acquire()
        try:
            if not job.done:
                splicer.llm.generate(
                    **splicer.generation_inputs([job.call.parts], [job.call.soft.to(splicer.llm.device)]),
                    pad_token_id=self.pad_token,
                    max_new_tokens=job.call.max_tokens,
                    num_beams=1,
                    do_sample=False,  # the job chooses
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    logits_processor=LogitsProcessorList([choose]),
                    stopping_criteria=StoppingCriteriaList([write]),
                )
        except Exception as exc:
            job.fail(exc)
        finally:
            self.ended.add(job)
            self.back.release()


def steps_for(splicer: Splicer, pad_token: int) -> Steps:
    """Return shared passes where rows may be padded and nothing unusual is asked of `generate`, else calls by turns."""
    config = splicer.llm.generation_config
    usual = all(getattr(config, name, None) in neutral for name, neutral in UNUSUAL.items())
    if usual and isinstance(splicer, CausalSplicer) and splicer.prefix is None:
        return BatchedSteps(splicer)
    return SingleSteps(splicer, pad_token)
