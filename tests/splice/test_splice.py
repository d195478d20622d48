"""Parts of the splicers by themselves: reused states, shared heads, masks of trees, sums along paths."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from persona_plug.models.caching import uncached
from persona_plug.splice import passes as parting
from persona_plug.splice.causal import CausalSplicer, _tree_sight, gather_paths
from persona_plug.splice.passes import passes
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.rows import RowSplicer
from persona_plug.splice.seq2seq import Seq2SeqSplicer
from persona_plug.splice.states import StateCache

EOS = 2
HEAD = tuple(range(20, 32))  # tokens that most prompts below begin with
LEFTS = [(*HEAD, 50, 51), (*HEAD, 52), (*HEAD[:9], 60, 61), (70, 71, 72), (*HEAD, 50, 51), HEAD, HEAD[:5]]
CANDIDATES = [(5, 6, 7), (5, 6), (9,)]


@pytest.fixture(params=["tiny-llama", "tiny-gpt2", "tiny-gemma"])
def llm(request, load_parts, tiny_gemma):
    return load_parts(tiny_gemma if request.param == "tiny-gemma" else request.param)[0]


def causal(llm, head=(), budget=1 << 30, batch_size=16):
    splicer = CausalSplicer(llm, StateCache(budget), batch_size)
    splicer.head = head
    return splicer


def plain_loglik(llm, part, soft, candidate):
    """One forward over everything at once; the end token counts."""
    table = llm.get_input_embeddings()
    ids = (part.left, (*part.right, *candidate))
    left, right = (table(torch.tensor(i, dtype=torch.long)) for i in ids)
    logits = llm(inputs_embeds=torch.cat([left, soft, right])[None], use_cache=False).logits[0]
    wanted = torch.tensor([*candidate, EOS])
    logp = logits[-len(wanted) :].log_softmax(-1)
    return logp.gather(1, wanted[:, None]).sum()


@torch.no_grad()
def check(splicer, parts, soft):
    tree = AnswerTree.build(CANDIDATES, EOS)
    loglik, _ = splicer.loglik(parts, soft, [tree] * len(parts))
    expected = torch.tensor(
        [[plain_loglik(splicer.llm, part, row, c) for c in CANDIDATES] for part, row in zip(parts, soft, strict=True)]
    )
    torch.testing.assert_close(loglik, expected, atol=1e-4, rtol=0)


# Prompts that no template makes: some share the head, some a part of it, some nothing


@pytest.mark.parametrize("head", [(), HEAD, HEAD[:3]], ids=["no head", "head", "short head"])
def test_any_mixture_of_prompts(llm, head):
    parts = [
        PromptParts(left, right) for left, right in zip(LEFTS, [(3,), (), (3, 4), (), (8,) * 5, (), (3,)], strict=True)
    ]
    soft = torch.randn(len(parts), 3, llm.get_input_embeddings().weight.shape[1])
    check(causal(llm, head), parts, soft)
    check(causal(llm, head, budget=0, batch_size=2), parts, soft)


def test_rows_without_left_or_without_anything_but_soft_tokens(llm):
    parts = [PromptParts((), (3, 4)), PromptParts(LEFTS[0], ()), PromptParts((), ())]
    width = llm.get_input_embeddings().weight.shape[1]
    check(causal(llm, HEAD), parts, torch.randn(3, 2, width))
    check(causal(llm), parts[::2], torch.randn(2, 2, width))


def test_no_soft_tokens(llm):
    parts = [PromptParts(LEFTS[0], (3,)), PromptParts(LEFTS[3], (3, 4))]
    check(causal(llm, HEAD), parts, torch.zeros(2, 0, llm.get_input_embeddings().weight.shape[1]))


def test_states_come_in_the_order_asked_for_and_are_computed_once(load_parts, monkeypatch):
    llm, _ = load_parts("tiny-llama")
    splicer = causal(llm, HEAD, batch_size=2)
    ran = []
    monkeypatch.setattr(llm, "forward", lambda *a, f=llm.forward, **k: ran.append(k["input_ids"].shape) or f(*a, **k))
    states = splicer.states(LEFTS)
    lengths = [len(left) - splicer.shared(left) for left in LEFTS]
    assert [s.shape[-2] for s in states] == lengths
    torch.testing.assert_close(states[0], states[4], atol=0, rtol=0)
    assert max(shape[0] for shape in ran) <= 2
    runs = len(ran)
    again = splicer.states(LEFTS[::-1])[::-1]
    assert len(ran) == runs
    for a, b in zip(states, again, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_states_behind_a_head_equal_states_of_the_whole(llm):
    whole = causal(llm).states(LEFTS)
    splicer = causal(llm, HEAD)
    for left, full, tail in zip(LEFTS, whole, splicer.states(LEFTS), strict=True):
        shared = splicer.shared(left)
        assert shared == (0 if len(left) < 9 else min(11 if left == HEAD else 12, 9 if left[9:10] == (60,) else 12))
        torch.testing.assert_close(tail, full[..., shared:, :], atol=1e-4, rtol=1e-4)
        assert not tail.requires_grad


def test_a_short_head_is_not_shared(load_parts):
    llm, _ = load_parts("tiny-llama")
    assert causal(llm, HEAD[:7]).shared(LEFTS[0]) == 0
    assert causal(llm, HEAD[:8]).shared(LEFTS[0]) == 8


def test_encoder_states_are_reused_too(load_parts):
    llm, _ = load_parts("tiny-t5")
    splicer = Seq2SeqSplicer(llm, StateCache(1 << 30), batch_size=2)
    lefts = [(5, 6, 7, 2), (8, 2), (5, 6, 7, 2), (9, 9, 9, 9, 9, 2)]
    states = splicer.states(lefts)
    for left, state in zip(lefts, states, strict=True):
        with torch.no_grad():
            expected = llm.get_encoder()(input_ids=torch.tensor([left])).last_hidden_state[0]
        torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
    assert len(splicer.cache._states) == 3
    assert splicer.cache.hits == 0
    assert [s.numel() for s in splicer.states([(), ()])] == [0, 0]


# Summaries of prompts, out of states that are kept anyway


@torch.no_grad()
def test_a_summary_is_the_mean_of_the_middle_layers_values(llm):
    splicer = causal(llm, HEAD)
    lefts = [*LEFTS, ()]
    found = splicer.summaries(lefts, splicer.states(lefts))
    assert found.shape == (len(lefts), splicer.summary_width)
    assert found.dtype == torch.float32
    assert not found[-1].any()
    layers = llm.config.num_hidden_layers
    middle = sorted({min(layers - 1, round(share * layers)) for share in (0.4, 0.5, 0.6, 0.7, 0.8)})
    for left, row in zip(LEFTS, found, strict=False):
        past = DynamicCache()  # without the config: one of sliding layers would drop what is far
        llm(torch.tensor([left]), past_key_values=past)
        kept = past.layers
        expected = torch.cat([kept[layer].values[0].mean(1).flatten() for layer in middle])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_encoder_is_summarised_by_the_mean_of_its_states(load_parts):
    llm, _ = load_parts("tiny-t5")
    splicer = Seq2SeqSplicer(llm, StateCache(1 << 30))
    lefts = [(5, 6, 7, 2), (8, 2), ()]
    found = splicer.summaries(lefts, splicer.states(lefts))
    assert found.shape == (3, splicer.summary_width)
    assert not found[2].any()
    for left, row in zip(lefts[:2], found, strict=False):
        expected = llm.get_encoder()(input_ids=torch.tensor([left])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_what_is_trained_inside_or_reads_plain_rows_gives_no_summary(load_parts):
    llm, _ = load_parts("tiny-llama")
    trained, prefixed = causal(llm), causal(llm)
    trained.frozen = False
    prefixed.prefix = torch.zeros(2, 2, 2, 1, 16)
    rows = RowSplicer(llm, StateCache(0))
    assert [s.summary_width for s in (trained, prefixed, rows)] == [0, 0, 0]
    assert causal(llm).summary_width > 0


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-t5"])
@pytest.mark.parametrize("caching", [True, False])
@torch.no_grad()
def test_states_in_hand_are_not_computed_again(load_parts, monkeypatch, name, caching):
    llm, _ = load_parts(name)
    make = causal if name == "tiny-llama" else lambda llm: Seq2SeqSplicer(llm, StateCache(1 << 30))
    right = (3,) if name == "tiny-llama" else ()
    lefts = [(*LEFTS[0],), (*LEFTS[1], 41, 42), (*LEFTS[3],)]
    parts = [PromptParts(left, right) for left in lefts]
    soft = torch.randn(3, 2, llm.get_input_embeddings().weight.shape[1])
    trees = [AnswerTree.build([(5, 6), (7,)], EOS)] * 3
    expected = make(llm).loglik(parts, soft, trees)[0]
    splicer = make(llm)
    with nullcontext() if caching else uncached():
        states = splicer.states(lefts)
        assert bool(splicer.cache.used) == caching
        monkeypatch.setattr(splicer, "_compute_states", lambda *_: pytest.fail("computed again"))
        monkeypatch.setattr(splicer, "cache", StateCache(0))
        found = splicer.loglik(parts, soft, trees, states=states)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_generation_inputs_are_padded_on_the_left(llm):
    parts = [PromptParts(LEFTS[0], (3,)), PromptParts((), (3, 4)), PromptParts(LEFTS[3], ())]
    table = llm.get_input_embeddings()
    soft = torch.randn(3, 2, table.weight.shape[1])
    given_to_llm = causal(llm).generation_inputs(parts, soft)
    embeds, mask = given_to_llm["inputs_embeds"], given_to_llm["attention_mask"]
    for part, row, e, m in zip(parts, soft, embeds, mask, strict=True):
        length = len(part.left) + 2 + len(part.right)
        assert m.tolist() == [0] * (len(m) - length) + [1] * length
        left, right = (table(torch.tensor(i, dtype=torch.long)) for i in (part.left, part.right))
        torch.testing.assert_close(e[len(m) - length :], torch.cat([left, row, right]))


# The cache


def test_the_cache_counts_and_keeps_to_its_budget():
    cache = StateCache(100)
    state = torch.zeros(10)  # 40 bytes
    assert cache.get((1,)) is None
    for key in ((1,), (1,), (2,), (3,)):
        cache.put(key, state)
    assert cache.used == 80
    assert cache.get((1,)) is state
    assert cache.get((3,)) is None
    cache.put((3,), torch.zeros(5))
    assert cache.used == 100
    assert (cache.hits, cache.misses) == (1, 2)
    cache.clear()
    assert cache.used == 0
    assert cache.get((1,)) is None


# Trees

TREES = st.lists(
    st.lists(st.lists(st.integers(3, 5), max_size=3).map(tuple), min_size=1, max_size=4), min_size=1, max_size=3
)


@given(rows=TREES, seed=st.integers(0, 99))
def test_sums_along_paths(rows, seed):
    trees = [AnswerTree.build(row, EOS, gold=0) for row in rows]
    nodes = max(len(t.tokens) for t in trees)
    logits = torch.randn(len(rows), nodes + 1, 6, generator=torch.Generator().manual_seed(seed))
    logp = logits.log_softmax(-1)
    total, end = gather_paths(logits, trees)
    assert total.shape == (len(rows), max(len(row) for row in rows))
    for b, (row, tree) in enumerate(zip(rows, trees, strict=True)):
        for c, path in enumerate(tree.paths):
            expected = sum(float(logp[b, node + 1, token]) for node, token in path)
            assert float(total[b, c]) == pytest.approx(expected, abs=1e-4)
        assert (total[b, len(row) :] == float("-inf")).all()
        expected = 0.0 if tree.gold_end is None else float(logp[b, tree.gold_end[0] + 1, tree.gold_end[1]])
        assert float(end[b]) == pytest.approx(expected, abs=1e-4)


def test_sums_of_absent_candidates_have_finite_gradients():
    trees = [AnswerTree.build([(3,), (4,)], EOS), AnswerTree.build([(3,)], EOS)]
    logits = torch.randn(2, 2, 6, requires_grad=True)
    total, _ = gather_paths(logits, trees)
    total.log_softmax(-1)[:, 0].sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].any()


@given(row=st.lists(st.lists(st.integers(3, 5), max_size=4).map(tuple), min_size=1, max_size=5))
def test_nodes_see_their_ancestors_and_themselves(row):
    tree = AnswerTree.build(row, EOS)
    depth, sight = _tree_sight(tree)
    for node in range(len(tree.tokens)):
        line, at = [], node
        while at >= 0:
            line.append(at)
            at = tree.parents[at]
        assert sight[node].nonzero().flatten().tolist() == sorted(line)
        assert int(depth[node]) == len(line) - 1


def test_a_training_is_charged_for_the_states_it_asked_for_alone(load_parts, monkeypatch):
    """A planned group runs as a whole; what one of it costs is its share."""
    llm, _ = load_parts("tiny-llama")
    splicer = causal(llm, HEAD, batch_size=4)
    lefts = [(*HEAD, 50 + i) for i in range(4)]
    splicer.plan(lefts)
    ticks = iter([0.0, 8.0])
    monkeypatch.setattr("persona_plug.splice.base.clock", lambda _: next(ticks))
    splicer.states([lefts[1]])
    assert (splicer.bill.spent, splicer.bill.owed, splicer.bill.used) == (8.0, 2.0, {lefts[1]})
    splicer.plan(lefts)
    splicer.states([lefts[2], lefts[1], lefts[2]])  # both are there: nothing is timed, both are charged
    assert (splicer.bill.spent, splicer.bill.owed) == (0.0, 4.0)


def test_a_training_that_asks_for_few_prompts_computes_no_others(load_parts):
    llm, _ = load_parts("tiny-llama")
    splicer = causal(llm, HEAD, batch_size=4)
    lefts = [(*HEAD, 50 + i) for i in range(4)]
    splicer.plan(lefts, reads=3)
    splicer.states([lefts[1]])
    assert [left for left in lefts if splicer.cache.get(left) is not None] == [lefts[1]]
    splicer.plan(lefts, reads=4)
    splicer.states([lefts[1]])
    assert all(splicer.cache.get(left) is not None for left in lefts)


# Rows of unlike length


def cost(sizes, groups, fixed):
    return sum(len(g) * max(sizes[i] for i in g) + fixed for g in groups)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7), st.integers(0, 200))
def test_no_other_way_to_part_rows_by_length_costs_less(sizes, fixed):
    groups = passes(sizes, fixed)
    assert sorted(i for g in groups for i in g) == list(range(len(sizes)))
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for mask in range(2 ** (len(sizes) - 1)):
        other, group = [], [order[0]]
        for at, row in enumerate(order[1:]):
            if mask >> at & 1:
                other.append(group)
                group = []
            group.append(row)
        assert cost(sizes, groups, fixed) <= cost(sizes, [*other, group], fixed)


@pytest.mark.parametrize("reuses", [True, False])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-t5"])
def test_rows_run_apart_say_the_same_and_pass_the_same_gradients_on(load_parts, monkeypatch, name, reuses):
    llm, _ = load_parts(name)
    right = () if name == "tiny-t5" else (3, 4)  # an encoder's rows have either left or right
    parts = [PromptParts(LEFTS[i], right[: i % 3]) for i in range(5)]
    trees = [AnswerTree.build([tuple(range(5, 5 + n))], EOS) for n in (1, 40, 2, 12, 39)]
    trees[3] = AnswerTree.build(CANDIDATES, EOS, 1)  # more candidates than the others
    start = torch.randn(5, 3, llm.get_input_embeddings().weight.shape[1])
    found = []
    for fixed in (10**6, 0):  # all in one pass, and each length by itself
        monkeypatch.setattr(parting, "PASS_TOKENS", {"cpu": fixed})
        splicer = (Seq2SeqSplicer if name == "tiny-t5" else CausalSplicer)(llm, StateCache(1 << 30))
        splicer.frozen = reuses
        soft = start.clone().requires_grad_()
        loglik, end = splicer.loglik(parts, soft, trees)
        (loglik[loglik.isfinite()].sum() + end.sum()).backward()
        found.append((loglik.detach(), end.detach(), soft.grad))
    assert found[0][0].isinf().sum() == 8
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
