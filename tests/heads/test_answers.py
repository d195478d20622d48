"""The answers head: words, own answers near the request, the order of ratings, folds."""

import pytest
import torch
from torch.nn.functional import normalize

from persona_plug.config import PlugConfig
from persona_plug.embedder.batch import HistoryBatch
from persona_plug.errors import DataError
from persona_plug.heads.answers import AnswersHead, answer_gaps, combine, neighbourhood

DIM, WIDTH = 6, 10
RATINGS, TAGS = ("1", "2", "3", "4"), ("rock", "jazz", "folk")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[RATINGS, TAGS], ids=["ratings", "tags"])
def head(request):
    head = AnswersHead(request.param, DIM, WIDTH)
    for seed, name in enumerate(("weight", "offset")):
        getattr(head, name).copy_(drawn(*getattr(head, name).shape, seed=seed))
    head.population.copy_(drawn(len(request.param), seed=5).softmax(0))
    for name, value in (("power", 0.8), ("pseudo", 1.5), ("sharpness", 3.0), ("fading", 0.4)):
        getattr(head, name).fill_(value)
    head.spread.fill_(0.3 if request.param is RATINGS else 0.0)
    return head


def batch_of(head, answers):
    """Rows whose items give these answers, None being none of the plug's; padded."""
    n, count = max(map(len, answers)), len(head.offset)
    mask = torch.tensor([[i < len(row) for i in range(n)] for row in answers])
    given = torch.zeros(len(answers), n, count)
    for b, row in enumerate(answers):
        for i, answer in enumerate(row):
            if answer is not None:
                given[b, i, answer] = 1
    keys = normalize(drawn(len(answers), n, DIM, seed=7), dim=-1)
    text = drawn(len(answers), n, 2 * DIM, seed=8)  # what the projector reads of an item stands in front
    request = normalize(drawn(len(answers), DIM, seed=9), dim=-1)
    return HistoryBatch(request, keys, torch.cat([text, given], -1), mask)


def test_the_score_is_that_of_words_and_of_own_answers_near_the_request(head):
    rows = [[0, 1, 1, None], [2], []]
    batch, prompts = batch_of(head, rows), drawn(3, WIDTH, seed=11)
    found = head(batch, prompts)
    count = len(head.offset)
    for b, row in enumerate(rows):
        words = head.weight[:, :DIM] @ batch.request[b] + head.weight[:, DIM:] @ prompts[b] + head.offset
        mass = 1.5 * head.population
        for i, answer in enumerate(row):
            if answer is not None:
                mass[answer] += (3 * (batch.keys[b, i] @ batch.request[b] - 1)).exp() / (len(row) - i) ** 0.4
        shares, everyone = mass / mass.sum(), head.population
        if head.spread:
            table = torch.tensor([[0.3 ** abs(i - j) for j in range(count)] for i in range(count)])
            table = table / table.sum(1, keepdim=True)
            shares, everyone = shares @ table, everyone @ table
        torch.testing.assert_close(found[b], words + 0.8 * (shares / everyone).log(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2], head.weight @ torch.cat([batch.request[2], prompts[2]]) + head.offset)


def test_a_near_item_counts_more_than_a_far_one(head):
    batch = batch_of(head, [[0, 1]])
    batch.keys[0, 0], batch.keys[0, 1] = batch.request[0], -batch.request[0]
    head.spread.zero_()
    gain = head(batch, drawn(1, WIDTH)) - head(batch_of(head, [[]]), drawn(1, WIDTH))
    head.sharpness.zero_()
    alike = head(batch, drawn(1, WIDTH)) - head(batch_of(head, [[]]), drawn(1, WIDTH))
    assert gain[0, 0] > alike[0, 0]
    assert gain[0, 1] < alike[0, 1]


