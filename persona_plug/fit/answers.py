"""Fitting the answers head, before the steps: a regression on requests, and how much a user's own answers count."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from persona_plug.data.history import Example
from persona_plug.data.labels import levels_of
from persona_plug.data.splits import FitData
from persona_plug.errors import DataError
from persona_plug.heads.answers import AnswersHead, Look, evidence, look, neighbourhood
from persona_plug.measure.stats import spread
from persona_plug.model import PlugModel
from persona_plug.models.caching import uncached

logger = logging.getLogger(__name__)

SAMPLES, VALID_SAMPLES = 4000, 600  # that the head is fitted to, and chosen by
ROWS = 16  # prompts that run together
PROMPT_WEIGHTS = (0.0, 1.0, 2.0)  # of the prompt's summary beside the encoder's vector
PENALTIES = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
ORDERED = 0.5  # how much coefficients may follow the order of ratings, over how much they may differ without it
FOLDS = 5
ITERATIONS = 30


@dataclass(frozen=True, slots=True)
class Seen:
    """What the head reads of N samples.

    Attributes:
        request: (N, d) the requests' vectors.
        prompts: (N, D) the prompts' summaries; D is 0 where there are none.
        history: What is seen of the histories.
        gold: (N,) the number of the right answer.
    """

    request: Tensor
    prompts: Tensor
    history: Look
    gold: Tensor


@dataclass(frozen=True, slots=True)
class _Words:
    """A regression on views of requests: (C, d + D + 1) coefficients, the last column is the offset."""

    coefficients: Tensor

    def scores(self, seen: Seen) -> Tensor:
        views = torch.cat([seen.request, seen.prompts], 1)
        return views @ self.coefficients[:, :-1].T + self.coefficients[:, -1]


def folds_of(examples: Sequence[Example]) -> Tensor:
    """Return the fold (N,) of each sample's user."""
    return torch.from_numpy(np.unique([e.user_id for e in examples], return_inverse=True)[1] % FOLDS)


@torch.no_grad()
def fit_answers(plug: PlugModel, data: FitData) -> None:
    """Fit the plug's answers head in place; what does not help validation users is left out.

    Penalty and weight of the prompt's summary are chosen on them. How much a user's own answers count is fitted to
    training users by scores of regressions that did not see them, and these regressions stay in the head for the steps.

    Raises:
        DataError: The plug has no answers head.
    """
    head, answers = plug.answers, plug.config.answers
    if head is None or answers is None:
        raise DataError("this plug has no answers head: build it with answer_head=True and answers")
    some = spread(len(data.train), SAMPLES)
    train = read(plug, [data.train[i] for i in some])
    valid = read(plug, [data.valid[i] for i in spread(len(data.valid), VALID_SAMPLES)])
    folds = folds_of(data.train)[some]
    counts = torch.bincount(train.gold, minlength=len(answers)) + 1.0
    head.population.copy_(counts / counts.sum())
    weight, penalty, words = _choose_words(train, valid, answers)
    crossed = [_part_words(train, folds != fold, answers, weight, penalty) for fold in range(FOLDS)]
    honest = torch.stack([words.scores(train) for words in crossed])[folds, torch.arange(len(folds))]
    head.weight.zero_()  # an LLM that is trained inside gives no summaries, though the head has room for them
    head.weight[:, : words.coefficients.shape[1] - 1] = words.coefficients[:, :-1]
    head.offset.copy_(words.coefficients[:, -1])
    head.crossed = torch.stack([words.coefficients for words in crossed]).to(head.offset.device)
    gain = _fit_evidence(head, train, honest, valid, words.scores(valid))
    if gain <= 0:
        head.power.zero_()
    logger.info(
        "answers head: the LLM's states weigh %g, penalty %g; users' own answers save %.3f nats on validation users",
        *(weight, penalty, gain),
    )


def read(plug: PlugModel, examples: Sequence[Example]) -> Seen:
    """Return what the head reads of samples; the LLM runs over each prompt once, unless its states are kept."""
    answers = list(plug.config.answers or ())
    splicer = plug.plain_splicer  # adapters that are trained later would make other states
    width = splicer.summary_width if plug.config.placement == "suffix" else 0
    table = plug.table(examples)
    prompts = [parts.left for parts in plug.prompts(examples)]
    requests, looks = [], []
    for start in range(0, len(examples), ROWS):
        batch = table.batch(examples[start : start + ROWS])
        requests.append(batch.request)
        looks.append(look(batch, len(answers)))
    summaries = torch.zeros(len(examples), width)
    # States that will not all be kept run in full batches here, and once more where a step needs them.
    kept = any(len(group) > 1 for group in splicer.groups.values())
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    with nullcontext() if kept else uncached():
        for start in range(0, len(order) if width else 0, ROWS):
            rows = order[start : start + ROWS]
            lefts = [prompts[i] for i in rows]
            summaries[rows] = splicer.summaries(lefts, splicer.states(lefts)).to(summaries)
    gold = torch.tensor([answers.index(e.output.strip()) for e in examples])
    return Seen(torch.cat(requests), summaries, _joined(looks), gold)


def _joined(looks: Sequence[Look]) -> Look:
    """Return batches as one, padded to the longest history."""
    rows = {name: [row for part in looks for row in getattr(part, name)] for name in Look.__slots__}
    padding = {"place": 1}  # its logarithm is finite
    return Look(
        **{
            name: torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=padding.get(name, 0))
            for name, part in rows.items()
        }
    )


