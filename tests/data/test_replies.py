import itertools
import json
import re
from collections import Counter, defaultdict

import pytest
from typer.testing import CliRunner

from persona_plug.cli.main import app
from persona_plug.data import _reply_words as words
from persona_plug.data import replies
from persona_plug.data.replies import CHECKS, HABITS, LENGTHS, Habits, build, check
from persona_plug.data.splits import prepare
from persona_plug.errors import ConfigError, DataError

SET = build(users=60, items_per_user=20, seed=1)
CONTROL = build(users=60, items_per_user=20, seed=1, personal=False)


def checks(made):
    for record in made.records:
        facts = made.facts[record["id"]]
        yield record, facts, check(record["output"], record["input"], made.habits[facts["author"]])


# --- gold answers


@pytest.mark.parametrize("made", [SET, CONTROL, build(200, 4, 9, held_out=0.5)], ids=["personal", "control", "many"])
def test_a_gold_answer_keeps_every_habit_but_the_one_it_departs_from(made):
    departures = Counter()
    for record, facts, right in checks(made):
        wrong = {name for name, kept in right.items() if not kept}
        expected = {facts["departure"]} - {None}
        assert wrong == expected, (record, facts, made.habits[facts["author"]])
        departures[facts["departure"]] += 1
    assert set(departures) == {None, *HABITS}
    assert departures.total() / 14 < departures.total() - departures[None] < departures.total() / 7


def test_without_slips_every_habit_is_kept():
    assert all(all(right.values()) for _, _, right in checks(build(40, 5, slip=0)))


# --- the checks see what is wrong

MANNER = Habits(
    "Ahoy {customer}!", "Best wishes,", "Tilda", "🦊", "usual", "short", "warm", 42, True, False, False, (0,), {}
)
REQUEST = "My tea kettle from order 4711 has not arrived yet. Where is it? Thank you, Wei"
GOOD = "Ahoy Wei!\nThe tea kettle of order 4711 is moving again. 🦊\nBest wishes,\nTilda, desk 42"
WRONG = {
    "other greeting": (GOOD.replace("Ahoy", "Howdy"), {"greeting"}),
    "other mark": (GOOD.replace("Wei!", "Wei,"), {"greeting"}),
    "other customer": (GOOD.replace("Wei", "Priya"), {"greeting", "no_foreign_name"}),
    "invented customer": (GOOD.replace("Wei", "Hilari"), {"greeting"}),
    "no sign-off": (GOOD.replace("Best wishes,\n", ""), {"sign_off"}),
    "a longer sign-off": (GOOD.replace("Best wishes", "With best wishes"), {"sign_off"}),
    "text behind the sign-off": (GOOD + " and a lot more that goes on.", {"sign_off", "name"}),
    "other agent": (GOOD.replace("Tilda", "Otto"), {"name", "no_foreign_name"}),
    "no emoji": (GOOD.replace(" 🦊", ""), {"emoji"}),
    "other emoji": (GOOD.replace("🦊", "🎉"), {"emoji"}),
    "two emoji": (GOOD.replace("🦊", "🦊 🎉"), {"emoji"}),
    "lower case": (GOOD.lower(), {"case"}),
    "too short": ("Ahoy Wei! Tea kettle: sent. 🦊 Best wishes, Tilda", {"length"}),
    "too long": (GOOD.replace("again.", "again " + "and again " * 12 + "now."), {"length"}),
    "no product": (GOOD.replace("tea kettle", "parcel we have"), {"product"}),
    "other product": (GOOD.replace("tea kettle", "yoga mat"), {"product", "no_foreign_product"}),
    "one product too many": (GOOD.replace("of order", "with the webcam of order"), {"no_foreign_product"}),
    "other number": (GOOD.replace("4711", "4712"), {"no_foreign_number"}),
    "number of another desk": (GOOD.replace("desk 42", "desk 43"), {"no_foreign_number"}),
    "empty": ("", {"greeting", "sign_off", "name", "emoji", "case", "length", "product"}),
}


@pytest.mark.parametrize(("reply", "wrong"), WRONG.values(), ids=WRONG)
def test_each_fault_is_seen_and_nothing_else(reply, wrong):
    assert {name for name, right in check(reply, REQUEST, MANNER).items() if not right} == wrong


@pytest.mark.parametrize("reply", [GOOD, GOOD.replace("\n", " "), GOOD.replace("\n", "\n\n")])
def test_a_right_reply_is_right_whatever_its_white_space(reply):
    assert check(reply, REQUEST, MANNER) == dict.fromkeys(CHECKS, True)


def test_a_request_of_another_set_is_refused():
    with pytest.raises(DataError, match="names no customer or product"):
        check(GOOD, "Where is my parcel?", MANNER)


# --- users


def words_of(form):
    return re.sub(r"\{customer\}|[^\w' -]| -$", "", form).strip()


def test_forms_of_held_out_users_are_their_own():
    held = set(SET.meta["held_out"])
    assert len(held) == 12
    for habit in ("greeting", "sign_off", "name", "emoji"):
        forms = [{words_of(getattr(h, habit)) if habit != "emoji" else h.emoji
                  for user, h in SET.habits.items() if (user in held) == inside} - {""}
                 for inside in (True, False)]  # fmt: skip
        assert forms[0]
        assert forms[0].isdisjoint(forms[1]), habit


