"""Fitting the answers head on what it sees: requests, summaries of prompts, users' own answers."""

from dataclasses import replace

import pytest
import torch

from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData
from persona_plug.errors import DataError
from persona_plug.fit import answers as fitting
from persona_plug.fit.loop import calibrate, start_answers
from persona_plug.heads.answers import Look, look

DIM, WIDTH = 12, 8
TAGS, RATINGS = ("a", "b", "c"), ("1", "2", "3", "4", "5")


def seen(n, count, noise, rule, seed, users=40, width=WIDTH):
    """N samples whose answer is that of the largest score; `rule(request, prompt, habit)` gives scores (n, C)."""
    draw = torch.Generator().manual_seed(seed)
    request = torch.nn.functional.normalize(torch.randn(n, DIM, generator=draw), dim=-1)
    prompts = torch.randn(n, width, generator=draw)
    habit = torch.randn(users, count, generator=draw)[torch.arange(n) % users]
    scores = rule(request, prompts, habit) + noise * torch.randn(n, count, generator=draw)
    own = (2 * habit).softmax(-1).multinomial(12, replacement=True, generator=draw)
    history = Look(
        torch.rand(n, 12, generator=draw),
        12 - torch.arange(12.0).expand(n, 12),
        torch.nn.functional.one_hot(own, count).float(),
    )
    return fitting.Seen(request, prompts, history, scores.argmax(1))


@pytest.fixture
def fit(make_plug, monkeypatch):
    """`fit(train, valid, answers)` gives the fitted head."""

    def run(train, valid, answers=TAGS):
        plug = make_plug(answers=answers)
        head = fitting.AnswersHead(answers, DIM, train.prompts.shape[1])
        plug.answers = head
        samples = [Example(f"u{i % 40}", "", "") for i in range(len(train.gold))]
        data = FitData(samples, [samples[0]], [], "{input}", answers)
        parts = iter((train, valid))
        monkeypatch.setattr(fitting, "read", lambda *_: next(parts))
        fitting.fit_answers(plug, data)
        return head

    return run


def loss(head, part, prompts=True, history=True):
    seen_history = part.history if history else replace(part.history, given=0 * part.history.given)
    words = torch.cat([part.request, part.prompts * prompts], 1) @ head.weight.T + head.offset
    table = fitting.neighbourhood(head.gaps, head.spread)
    numbers = head.population, head.pseudo, head.sharpness, head.fading, table
    scores = words + head.power * fitting.evidence(seen_history, *numbers)
    return float(torch.nn.functional.cross_entropy(scores, part.gold))


