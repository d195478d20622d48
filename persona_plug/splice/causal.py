"""Decoder-only LLMs around soft tokens: masks, positions, keys and values that are reused."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from persona_plug.splice.base import PathReader, Splicer
from persona_plug.splice.passes import last
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.soft import Soft
from persona_plug.splice.states import StateCache

MIN_SHARED = 8  # a shorter head is not worth a pass of its own
MIDDLE = (0.4, 0.5, 0.6, 0.7, 0.8)  # shares of the depth at which prompts are summarised


class CausalSplicer(Splicer):
    """Decoder-only LLMs."""

    def __init__(self, llm: Any, cache: StateCache, batch_size: int = 16) -> None:  # noqa: ANN401
        """See `Splicer`."""
        super().__init__(llm, cache, batch_size)
        # Newer transformers call the argument for keys and values `cache`.
        self.cache_argument = "cache" if "cache" in inspect.signature(llm.forward).parameters else "past_key_values"

    def shared(self, left: tuple[int, ...]) -> int:
        """See `Splicer.shared`."""
        same = 0
        for a, b in zip(left[:-1], self.head, strict=False):
            if a != b:
                break
            same += 1
        return same if same >= MIN_SHARED else 0

    @torch.no_grad()
    def _compute_states(self, lefts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return (layers, 2, heads, length, head_dim) for each left, without the positions shared with the head."""
        states: dict[tuple[int, ...], Tensor] = {}
        for shared in {self.shared(left) for left in lefts if left}:
            group = [left for left in lefts if left and self.shared(left) == shared]
            start = self._head_state(shared) if shared else None
            states.update(zip(group, self._run(start, shared, [left[shared:] for left in group]), strict=True))
        return [states[left] if left else torch.zeros(0) for left in lefts]

    def _head_states(self, lefts: Sequence[tuple[int, ...]]) -> dict[int, Tensor]:
        """Return the states of as many of the head's tokens as any prompt shares, by their number."""
        return {shared: self._head_state(shared) for shared in {self.shared(left) for left in lefts} if shared}

    def _head_state(self, shared: int) -> Tensor:
        key = (-1, *self.head[:shared])  # no token is -1: a prompt of the same tokens is cached without these positions
        state = self.cache.get(key)
        if state is None:
            state = self._run(None, 0, [self.head[:shared]])[0]
            self.cache.put(key, state)
        return state

    @property
    def summary_width(self) -> int:
        """See `Splicer.summary_width`."""
        return self._summary_width if self.frozen and self.prefix is None else 0

    @cached_property
    def _summary_width(self) -> int:
        state = self._run(None, 0, [(0,)])[0]
        return len(_middle(len(state))) * state.shape[2] * state.shape[4]

    def summaries(self, lefts: Sequence[tuple[int, ...]], states: Sequence[Tensor]) -> Tensor:
        """See `Splicer.summaries`: the mean over positions of the values that the middle layers have kept."""
        heads = {shared: _values(state) for shared, state in self._head_states(lefts).items()}
        rows = []
        for left, state in zip(lefts, states, strict=True):
            if not left:
                rows.append(torch.zeros(self.summary_width, device=state.device))
                continue
            total, shared = _values(state), self.shared(left)
            rows.append((total + heads[shared] if shared else total) / len(left))
        return torch.stack(rows)

    @torch.no_grad()
    def _run(self, start: Tensor | None, offset: int, rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Run rows of ids behind `offset` positions whose states are `start`; return the states of the rows alone."""
        from transformers import DynamicCache

        ids, mask = self._padded_ids(rows)
        # Without the config: a cache of sliding layers would drop what the tail may still see.
        past: Any = DynamicCache()
        if start is not None:
            wide = start.unsqueeze(2).expand(-1, -1, len(rows), -1, -1, -1)
            past = DynamicCache([(layer[0], layer[1]) for layer in wide])
        positions = offset + (mask.cumsum(1) - 1).clamp(min=0)
        seen = torch.cat([mask.new_ones(len(rows), offset), mask], 1)
        self.llm(
            input_ids=ids,
            attention_mask=seen,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=last(1, ids),
            **{self.cache_argument: past},
        )
        both = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
        ends = [offset + len(row) for row in rows]
        # One copy: a long prompt's states are tens of megabytes.
        return [torch.stack([x[i, :, offset:end] for x in both]).unflatten(0, (-1, 2)) for i, end in enumerate(ends)]

    def in_one_pass(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        trees: Sequence[AnswerTree],
        readers: Sequence[PathReader] | None = None,
        states: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Splicer.loglik`; all candidates of a row share one pass."""
        logits = self._tree_logits(parts, soft, trees, states)
        return gather_paths(logits, trees) if readers is None else read_paths(logits, trees, readers)

    def answer_logits(self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree]) -> list[Tensor]:
        """See `Splicer.answer_logits`."""
        logits = self._tree_logits(parts, soft, trees)
        return [row[: len(tree.paths[0])] for row, tree in zip(logits, trees, strict=True)]

    def _tree_logits(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        trees: Sequence[AnswerTree],
        states: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return logits (B, 1 + nodes, V): column 0 is the end of the prompt, column 1 + i is node i of the tree."""
        if states is None and self.reuses:
            # Something must run that predicts the first answer token: without soft tokens the last of left.
            parts = [
                p if len(s) or p.right else PromptParts(p.left[:-1], p.left[-1:])
                for p, s in zip(parts, soft, strict=True)
            ]
            states = self.states([p.left for p in parts])
        embeds, mask, positions, cache, keep = self._layout(parts, soft, trees, states)
        out = self.llm(
            inputs_embeds=embeds,
            attention_mask=self._mask_for_model(mask, positions, embeds.dtype),
            position_ids=positions[:, -embeds.shape[1] :],
            use_cache=cache is not None,
            logits_to_keep=last(keep, embeds),
            **{self.cache_argument: cache},
        )
        return out.logits[:, -keep:]

    def _layout(
        self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree], states: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Any, int]:
        """Lay rows out as [pad left | pad soft right | nodes pad], so that each row's nodes begin at one column.

        Without states of `left`, it stands in front of the soft tokens in the second part, and what is past is
        the trained prefix, if there is one.

        Returns embeddings of the tail (B, T, H), a boolean mask (B, T, past + T), positions (B, past + T), the cache,
        and how many columns at the end predict answers.
        """
        device, dtype, width = soft[0].device, soft[0].dtype, soft[0].shape[-1]
        leads = [p.left if states is None else () for p in parts]
        sizes = [len(lead) + len(s) + len(p.right) for lead, s, p in zip(leads, soft, parts, strict=True)]
        before = [self.prefix_length if states is None else len(p.left) for p in parts]
        past, body = max(before), max(sizes)
        nodes = max(len(t.tokens) for t in trees)
        total = body + nodes
        columns = torch.zeros(len(parts), past + total, dtype=torch.bool)
        positions = torch.zeros(len(parts), past + total, dtype=torch.long)
        allowed = torch.ones(total, past + total, dtype=torch.bool).tril(past).repeat(len(parts), 1, 1)
        rows = []
        for b, (part, tree) in enumerate(zip(parts, trees, strict=True)):
            left, size, n = before[b], sizes[b], len(tree.tokens)
            start = past + body - size
            columns[b, past - left : past] = True
            columns[b, start : past + body + n] = True
            positions[b, past - left : past] = torch.arange(left)
            positions[b, start : past + body] = torch.arange(left, left + size)
            depth, sight = _tree_sight(tree)
            positions[b, past + body : past + body + n] = left + size + depth
            allowed[b, body : body + n, past + body : past + body + n] = sight
            pieces = [torch.zeros(body - size, width, device=device, dtype=dtype), self.embed(leads[b]).to(dtype)]
            pieces += [soft[b], self.embed((*part.right, *tree.tokens)).to(dtype)]
            pieces.append(torch.zeros(nodes - n, width, device=device, dtype=dtype))
            rows.append(torch.cat(pieces))
        embeds = torch.stack(rows).to(self.dtype)
        mask = (allowed & columns.unsqueeze(1)).to(device)
        return embeds, mask, positions.to(device), self._stacked_cache(parts, states, past), nodes + 1

    def _stacked_cache(self, parts: Sequence[PromptParts], states: Sequence[Tensor] | None, past: int) -> Any:  # noqa: ANN401
        if past == 0:
            return None
        from transformers import DynamicCache

        if states is None:  # something trained stands in front
            return None if self.prefix is None else self._prefix_cache(self.prefix, len(parts))
        some = next(s for s in states if s.numel())
        layers, _, heads, _, head_dim = some.shape
        full = torch.zeros(layers, 2, len(parts), heads, past, head_dim, dtype=some.dtype, device=some.device)
        heads_of = self._head_states([part.left for part in parts])
        for b, (part, state) in enumerate(zip(parts, states, strict=True)):
            if not part.left:
                continue
            begin, shared = past - len(part.left), self.shared(part.left)
            if shared:
                full[:, :, b, :, begin : begin + shared] = heads_of[shared]
            full[:, :, b, :, begin + shared :] = state
        return DynamicCache([(full[i, 0], full[i, 1]) for i in range(layers)])

    def _prefix_cache(self, prefix: Tensor, rows: int) -> Any:  # noqa: ANN401
        from transformers import DynamicCache

        wide = prefix.to(self.dtype).unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)
        return DynamicCache([(layer[0], layer[1]) for layer in wide])

    def _mask_for_model(self, allowed: Tensor, positions: Tensor, dtype: torch.dtype) -> Any:  # noqa: ANN401
        """Return the additive 4-D mask; for models with sliding-window layers, one for each kind of layer.

        Where a config names a window but no kinds of layers (Mistral, Phi-3), all layers have it.
        """
        config = self.llm.config.get_text_config(decoder=True)
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        if window is None or (kinds and "sliding_attention" not in kinds):
            return _additive(allowed, dtype)
        queries = positions[:, -allowed.shape[1] :]
        near = _additive(allowed & (queries.unsqueeze(2) - positions.unsqueeze(1) < window), dtype)
        return {"full_attention": _additive(allowed, dtype), "sliding_attention": near} if kinds else near

    def generation_inputs(self, parts: Sequence[PromptParts], soft: Soft) -> dict[str, Any]:
        """Return left-padded `inputs_embeds` and `attention_mask` for the LLM's own generate."""
        rows = self._prompts(parts, soft)
        first = self.prefix_length  # generate passes over as many rows as its cache already holds
        width = first + max(len(r) for r in rows)
        embeds = torch.zeros(len(rows), width, rows[0].shape[-1], dtype=self.dtype, device=rows[0].device)
        mask = torch.zeros(len(rows), width, dtype=torch.long, device=rows[0].device)
        for i, row in enumerate(rows):
            embeds[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        mask[:, :first] = 1
        past = {} if self.prefix is None else {self.cache_argument: self._prefix_cache(self.prefix, len(rows))}
        return {"inputs_embeds": embeds, "attention_mask": mask, **past}


def gather_paths(logits: Tensor, trees: Sequence[AnswerTree]) -> tuple[Tensor, Tensor]:
    """Sum token log-probabilities along each candidate's path.

    Args:
        logits: (B, 1 + nodes, vocabulary); column 0 is the end of the prompt, column 1 + i is node i.
        trees: Candidates of each row.

    Returns:
        (B, C) log-likelihoods, -inf where a row has fewer candidates, and (B,) log-probability of gold end tokens.
    """
    count = max(len(t.paths) for t in trees)
    length = max(len(p) for t in trees for p in t.paths)
    column = torch.zeros(len(trees), count * length + 1, dtype=torch.long)
    token = torch.zeros_like(column)
    used = torch.zeros(column.shape, dtype=torch.bool)
    absent = torch.ones(len(trees), count, dtype=torch.bool)
    for b, tree in enumerate(trees):
        for c, path in enumerate(tree.paths):
            absent[b, c] = False
            for i, (node, predicted) in enumerate(path):
                column[b, c * length + i], token[b, c * length + i], used[b, c * length + i] = node + 1, predicted, True
        if tree.gold_end is not None:
            column[b, -1], token[b, -1], used[b, -1] = tree.gold_end[0] + 1, tree.gold_end[1], True
    column, token, used, absent = (t.to(logits.device) for t in (column, token, used, absent))
    rows = torch.arange(len(trees), device=logits.device).unsqueeze(1)
    logits = logits.float()
    picked = logits[rows, column, token] - logits.logsumexp(-1).gather(1, column)
    picked = picked * used
    total = picked[:, :-1].unflatten(1, (count, length)).sum(-1)
    return total.masked_fill(absent, float("-inf")), picked[:, -1]


def read_paths(logits: Tensor, trees: Sequence[AnswerTree], readers: Sequence[PathReader]) -> tuple[Tensor, Tensor]:
    """Return what `gather_paths` does, of tokens that each row's reader scores."""
    count = max(len(t.paths) for t in trees)
    total = torch.full((len(trees), count), float("-inf"), device=logits.device)
    end = torch.zeros(len(trees), device=logits.device)
    for b, (tree, reader) in enumerate(zip(trees, readers, strict=True)):
        for c, path in enumerate(tree.paths):
            is_gold = tree.gold_end is not None and _continues(tree, path)
            steps = [*path, tree.gold_end] if is_gold and tree.gold_end is not None else path
            scores = reader.score(logits[b, [node + 1 for node, _ in steps]], [token for _, token in steps])
            total[b, c] = scores[: len(path)].sum()
            if is_gold:
                end[b] = scores[-1]
    return total, end


def _continues(tree: AnswerTree, path: Sequence[tuple[int, int]]) -> bool:
    """Whether the gold's end token follows a path."""
    parent, token = path[-1]
    node = tree.gold_end[0] if tree.gold_end is not None else -1
    return node >= 0 and (tree.parents[node], tree.tokens[node]) == (parent, token)


def _middle(layers: int) -> list[int]:
    """Return the layers whose values summarise a prompt: before them words are read, behind them words are chosen."""
    return sorted({min(layers - 1, round(share * layers)) for share in MIDDLE})


def _values(state: Tensor) -> Tensor:
    """Return the sum over positions of the middle layers' values, flat: (layers, 2, heads, L, d) -> (D,) float32."""
    return state[_middle(len(state)), 1].float().sum(-2).flatten()


def _tree_sight(tree: AnswerTree) -> tuple[Tensor, Tensor]:
    """Return each node's depth (n,) and which nodes it sees: its ancestors and itself, (n, n) bool."""
    n = len(tree.tokens)
    depth, sight = torch.zeros(n, dtype=torch.long), torch.eye(n, dtype=torch.bool)
    for i, parent in enumerate(tree.parents):
        if parent >= 0:
            depth[i] = depth[parent] + 1
            sight[i] |= sight[parent]
    return depth, sight


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        .masked_fill_(~allowed, torch.finfo(dtype).min)
        .unsqueeze(1)
    )