def _choose_words(train: Seen, valid: Seen, answers: Sequence[str]) -> tuple[float, float, _Words]:
    """Return the prompts' weight, the penalty and the regression that do best on validation users."""
    best: tuple[float, float, float, _Words] | None = None
    for weight in PROMPT_WEIGHTS if train.prompts.shape[1] else PROMPT_WEIGHTS[:1]:
        start = None
        for penalty in PENALTIES:
            words, start = _fit_words(train, answers, weight, penalty, start)
            loss = float(torch.nn.functional.cross_entropy(words.scores(valid), valid.gold))
            if best is None or loss < best[0]:
                best = loss, weight, penalty, words
    assert best is not None  # noqa: S101 - there is a penalty
    return best[1:]


def _part_words(train: Seen, rows: Tensor, answers: Sequence[str], weight: float, penalty: float) -> _Words:
    some = dataclasses.replace(train, request=train.request[rows], prompts=train.prompts[rows], gold=train.gold[rows])
    return _fit_words(some, answers, weight, penalty)[0]


def _fit_words(
    seen: Seen, answers: Sequence[str], weight: float, penalty: float, start: Tensor | None = None
) -> tuple[_Words, Tensor]:
    """Fit multinomial logistic regression by its penalised likelihood.

    Each answer is seen once more, at the mean request, so that one which never occurs stays possible.

    Returns:
        The regression, and where the search for one of another penalty may start.
    """
    views = torch.cat([seen.request, seen.prompts], 1)
    mean = views.mean(0)
    scale = torch.ones(views.shape[1])
    width = seen.prompts.shape[1]
    if width:
        size = seen.prompts.std(0, correction=0) * width**0.5  # summaries are as long as vectors then
        scale[-width:] = torch.where(size > 0, weight / size.clamp(min=1e-9), torch.zeros(()))
    x = torch.cat([(views - mean) * scale, torch.zeros(len(answers), views.shape[1])])
    gold = torch.cat([seen.gold, torch.arange(len(answers))])
    solution = _regress(x, gold, _line(answers), penalty, start)
    slopes = _slopes(solution, _line(answers))
    coefficients = slopes[:, :-1] * scale
    offset = slopes[:, -1] - coefficients @ mean
    return _Words(torch.cat([coefficients, offset.unsqueeze(1)], 1)), solution


@torch.enable_grad()
def _regress(x: Tensor, gold: Tensor, line: Tensor, penalty: float, start: Tensor | None) -> Tensor:
    """Return (1 + C, F + 1): coefficients that all answers share along `line`, and each answer's own; see `_slopes`."""
    if start is None:
        start = torch.zeros(len(line) + 1, x.shape[1] + 1)
    solution = start.clone().requires_grad_()
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)

    def loss() -> Tensor:
        fit = torch.nn.functional.cross_entropy(ones @ _slopes(solution, line).T, gold, reduction="sum")
        return (fit + penalty / 2 * solution[:, :-1].square().sum()) / len(gold)

    return _minimise(loss, [solution], ITERATIONS)[0]


def _slopes(solution: Tensor, line: Tensor) -> Tensor:
    return solution[1:] + ORDERED * line.unsqueeze(1) * solution[:1]


def _line(answers: Sequence[str]) -> Tensor:
    """Return where each answer stands among the others, (C,), with mean 0 and variance 1; 0 without an order."""
    levels = levels_of(answers)
    if levels is None:
        return torch.zeros(len(answers))
    places = torch.tensor(levels).argsort().argsort().float()
    return (places - places.mean()) / places.std(correction=0)


@torch.enable_grad()
def _fit_evidence(head: AnswersHead, train: Seen, honest: Tensor, valid: Seen, judged: Tensor) -> float:
    """Fit how much a user's own answers count; return the nats that they save on validation users.

    Args:
        head: Is changed in place.
        train: What is seen of training samples.
        honest: (N, C) their scores by regressions that did not see their users.
        valid: What is seen of validation samples.
        judged: Their scores.
    """
    ordered = bool(torch.isfinite(head.gaps).all())
    gaps, population = head.gaps.cpu(), head.population.cpu()
    # Where the search starts: pseudo as logarithm, spread as log odds.
    start = {"power": 1.0, "pseudo": 0.0, "sharpness": 1.0, "fading": 0.0, "spread": -1.5}
    numbers = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}

    def shares(seen: Seen) -> Tensor:
        spread_ = numbers["spread"].sigmoid() if ordered else torch.zeros(())
        weights = numbers["pseudo"].exp(), numbers["sharpness"], numbers["fading"]
        return numbers["power"] * evidence(seen.history, population, *weights, neighbourhood(gaps, spread_))

    def loss() -> Tensor:
        # A weak pull to the start: without histories nothing else would hold the numbers.
        pull = sum((numbers[name] - value) ** 2 for name, value in start.items())
        return torch.nn.functional.cross_entropy(honest + shares(train), train.gold) + 1e-4 * pull

    _minimise(loss, list(numbers.values()), 2 * ITERATIONS)
    with torch.no_grad():
        for name in ("power", "sharpness", "fading"):
            getattr(head, name).copy_(numbers[name])
        head.pseudo.copy_(numbers["pseudo"].exp())
        head.spread.copy_(numbers["spread"].sigmoid() if ordered else torch.zeros(()))
        without, with_ = (
            torch.nn.functional.cross_entropy(scores, valid.gold) for scores in (judged, judged + shares(valid))
        )
    return float(without - with_)


def _minimise(loss: Callable[[], Tensor], numbers: list[Tensor], iterations: int) -> list[Tensor]:
    search = torch.optim.LBFGS(numbers, max_iter=iterations, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    search.step(step)
    return [number.detach() for number in numbers]
