"""Embedders and their aggregators: order, masks, empty histories, the paper's equations, dropout."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.functional import gelu, normalize

from persona_plug.config import PlugConfig
from persona_plug.data.history import Example, HistoryItem
from persona_plug.embedder.aggregators import AttentionAggregator, MeanAggregator, PaperAggregator
from persona_plug.embedder.architectures import make_embedder
from persona_plug.embedder.batch import HistoryBatch, VectorTable, value_dim
from persona_plug.errors import DataError

DIM, WIDTH, NORM = 12, 16, 3.0
RECIPES = ("default", "mean", "paper")


@pytest.fixture(scope="module")
def make(perturb):
    def make(recipe="default", differ=True, answers=("a", "b", "c"), **settings):
        config = PlugConfig.create(
            "llm",
            "encoder",
            recipe,
            llm_width=WIDTH,
            encoder_dim=DIM,
            key_dim=8,
            projector_hidden=24,
            answers=answers,
            **settings,
        )
        torch.manual_seed(1)
        embedder = make_embedder(config, NORM).eval()
        return perturb(embedder) if differ else embedder

    return make


def draw_batch(config, counts, seed=0, width=None):
    """Random unit vectors for rows with `counts` items, padded to `width` slots."""
    g = torch.Generator().manual_seed(seed)
    n, b = width or max([*counts, 1]), len(counts)
    text, answers = value_dim(config)

    def unit(*shape):
        return normalize(torch.randn(*shape, generator=g), dim=-1)

    keys = unit(b, n, config.encoder_dim)
    parts = [keys] if text == config.encoder_dim else [keys, unit(b, n, config.encoder_dim)]
    if answers:
        chosen = torch.randint(0, answers, (b, n), generator=g)
        parts.append(torch.nn.functional.one_hot(chosen, answers).float())
    mask = torch.arange(n) < torch.tensor(counts).unsqueeze(1)
    values = torch.cat(parts, -1) * mask.unsqueeze(-1)
    return HistoryBatch(unit(b, config.encoder_dim), keys * mask.unsqueeze(-1), values, mask)


def changed(batch, **parts):
    names = ("request", "keys", "values", "mask")
    return HistoryBatch(*(parts.get(n, getattr(batch, n)) for n in names))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.soft, b.soft, atol=tolerance, rtol=tolerance)


# Order and masks


@pytest.mark.parametrize("recipe", RECIPES)
@given(count=st.integers(2, 9), seed=st.integers(0, 1 << 30), pad=st.integers(0, 3))
@example(count=2, seed=0, pad=0)
def test_the_order_of_items_changes_nothing(make, recipe, count, seed, pad):
    embedder = make(recipe)
    batch = draw_batch(embedder.config, [count, 1], seed, count + pad)
    order = torch.randperm(count + pad, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        plain = embedder(batch)
        other = embedder(
            changed(batch, keys=batch.keys[:, order], values=batch.values[:, order], mask=batch.mask[:, order])
        )
    close(plain, other)
    torch.testing.assert_close(plain.weights[:, order], other.weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_in_a_masked_slot_has_an_effect(make, recipe):
    embedder = make(recipe)
    batch = draw_batch(embedder.config, [3, 0, 1, 5])
    garbage = (~batch.mask).unsqueeze(-1) * torch.randn(4, 5, 1) * 1e4
    other = changed(batch, keys=batch.keys + garbage, values=batch.values + garbage)
    close(embedder(batch), embedder(other))
    assert not embedder(batch).weights[~batch.mask].any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_more_padding_changes_nothing(make, recipe):
    embedder = make(recipe)
    batch = draw_batch(embedder.config, [3, 0, 1, 5], width=5)
    wide = changed(
        batch,
        keys=torch.cat([batch.keys, torch.zeros(4, 4, DIM)], 1),
        values=torch.cat([batch.values, torch.zeros(4, 4, batch.values.shape[-1])], 1),
        mask=torch.cat([batch.mask, torch.zeros(4, 4, dtype=torch.bool)], 1),
    )
    close(embedder(batch), embedder(wide))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_row_sees_another(make, recipe):
    embedder = make(recipe)
    batch = draw_batch(embedder.config, [3, 0, 1, 5])
    together = embedder(batch)
    for row in range(4):
        alone = embedder(
            HistoryBatch(*(getattr(batch, n)[row : row + 1] for n in ("request", "keys", "values", "mask")))
        )
        torch.testing.assert_close(alone.soft[0], together.soft[row], atol=1e-5, rtol=1e-5)
    others = changed(batch, request=batch.request.clone(), values=batch.values.clone())
    others.request[1:], others.values[1:] = others.request[1:].flip(-1), others.values[1:].flip(-1)
    torch.testing.assert_close(embedder(others).soft[0], together.soft[0], atol=1e-5, rtol=1e-5)


# Empty histories


@pytest.mark.parametrize("recipe", RECIPES)
def test_users_without_history_are_alike(make, recipe):
    embedder = make(recipe)
    batch = draw_batch(embedder.config, [0, 0, 4])
    same = changed(batch, request=batch.request[:1].expand(3, -1).clone())
    out = embedder(same)
    assert torch.isfinite(out.soft).all()
    torch.testing.assert_close(out.soft[0], out.soft[1], atol=1e-6, rtol=1e-6)
    assert (out.soft[0] - out.soft[2]).abs().max() > 1e-3
    assert not out.weights[:2].any()
    out.soft.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in embedder.parameters() if p.grad is not None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_null_value_is_what_an_empty_history_says(make, recipe):
    embedder = make(recipe)
    batch = draw_batch(embedder.config, [0, 4])
    before = embedder(batch).soft.detach()
    with torch.no_grad():
        embedder.null_value.add_(1.0)
    after = embedder(batch).soft.detach()
    assert (before[0] - after[0]).abs().max() > 1e-3
    if recipe != "default":  # attention gives the null item a share of every history
        torch.testing.assert_close(before[1], after[1])


# Refusals


@pytest.mark.parametrize("kind", ["request", "keys", "values"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_finite_are_refused_by_row(make, kind, value):
    embedder = make()
    batch = draw_batch(embedder.config, [2, 2, 2])
    getattr(batch, kind)[1].view(-1)[3] = value
    with pytest.raises(DataError, match=f"row 1: {kind} vectors hold NaN or infinity"):
        embedder(batch)


# What is pooled


def test_paper_recipe_is_equations_3_and_4(make):
    """w = softmax(x.h); the user's token is sum_i w_i Proj(h_i), Proj a two-layer perceptron."""
    embedder = make("paper", answers=None)
    batch = draw_batch(embedder.config, [4, 1, 0, 2])
    out = embedder(batch)

    def project(vector):
        inner = vector * DIM**0.5 @ embedder.hidden.weight.T + embedder.hidden.bias
        return gelu(inner) @ embedder.out.weight.T

    for row, count in enumerate([4, 1, 0, 2]):
        history, request = batch.keys[row, :count], batch.request[row]
        weights = torch.tensor([math.exp(float(request @ h)) for h in history])
        weights = weights / weights.sum() if count else weights
        offset = sum((w * project(h) for w, h in zip(weights, history, strict=True)), torch.zeros(WIDTH))
        if not count:
            offset = project(embedder.null_value)
        token = normalize(embedder.tokens[1] + offset, dim=-1) * embedder.log_gain[1].exp()
        torch.testing.assert_close(out.soft[row, 1], token, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.weights[row, :count], weights, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("answers", [None, ("a", "b")])
@pytest.mark.parametrize("use_request", [True, False])
def test_an_empty_history_is_a_projected_null_item_in_the_paper_aggregator(make, answers, use_request):
    """A row whose only item is the null item, and one without items, say the same."""
    embedder = make(aggregator="paper", answers=answers, use_request=use_request)
    batch = draw_batch(embedder.config, [0, 1])
    null = torch.cat([embedder.null_value, embedder.null_answers.softmax(0)]).detach()
    same = changed(batch, request=batch.request[:1].expand(2, -1).clone(), values=null.expand(2, 1, -1).clone())
    soft = embedder(same).soft
    torch.testing.assert_close(soft[0], soft[1], atol=1e-5, rtol=1e-5)
    other = embedder(changed(same, request=same.request[:, torch.randperm(DIM)])).soft
    assert torch.allclose(soft[0], other[0], atol=1e-5) != use_request


def test_paper_weights_do_not_depend_on_the_projector_and_mean_weights_on_nothing():
    g = torch.Generator().manual_seed(0)
    request, keys, values = (torch.randn(*s, generator=g) for s in ((2, DIM), (2, 3, DIM), (2, 3, 5)))
    mask, null = torch.tensor([[True, True, False], [True, True, True]]), torch.zeros(5)
    paper = PaperAggregator()(request, keys, values, mask, null)
    expected = (keys[0, :2] @ request[0]).softmax(0)
    torch.testing.assert_close(paper.weights[0, 0, :2], expected)
    torch.testing.assert_close(paper.vector[0, 0], expected @ values[0, :2])
    mean = MeanAggregator()(request, keys, values, mask, null)
    torch.testing.assert_close(mean.vector[0, 0], values[0, :2].mean(0))
    torch.testing.assert_close(mean.weights[1, 0], torch.full((3,), 1 / 3))


def test_attention_starts_as_mean_with_a_null_item():
    torch.manual_seed(0)
    aggregator = AttentionAggregator(DIM, heads=2, key_dim=8)
    request, keys, values = torch.randn(1, DIM), torch.randn(1, 3, DIM), torch.randn(1, 3, 5)
    null = torch.ones(5)
    pooled = aggregator(request, keys, values, torch.ones(1, 3, dtype=torch.bool), null)
    torch.testing.assert_close(pooled.weights[0, 0], torch.full((3,), 0.25))
    torch.testing.assert_close(pooled.vector[0, 0], (values[0].sum(0) + null) / 4)
    assert pooled.weights[0, 1].max() - pooled.weights[0, 1].min() > 1e-2
    assert pooled.weights.sum(-1).max() <= 1


def test_an_item_like_the_request_weighs_most():
    torch.manual_seed(0)
    aggregator = AttentionAggregator(DIM, heads=2, key_dim=DIM)  # square orthogonal views keep every cosine
    keys = normalize(torch.randn(1, 6, DIM), dim=-1)
    for item in range(6):
        pooled = aggregator(keys[:, item], keys, keys, torch.ones(1, 6, dtype=torch.bool), torch.zeros(DIM))
        assert pooled.weights[0, 1].argmax() == item


@pytest.mark.parametrize(
    "switch",
    [{"item_outputs": False}, {"use_request": False}, {"use_answer_counts": False}, {"answers": None}],
    ids=str,
)
def test_switches_take_their_input_away(make, switch):
    """What a switch turns off has no effect on the soft tokens; what stays on has."""
    for settings, matters in ((switch, False), ({}, True)):
        embedder = make("mean", **settings)
        config = embedder.config
        histories = {
            "item_outputs": (("x", "one"), ("x", "two")),
            "use_answer_counts": (("x", "a"), ("x", "b")),
            "answers": (("x", "a"), ("x", "b")),
        }
        encoder = FakeEncoder("use_answer_counts" in switch or "answers" in switch)
        name = next(iter(switch))
        if name == "use_request":
            examples = [Example("", request, "", (HistoryItem("x", "y"),)) for request in ("one", "two")]
        else:
            examples = [Example("", "r", "", (HistoryItem(*item),)) for item in histories[name]]
        soft = embedder(VectorTable(encoder, examples, config).batch(examples)).soft
        assert bool((soft[0] - soft[1]).abs().max() > 1e-4) == matters


class FakeEncoder:
    """Random vectors for texts; the answers a and b may share one, so that only their one-hot parts differ."""

    def __init__(self, alike):
        self.alike = alike

    def encode(self, texts):
        def vector(text):
            name = "a" if self.alike and text == "b" else text
            g = torch.Generator().manual_seed(sum(name.encode()) * 31 + len(name))
            return normalize(torch.randn(DIM, generator=g), dim=0) if text else torch.zeros(DIM)

        return torch.stack([vector(t) for t in texts])


def test_a_batch_holds_the_vectors_of_its_texts():
    config = PlugConfig("l", "e", encoder_dim=DIM, answers=("yes", "no"), max_history=2)
    encoder = FakeEncoder(False)

    def v(text):
        return encoder.encode([text])[0]

    old, last, alone = HistoryItem("i1", "yes"), HistoryItem("i2", " no "), HistoryItem("", "free text")
    examples = [Example("", "r1", "", (HistoryItem("dropped", "x"), old, last)), Example("", "r2", "", (alone,))]
    table = VectorTable(encoder, [*examples, Example("", "another", "", ())], config)
    assert "dropped" not in table.rows
    batch = table.batch(examples)
    assert batch.mask.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(batch.request, torch.stack([v("r1"), v("r2")]))
    torch.testing.assert_close(batch.keys[0], torch.stack([v("i1"), v("i2")]))
    torch.testing.assert_close(batch.keys[1, 0], v("free text"))  # an item without input is known by its output
    torch.testing.assert_close(batch.values[0, 0], torch.cat([v("i1"), v("yes"), torch.tensor([1.0, 0.0])]))
    torch.testing.assert_close(batch.values[0, 1], torch.cat([v("i2"), v(" no "), torch.tensor([0.0, 1.0])]))
    torch.testing.assert_close(batch.values[1, 0], torch.cat([torch.zeros(DIM), v("free text"), torch.zeros(2)]))
    empty = table.batch([examples[1], Example("", "another", "", ())])
    assert empty.mask.tolist() == [[True], [False]]


# Soft tokens


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("m", "k"), [(0, 1), (2, 3), (4, 0), (1, 1)])
def test_soft_tokens_have_shape_type_and_norm(make, recipe, m, k):
    embedder = make(recipe, user_tokens=k, task_tokens=m)
    out = embedder(draw_batch(embedder.config, [3, 0, 1]))
    assert out.soft.shape == (3, m + k, WIDTH)
    assert out.soft.dtype == torch.float32
    assert torch.isfinite(out.soft).all()
    torch.testing.assert_close(out.soft.norm(dim=-1), embedder.log_gain.exp().expand(3, -1))
    torch.testing.assert_close(out.soft[0, :m], out.soft[1, :m])  # task tokens are everyone's
    assert (out.weights is None) == (k == 0)