def test_a_late_item_counts_more_than_an_early_one(head):
    batch = batch_of(head, [[0, 1], [1, 0]])
    batch.keys[:] = batch.request.unsqueeze(1)
    head.spread.zero_()
    head.weight.zero_()
    head.population.fill_(1 / len(head.population))
    early, late = (head(batch, drawn(2, WIDTH)) - head.offset)[:, :2]
    assert early[1] > early[0]
    assert late[0] > late[1]


def test_a_rating_speaks_for_the_ratings_beside_it():
    head = AnswersHead(RATINGS, DIM)
    head.power.fill_(1.0)
    head.spread.fill_(0.5)
    batch = batch_of(head, [[3, 3, 3]])
    scores = head(batch, None)[0].tolist()
    assert scores == sorted(scores)
    head.spread.zero_()
    assert len(set(head(batch, None)[0, :3].tolist())) == 1


@pytest.mark.parametrize(
    ("answers", "gaps"),
    [
        (("1", "2", "5"), [[0, 1, 2], [1, 0, 1], [2, 1, 0]]),
        (("10", "-1", "2.5"), [[0, 2, 1], [2, 0, 1], [1, 1, 0]]),
        (("a", "b"), [[0, float("inf")], [float("inf"), 0]]),
    ],
)
def test_answers_are_as_far_apart_as_they_stand(answers, gaps):
    assert answer_gaps(answers).tolist() == gaps


@pytest.mark.parametrize("spread", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("answers", [RATINGS, TAGS])
def test_what_an_answer_speaks_for_sums_to_one(answers, spread):
    table = neighbourhood(answer_gaps(answers), torch.tensor(spread))
    torch.testing.assert_close(table.sum(1), torch.ones(len(answers)))
    if answers is TAGS or not spread:
        assert torch.equal(table, torch.eye(len(answers)))


def test_a_head_without_summaries_reads_requests_alone(head):
    batch = batch_of(head, [[0], [1]])
    assert head.reads_prompt
    head.weight[:, DIM:] = 0
    assert not head.reads_prompt
    torch.testing.assert_close(head(batch, None), head(batch, drawn(2, WIDTH)))


def test_each_row_is_judged_by_its_fold(head):
    head.crossed = drawn(3, len(head.offset), DIM + WIDTH + 1, seed=3)
    batch, prompts, folds = batch_of(head, [[0], [0], [1]]), drawn(3, WIDTH), torch.tensor([2, 0, 2])
    found = head(batch, prompts, folds)
    for fold in (0, 2):
        head.weight.copy_(head.crossed[fold, :, :-1])
        head.offset.copy_(head.crossed[fold, :, -1])
        torch.testing.assert_close(head(batch, prompts)[folds == fold], found[folds == fold])
    assert not any(name.startswith("crossed") for name in head.state_dict())


def test_the_llm_counts_by_its_weight_or_not_at_all(head):
    loglik, bias = drawn(2, len(head.offset)), drawn(2, len(head.offset), seed=1)
    torch.testing.assert_close(combine(head, loglik, bias), 0.1 * loglik + bias)
    assert combine(None, loglik, None) is loglik
    head.llm_share.zero_()
    torch.testing.assert_close(combine(head, loglik, bias), bias)


def test_vectors_that_are_not_finite_are_refused(head):
    batch = batch_of(head, [[0], [1]])
    batch.request[1, 0] = float("nan")
    with pytest.raises(DataError, match="row 1: request vectors"):
        head(batch, drawn(2, WIDTH))


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, DIM + WIDTH),
        ({"placement": "prefix"}, DIM),  # no request in front of the soft tokens
        ({"prompt_width": 0}, DIM),
        ({"answers": None}, None),
        ({"answer_head": False}, None),
        ({"user_tokens": 0}, None),
        ({"recipe": "persoma"}, None),
    ],
)
def test_which_plugs_have_a_head(changes, width):
    recipe = changes.pop("recipe", "default")
    config = PlugConfig.create(
        "l", "e", recipe, **{"answers": TAGS, "encoder_dim": DIM, "prompt_width": WIDTH} | changes
    )
    head = AnswersHead.of(config)
    assert (None if head is None else head.weight.shape[1]) == width