def test_there_are_many_forms_and_few_are_shared():
    train = [h for user, h in SET.habits.items() if user not in SET.meta["held_out"]]
    for habit in ("greeting", "sign_off"):
        forms = Counter(getattr(h, habit) for h in train)
        assert len(forms) >= 0.85 * len(train)
        assert len({words_of(f) for f in forms}) >= 12
    assert {h.case for h in train} == {"lower", "usual"}
    assert {h.length for h in train} == set(LENGTHS)
    assert {h.tone for h in train} == set(words.TONES)
    assert {"{customer}" in h.greeting for h in train} == {True, False}
    assert len({h.name for h in SET.habits.values()}) == 60


def test_lengths_overlap():
    spans = list(LENGTHS.values())
    assert all(low[1] > high[0] for low, high in itertools.pairwise(spans))


def test_wordings_differ_between_users_and_fit_the_matter():
    answers = [a for _, answers in words.MATTERS.values() for a in answers]
    assert len(set(answers)) >= 30
    written = defaultdict(set)
    for record, facts, _ in checks(SET):
        core = next(a for a in words.MATTERS[facts["matter"]][1]
                    if a.format(**facts).lower() in record["output"].lower())  # fmt: skip
        written[facts["matter"]].add(core)
    assert all(len(cores) >= 3 for cores in written.values())


def test_word_lists_cannot_be_mistaken_for_each_other():
    lines = [line for tone in words.TONES.values() for line in tone]
    lines += [text for pair in words.MATTERS.values() for side in pair for text in side]
    lines += [f for forms in (words.GREETINGS, words.SIGN_OFFS) for split in forms.values() for f in split]
    used = {w for line in lines for w in re.findall(r"\w+", line.casefold())}
    people = [*words.CUSTOMERS, *words.AGENTS["train"], *words.AGENTS["held_out"]]
    assert len(set(people)) == len(people)
    assert not used & {p.casefold() for p in people}
    assert not any(a != b and a in b for a in words.PRODUCTS for b in words.PRODUCTS)
    assert not any(p in line for p in words.PRODUCTS for line in lines)
    assert not any(c.isdigit() for line in lines for c in line)
    signs = [f for split in words.SIGN_OFFS.values() for f in split]
    assert not any(a != b and b.startswith(a + " ") for a in signs for b in signs)


# --- the control


def test_the_control_asks_the_same_and_knows_no_user():
    facts = [[{k: v for k, v in f.items() if k not in ("author", "departure")} for f in s.facts.values()]
             for s in (SET, CONTROL)]  # fmt: skip
    assert facts[0] == facts[1]
    assert [r["input"] for r in SET.records] == [r["input"] for r in CONTROL.records]
    own = sum(f["author"] == key.rsplit("-", 1)[0] for key, f in CONTROL.facts.items())
    assert own < 3 * len(CONTROL.records) / 60  # one user in sixty is the author by chance
    held = set(CONTROL.meta["held_out"])
    share = {inside: sum(f["author"] in held for k, f in CONTROL.facts.items()
                         if (k.rsplit("-", 1)[0] in held) == inside) for inside in (True, False)}  # fmt: skip
    assert share[True] / 240 == pytest.approx(0.2, abs=0.1)
    assert share[False] / 960 == pytest.approx(0.2, abs=0.05)


# --- the seed, the options, the files


def test_the_seed_decides_all():
    assert build(8, 3, 4).records == build(8, 3, 4).records
    assert build(8, 3, 4).records != build(8, 3, 5).records


@pytest.mark.parametrize(
    "wrong", [{"users": 1}, {"items_per_user": 0}, {"seed": -1}, {"held_out": 1.0}, {"held_out": -0.1}, {"slip": 2}]
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build(**wrong)


def test_the_command_writes_records_and_facts(tmp_path):
    out, facts = tmp_path / "r.jsonl", tmp_path / "facts.json"
    args = ["data", "synthetic", "--kind", "replies", "--out", str(out), "--facts", str(facts), "--users", "10",
            "--items", "4", "--held-out", "0.3", "--seed", "2"]  # fmt: skip
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    made = build(10, 4, 2, held_out=0.3)
    assert [json.loads(line) for line in out.read_text().splitlines()] == made.records
    known = json.loads(facts.read_text())
    assert known["held_out"] == made.meta["held_out"] == ["new-agent-0000", "new-agent-0001", "new-agent-0002"]
    assert {user: Habits.of(h) for user, h in known["users"].items()} == made.habits
    assert known["records"] == made.facts


@pytest.mark.parametrize("option", ["--held-out", "--facts"])
def test_options_of_replies_are_refused_for_other_kinds(tmp_path, option):
    args = ["data", "synthetic", "--out", str(tmp_path / "r.jsonl"), option, "0.3"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code != 0
    assert option in result.output
    assert not list(tmp_path.iterdir())


def test_those_that_the_set_holds_out_are_held_out(tmp_path):
    made = build(10, 4, 2, held_out=0.3)
    path = made.write(tmp_path / "r.jsonl")
    data = prepare(path)
    assert {e.user_id for e in data.held_out} == set(made.meta["held_out"])
    assert not {e.user_id for e in [*data.train, *data.valid]} & set(made.meta["held_out"])
    assert any("r.meta.json" in note and "3 users" in note for note in data.notes)
    assert len({e.user_id for e in prepare(path, held_out=0.5).held_out}) == 5
    assert prepare(path, held_out=0).held_out == []
    assert data.template == replies.TEMPLATE
    with pytest.raises(DataError, match="'nobody'"):
        prepare(path, held_out=["nobody"])