def test_the_gain_starts_at_the_llms_norm(make):
    embedder = make(differ=False)
    torch.testing.assert_close(embedder.log_gain.exp(), torch.full((8,), NORM))
    start = torch.randn(8, WIDTH) * 50
    given_start = make_embedder(embedder.config, NORM, start)
    torch.testing.assert_close(given_start.tokens.detach(), normalize(start, dim=-1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_untrained_plug_hardly_depends_on_the_user(make, recipe):
    """Training begins from a task prompt: a user turns a soft token by a few hundredths at most."""
    embedder = make(recipe, differ=False)
    soft = embedder(draw_batch(embedder.config, [0, 1, 9, 3], seed=3)).soft.detach()
    turned = (soft - soft[:1]).norm(dim=-1) / NORM
    assert turned.max() < 0.05
    trained = make(recipe)
    soft = trained(draw_batch(trained.config, [0, 1, 9, 3], seed=3)).soft.detach()
    assert ((soft - soft[:1]).norm(dim=-1) / NORM).max() > 0.1


# Dropout of histories


def test_history_dropout_is_for_training_and_seeded(make):
    embedder = make("mean")
    batch = draw_batch(embedder.config, [8] * 16)
    embedder.history_dropout, embedder.empty_history = 0.9, 0.2
    whole = embedder(batch)
    assert (whole.weights > 0).all()
    embedder.train()
    torch.manual_seed(5)
    first = embedder(batch)
    torch.manual_seed(5)
    again = embedder(batch)
    torch.testing.assert_close(first.soft, again.soft, atol=0, rtol=0)
    assert not torch.allclose(first.soft, embedder(batch).soft)
    kept = (first.weights > 0).sum(1)
    assert kept.min() < 8
    assert len(set(kept.tolist())) > 2  # a share of its own for each row
    embedder.eval()
    torch.testing.assert_close(embedder(batch).soft, whole.soft, atol=0, rtol=0)


def test_no_dropout_in_training_unless_asked_for(make):
    embedder = make()
    batch = draw_batch(embedder.config, [4, 0])
    expected = embedder(batch).soft
    torch.testing.assert_close(embedder.train()(batch).soft, expected)


def test_emptied_rows_equal_rows_without_history(make):
    embedder = make()
    batch = draw_batch(embedder.config, [4, 3])
    empty = changed(batch, mask=torch.zeros_like(batch.mask))
    expected = embedder(empty).soft
    embedder.empty_history = 1.0
    torch.testing.assert_close(embedder.train()(batch).soft, expected, atol=1e-5, rtol=1e-5)


def test_the_null_item_starts_at_the_population(make):
    population = torch.tensor([0.7, 0.2, 0.1])
    embedder = make()
    embedder.set_population(population)
    torch.testing.assert_close(embedder.null_answers.softmax(0), population)
    for without in (make(answers=None), make(user_tokens=0, task_tokens=2)):
        before = {name: tensor.clone() for name, tensor in without.state_dict().items()}
        without.set_population(population)
        assert all(torch.equal(tensor, before[name]) for name, tensor in without.state_dict().items())


# --- lengths as in PPlug's code


@pytest.mark.parametrize("recipe", ["default", "paper", "uem", "persoma"])
def test_a_fixed_scale_takes_the_place_of_learned_lengths(recipe):
    config = PlugConfig.create(
        "llm", "encoder", recipe, llm_width=WIDTH, encoder_dim=DIM, task_tokens=2, fixed_scale=14.0
    )
    embedder = make_embedder(config, NORM).eval()
    assert not embedder.log_gain.requires_grad
    gains = embedder.log_gain.exp()
    torch.testing.assert_close(gains, torch.tensor([2.0] * 2 + [14.0] * (len(gains) - 2)))