MAPS = {
    "request": torch.randn(DIM, 5, generator=torch.Generator().manual_seed(1)),
    "prompt": torch.randn(WIDTH, 5, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize(
    ("rule", "reads_prompt", "reads_history"),
    [
        (lambda x, s, u: 9 * x @ MAPS["request"][:, :3], False, False),
        (lambda x, s, u: 2 * s @ MAPS["prompt"][:, :3], True, False),
        (lambda x, s, u: 4 * u, False, True),
        (lambda x, s, u: 2 * s @ MAPS["prompt"][:, :3] + 3 * u, True, True),
        (lambda x, s, u: 0 * u, False, False),
    ],
    ids=["request", "prompt", "user", "prompt and user", "nothing"],
)
def test_what_helps_validation_users_counts_and_nothing_else(fit, rule, reads_prompt, reads_history):
    parts = [seen(400, 3, 1.0, rule, seed) for seed in (0, 1, 2)]
    head = fit(*parts[:2])
    test = parts[2]
    prior = float(torch.nn.functional.cross_entropy(head.population.log().expand(400, 3), test.gold))
    assert loss(head, test) < prior + 0.03
    gains = {"prompt": loss(head, test, prompts=False), "history": loss(head, test, history=False)}
    gains = {name: without - loss(head, test) for name, without in gains.items()}
    assert (gains["prompt"] > 0.1) == reads_prompt
    assert (gains["history"] > 0.1) == reads_history
    assert all(gain > -0.03 for gain in gains.values())


def test_a_history_that_misleads_validation_users_is_left_out(fit):
    def turned(x, s, u):
        return -4 * u

    head = fit(seen(400, 3, 1.0, lambda x, s, u: 4 * u, 0), seen(200, 3, 1.0, turned, 1))
    assert float(head.power) == 0


def test_near_items_count_more_where_they_tell_more(fit):
    def part(seed):
        made = seen(600, 3, 0.5, lambda x, s, u: 0 * u, seed)
        nearest = made.history.nearness.argmax(1)
        made.history.given[torch.arange(600), nearest] = torch.nn.functional.one_hot(made.gold, 3).float()
        return made

    head = fit(part(0), part(1))
    assert float(head.sharpness) > 3
    alike = fit(*(seen(600, 3, 0.5, lambda x, s, u: 4 * u, seed) for seed in (0, 1)))
    assert float(alike.sharpness) < 1.5


def test_late_items_count_more_where_habits_change(fit):
    def part(seed):
        made = seen(600, 3, 0.5, lambda x, s, u: 0 * u, seed)
        made.history.given[:, -2:] = torch.nn.functional.one_hot(made.gold, 3).float().unsqueeze(1)
        return made

    assert float(fit(part(0), part(1)).fading) > 0.5
    alike = fit(*(seen(600, 3, 0.5, lambda x, s, u: 4 * u, seed) for seed in (0, 1)))
    assert abs(float(alike.fading)) < 0.3


def test_ratings_lend_each_other_weight(fit):
    """A user's level, with their ratings spread around it: their neighbours tell of each other."""

    def part(seed):
        draw = torch.Generator().manual_seed(seed)
        level = (torch.arange(400) % 40 % 5).float()
        made = seen(400, 5, 0.0, lambda x, s, u: -((torch.arange(5) - level.unsqueeze(1)) ** 2), seed)
        near = (level.unsqueeze(1) + torch.randn(400, 12, generator=draw)).round().clamp(0, 4).long()
        made.history.given.copy_(torch.nn.functional.one_hot(near, 5).float())
        made.history.given[:, :-2] = 0  # two items each
        return made

    head = fit(part(0), part(1), RATINGS)
    assert float(head.spread) > 0.1
    assert float(fit(*(seen(400, 3, 0.5, lambda x, s, u: 4 * u, seed) for seed in (0, 1))).spread) == 0


def test_an_answer_that_never_occurs_stays_possible(fit):
    def rule(x, s, u):
        return torch.cat([9 * x @ MAPS["request"][:, :2], torch.full((len(x), 1), -100.0)], 1)

    head = fit(seen(200, 3, 1.0, rule, 0), seen(100, 3, 1.0, rule, 1))
    part = seen(100, 3, 1.0, rule, 2)
    chances = (torch.cat([part.request, part.prompts], 1) @ head.weight.T + head.offset).softmax(-1)
    assert torch.isfinite(chances).all()
    assert 0 < float(chances[:, 2].mean()) < 0.1


def test_a_summary_without_any_difference_counts_nothing(fit):
    def rule(x, s, u):
        return 9 * x @ MAPS["request"][:, :3]

    parts = [seen(200, 3, 1.0, rule, seed) for seed in (0, 1)]
    for part in parts:
        part.prompts.fill_(3.0)
    assert not fit(*parts).weight[:, DIM:].any()


def test_folds_have_not_seen_their_users(fit, monkeypatch):
    """Users whose answers are all alike: a fold that had seen them would know."""
    fitted = []
    monkeypatch.setattr(
        fitting,
        "_part_words",
        lambda train, rows, *rest, run=fitting._part_words: fitted.append(rows) or run(train, rows, *rest),
    )
    rule = MAPS["request"][:, :3]
    head = fit(*(seen(200, 3, 1.0, lambda x, s, u: 9 * x @ rule, seed) for seed in (0, 1)))
    users = [f"u{i % 40}" for i in range(200)]
    folds = fitting.folds_of([Example(user, "", "") for user in users])
    assert len(head.crossed) == len(fitted) == fitting.FOLDS
    for fold, rows in enumerate(fitted):
        assert not {u for u, used in zip(users, rows.tolist(), strict=True) if used} & {
            u for u, own in zip(users, folds.tolist(), strict=True) if own == fold
        }
        assert rows.sum() == (folds != fold).sum()


# With a plug


WORDS = ("sport", "music", "food", "rain", "night", "train", "river", "paper")


def data_of(answers=("4", "5"), users=12):
    def sample(u, i):
        words = [WORDS[(u + i) % 8], WORDS[(u * 3 + i) % 8]]
        return f"rate {' '.join(words)} {i}", answers[(u + i * (u % 2)) % len(answers)]

    examples = []
    for u in range(users):
        items = [HistoryItem(*sample(u, i)) for i in range(u % 4 + 1)]
        examples += [Example(f"u{u}", *sample(u, i), tuple(items)) for i in range(5, 8)]
    return FitData(examples[:-9], examples[-9:], [], "{input}", tuple(answers))


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-t5"])
def test_a_plug_reads_what_its_head_will_see(make_plug, llm):
    plug, data = make_plug(llm, answers=("4", "5")), data_of()
    plug.splicer.plan([plug.prompter.parts(e.input).left for e in data.train])
    found = fitting.read(plug, data.train)
    batch = plug.table(data.train).batch(data.train)
    lefts = [plug.prompter.parts(e.input).left for e in data.train]
    torch.testing.assert_close(found.request, batch.request)
    for name in ("nearness", "given", "place"):
        torch.testing.assert_close(getattr(found.history, name), getattr(look(batch, 2), name))
    torch.testing.assert_close(found.prompts, plug.splicer.summaries(lefts, plug.splicer.states(lefts)))
    assert found.gold.tolist() == [("4", "5").index(e.output) for e in data.train]


@pytest.mark.parametrize("why", ["prefix", "an LLM that keeps nothing", "trained inside"])
def test_where_no_state_is_kept_the_request_alone_is_read(make_plug, why, monkeypatch):
    if why == "an LLM that keeps nothing":
        monkeypatch.setattr("persona_plug.splice.causal.CausalSplicer.summary_width", 0)
    plug = make_plug(answers=("4", "5"), placement="prefix" if why == "prefix" else "suffix")
    plug.splicer.frozen = why != "trained inside"
    fitting.fit_answers(plug, data_of())
    assert not plug.answers.reads_prompt
    assert torch.isfinite(plug.score("rate sport", history=[{"input": "rate music", "output": "4"}])).all()


def test_training_sees_honest_scores_of_every_sample(make_plug):
    plug, data = make_plug(answers=("4", "5")), data_of()
    folds = start_answers(plug, data)
    assert folds.tolist() == fitting.folds_of(data.train).tolist()
    torch.testing.assert_close(plug.embedder.null_answers.softmax(0), plug.answers.population)
    assert plug.answers.crossed.shape == (
        fitting.FOLDS,
        *plug.answers.weight[:, :-1].shape[:1],
        plug.answers.weight.shape[1] + 1,
    )


def test_a_plug_without_a_head_has_none_to_fit(make_plug):
    with pytest.raises(DataError, match="no answers head"):
        fitting.fit_answers(make_plug(answers=("4", "5"), answer_head=False), data_of())


@pytest.mark.parametrize("llm_knows", [True, False])
def test_the_llm_counts_where_validation_users_do_better_with_it(make_plug, monkeypatch, llm_knows):
    plug, data = make_plug(answers=("4", "5")), data_of()
    gold = torch.tensor([("4", "5").index(e.output) for e in data.valid])
    right = 4.0 * torch.nn.functional.one_hot(gold, 2)
    alone = torch.randn(len(gold), 2, generator=torch.Generator().manual_seed(0))

    def scores(plug, samples, parts, batch_size):
        return alone if list(parts) == ["answers"] else (right if llm_knows else -right)

    monkeypatch.setattr("persona_plug.fit.loop.score_outputs", scores)
    temperature, helps = calibrate(plug, data.valid)
    assert helps == llm_knows == bool(plug.answers.llm_share)
    assert float(plug.embedder.score_temperature) == pytest.approx(temperature)
