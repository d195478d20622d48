import json

import pytest

from persona_plug.data.history import HistoryItem, read_events
from persona_plug.data.lamp import LAMP_FIELDS, leave_one_out_profiles, read_lamp, shared_instruction, write_events
from persona_plug.data.splits import prepare
from persona_plug.errors import DataError

MOVIE = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
    "explanation. tags: [sci-fi, based on a book, comedy] description: "
)
NEWS = (
    "Which category does this article relate to among the following categories? categories: [sports, travel] article: "
)
RATING = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
    "further explanation. review: "
)
CITATION = 'For an author who has written the paper with the title "'

# task -> instruction, two requests, two gold outputs, a profile item, and how that item is to be read
TASKS = {
    "LaMP_1": (
        CITATION,
        [
            'Alpha", which reference is related? Just answer with [1] or [2] without explanation. [1]: "A" [2]: "B"',
            'On Beta", which reference is related? Just answer with [1] or [2] without explanation. [1]: "C" [2]: "D"',
        ],
        ["[1]", "[2]"],
        {"id": "10", "title": "My paper", "abstract": "We show"},
        ("We show", "My paper"),
    ),
    "LaMP_2": (
        MOVIE,
        ["Two robots meet.", "A king returns."],
        ["sci-fi", "comedy"],
        {"id": "10", "tag": "comedy", "description": "A clown."},
        ("A clown.", "comedy"),
    ),
    "LaMP_2N": (
        NEWS,
        ["The match ended.", "A week in Rome."],
        ["sports", "travel"],
        {"id": "10", "text": "They won.", "title": "Won!", "category": "sports"},
        ("They won.", "sports"),
    ),
    "LaMP_3": (
        RATING,
        ["Very good.", "Broke at once."],
        ["5", "1"],
        {"id": "10", "text": "Fine.", "score": "4"},
        ("Fine.", "4"),
    ),
    "LaMP_4": (
        "Generate a headline for the following article: ",
        ["The mayor spoke.", "Rain fell."],
        ["Mayor speaks", "Rain"],
        {"id": "10", "text": "Snow fell.", "title": "Snow"},
        ("Snow fell.", "Snow"),
    ),
    "LaMP_5": (
        "Generate a title for the following abstract of a paper: ",
        ["We prove a bound.", "A new model."],
        ["A bound", "A model"],
        {"id": "10", "title": "My paper", "abstract": "We show"},
        ("We show", "My paper"),
    ),
    "LaMP_7": (
        "Paraphrase the following tweet without any explanation before or after it: ",
        ["I am tired.", "What a day!"],
        ["sooo tired", "what. a. day."],
        {"id": "10", "text": "lol ok"},
        ("", "lol ok"),
    ),
}


def write(folder, questions, golds=None, task="LaMP_3"):
    """Write LaMP's files in their published shape and return their paths."""
    paths = folder / "train_questions.json", folder / "train_outputs.json"
    paths[0].write_text(json.dumps(questions), encoding="utf-8")
    if golds is None:
        return paths[0], None
    paths[1].write_text(json.dumps({"task": task, "golds": golds}), encoding="utf-8")
    return paths


def published(task):
    """Return a task's questions and golds as they are published; each question has a profile of its own."""
    instruction, requests, outputs, item, _ = TASKS[task]
    questions = [
        {"id": f"{n}1", "input": instruction + r, "profile": [item, item | {"id": f"{n}9"}]}
        for n, r in enumerate(requests)
    ]
    return questions, [{"id": f"{n}1", "output": o} for n, o in enumerate(outputs)]


# --- reading what is published


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_read_as_published(tmp_path, task):
    instruction, requests, outputs, _, pair = TASKS[task]
    questions, golds = published(task)
    data = read_lamp(*write(tmp_path, questions, golds[::-1], task))  # the gold is aligned by id, not by place
    assert data.task == task
    assert data.template == instruction + "{input}"
    assert [e.input for e in data.examples] == requests
    assert [e.output for e in data.examples] == outputs
    assert [e.id for e in data.examples] == [e.user_id for e in data.examples] == ["01", "11"]
    for example in data.examples:
        assert [(i.input, i.output) for i in example.history] == [pair, pair]
    assert [i.id for i in data.examples[0].history] == ["10", "09"]


def test_every_field_pair_is_covered_here():
    pairs = {p for p in LAMP_FIELDS if p != ("original", "text")}
    items = [t[3] for t in TASKS.values()]
    used = {next(p for p in LAMP_FIELDS if p[1] in i and (not p[0] or p[0] in i)) for i in items}
    assert used == pairs


def test_rewriting_with_both_sides_known(tmp_path):
    question = {"id": 1, "input": "x", "profile": [{"original": "Good day.", "text": "hiya", "title": "no"}]}
    (example,) = read_lamp(write(tmp_path, [question])[0]).examples
    assert example.history == (HistoryItem("Good day.", "hiya"),)


@pytest.mark.parametrize(
    ("fields", "pair"),
    [
        (("title", "abstract"), ("My paper", "We show")),  # not the pair that LAMP_FIELDS would find
        (("", "abstract"), ("", "We show")),
        (("overall+title+summary+empty+abstract", "abstract+title"), ("5.0 My paper We show", "We show My paper")),
    ],
)
def test_fields_of_an_item_can_be_named(tmp_path, fields, pair):
    item = {"id": "3", "title": "My paper", "abstract": "We show", "overall": 5.0, "summary": None, "empty": ""}
    path = write(tmp_path, [{"id": "1", "input": "x", "profile": [item]}])[0]
    (example,) = read_lamp(path, fields=fields).examples
    assert example.history == (HistoryItem(*pair, None, "3"),)


def test_named_fields_that_an_item_lacks_are_said(tmp_path):
    path = write(tmp_path, [{"id": "1", "input": "x", "profile": [{"title": "t", "abstract": "a"}]}])[0]
    with pytest.raises(DataError, match=r"profile item 0: lacks one of the fields 'title\+text' and 'abstract'"):
        read_lamp(path, fields=("title+text", "abstract"))


def test_numbers_become_texts(tmp_path):
    questions = [{"id": 7, "input": "a b", "profile": [{"id": 3, "text": "x", "score": 4}]}]
    (example,) = read_lamp(*write(tmp_path, questions, [{"id": "7", "output": 5}])).examples
    assert (example.id, example.output, example.history[0].output) == ("7", "5", "4")


def test_without_gold_outputs_are_empty(tmp_path):
    questions, _ = published("LaMP_3")
    data = read_lamp(write(tmp_path, questions)[0])
    assert ([e.output for e in data.examples], data.task) == (["", ""], "")


def test_an_empty_profile_is_a_user_without_history(tmp_path):
    (example,) = read_lamp(write(tmp_path, [{"id": "1", "input": "x", "profile": []}])[0]).examples
    assert example.history == ()


def test_the_time_split_has_users_and_orders_profiles_by_date(tmp_path):
    dates = ["2015-01-02", "2014-12-31", "2015-01-10", "2014-2-3"]
    profile = [{"id": str(i), "text": d, "score": "1", "date": d} for i, d in enumerate(dates)]
    questions = [
        {"id": "1", "user_id": "A3", "input": RATING + "Nice.", "profile": profile},
        {"id": "2", "user_id": 9, "input": RATING + "Bad.", "profile": profile[:1]},
    ]
    first, second = read_lamp(write(tmp_path, questions)[0]).examples
    assert (first.user_id, second.user_id) == ("A3", "9")
    assert [i.input for i in first.history] == ["2014-2-3", "2014-12-31", "2015-01-02", "2015-01-10"]


def test_dates_with_a_time_of_day_and_bare_years(tmp_path):
    dates = ["2015-01-02 10:00:00", "2014", "2015-01-01 23:00:00"]
    profile = [{"text": d, "score": "1", "date": d} for d in dates]
    (example,) = read_lamp(write(tmp_path, [{"id": "1", "input": "x", "profile": profile}])[0]).examples
    assert [i.input for i in example.history] == ["2014", "2015-01-01 23:00:00", "2015-01-02 10:00:00"]


UNDATED = [{}, {"date": None}, {"date": ""}, {"date": "soon"}, {"date": "01-03-2020"}, {"date": "2015-13-01"}]


@pytest.mark.parametrize("field", UNDATED, ids=str)
def test_an_item_without_a_usable_date_is_left_out_of_a_dated_profile_and_counted(tmp_path, field):
    dates = ("2016-01-01", "2015-03-01T10:00:00", "2015/03/02", "2015-03-01 09:00:00")
    profile = [{"text": d, "score": "1", "date": d} for d in dates]
    profile.insert(2, {"text": "undated", "score": "1", **field})
    data = read_lamp(write(tmp_path, [{"id": "1", "input": "x", "profile": profile}])[0])
    assert [i.input for i in data.examples[0].history] == [dates[3], dates[1], dates[2], dates[0]]
    (line,) = data.repairs
    assert line.startswith("1 profile items left out")
    assert "question 1: profile item 2" in line


def test_a_profile_without_dates_keeps_its_order_and_items(tmp_path):
    profile = [{"text": t, "score": "1", "date": None} for t in "ba"]
    data = read_lamp(write(tmp_path, [{"id": "1", "input": "x", "profile": profile}])[0])
    assert [i.input for i in data.examples[0].history] == ["b", "a"]
    assert data.repairs == ()


@pytest.mark.parametrize("output", [None, True, ["a"], {"b": 1}])
def test_a_gold_output_that_is_no_text_is_named(tmp_path, output):
    questions = [{"id": str(n), "input": f"x {n}", "profile": []} for n in range(2)]
    golds = [{"id": "0", "output": "5"}, {"id": "1", "output": output}]
    with pytest.raises(DataError, match="gold entry 1: field 'output' must be a text"):
        read_lamp(*write(tmp_path, questions, golds))


def test_ids_that_stand_twice_are_named(tmp_path):
    question = {"id": "0", "input": "x", "profile": []}
    with pytest.raises(DataError, match="gold entry 1: field 'id' '0' was already used"):
        read_lamp(*write(tmp_path, [question], [{"id": "0", "output": "5"}] * 2))
    with pytest.raises(DataError, match="question id '0' was used twice"):
        read_lamp(*write(tmp_path, [question] * 2, [{"id": "0", "output": "5"}]))


def test_a_field_without_a_value_is_empty_and_not_the_word_none(tmp_path):
    profile = [{"abstract": None, "title": "t"}]
    data = read_lamp(write(tmp_path, [{"id": "1", "input": "x", "profile": profile}])[0])
    assert data.examples[0].history == (HistoryItem("", "t"),)


# --- template


@pytest.mark.parametrize(
    ("inputs", "shared"),
    [
        (["Rate: good", "Rate: bad"], "Rate: "),
        (["Rate this. good", "Rate this. great"], "Rate this. "),  # not "Rate this. g"
        (['title "Alpha"', 'title "Alps"'], 'title "'),
        (["one", "two"], ""),
        (["the same", "the same"], ""),
        (["only one"], ""),
        ([], ""),
        (["Rate:\ngood", "Rate:\nbad"], "Rate:\n"),
    ],
)
def test_the_shared_instruction_ends_at_a_word(inputs, shared):
    assert shared_instruction(inputs) == shared


def test_braces_of_an_instruction_do_not_break_the_template(tmp_path):
    questions = [{"id": str(i), "input": "Use {this} {input}: " + t, "profile": []} for i, t in enumerate("ab")]
    data = read_lamp(write(tmp_path, questions)[0])
    assert data.template.count("{input}") == 1
    assert [e.input for e in data.examples] == ["a", "b"]


def test_an_imposed_template_is_cut_off_or_refused(tmp_path):
    # Derived from these two alone, the template would hold "The ", which belongs to the articles.
    questions = [{"id": str(i), "input": "Headline: The " + t, "profile": []} for i, t in enumerate(["a", "b"])]
    path = write(tmp_path, questions)[0]
    assert read_lamp(path).template == "Headline: The {input}"
    data = read_lamp(path, template="Headline: {input}")
    assert (data.template, [e.input for e in data.examples]) == ("Headline: {input}", ["The a", "The b"])
    with pytest.raises(DataError, match="question 0: input does not begin with the instruction 'Title: '"):
        read_lamp(path, template="Title: {input}")


# --- what is refused


@pytest.mark.parametrize(
    ("golds", "odd"),
    [
        ([{"id": "01", "output": "5"}], "1 place.*'11'"),
        ([{"id": "01", "output": "5"}, {"id": "11", "output": "1"}, {"id": "21", "output": "1"}], "1 place.*'21'"),
        ([{"id": "1", "output": "5"}, {"id": "11", "output": "1"}], "2 place"),
        ([], "2 place"),
    ],
)
def test_id_sets_that_differ(tmp_path, golds, odd):
    with pytest.raises(DataError, match=rf"train_outputs.json: ids differ from .*train_questions.json in {odd}"):
        read_lamp(*write(tmp_path, published("LaMP_3")[0], golds))


@pytest.mark.parametrize("field", ["id", "input", "profile"])
@pytest.mark.parametrize("value", [None, 1.5, {}, "missing"])
def test_a_missing_or_wrong_field_of_a_question_is_named(tmp_path, field, value):
    questions, _ = published("LaMP_3")
    if value == "missing":
        del questions[1][field]
    else:
        questions[1][field] = value
    with pytest.raises(DataError, match=f"train_questions.json: question 1: field '{field}'"):
        read_lamp(write(tmp_path, questions)[0])


@pytest.mark.parametrize("item", [{}, {"title": "t"}, {"description": "d"}, {"score": "1"}, "text", None])
def test_a_profile_item_without_any_pair_is_named(tmp_path, item):
    questions, _ = published("LaMP_3")
    questions[1]["profile"].append(item)
    with pytest.raises(DataError, match="question 11: profile item 2: has none of LaMP's field pairs"):
        read_lamp(write(tmp_path, questions)[0])


@pytest.mark.parametrize("content", ["[]", "{}", "null", '["x"]', "oops", ""])
def test_files_of_another_shape(tmp_path, content):
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"q\.json"):
        read_lamp(path)


@pytest.mark.parametrize("content", ["[]", '{"task": "LaMP_3"}', '{"golds": [{"id": "01"}]}', '{"golds": ["01"]}', "x"])
def test_gold_files_of_another_shape(tmp_path, content):
    path = tmp_path / "gold.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"gold\.json"):
        read_lamp(write(tmp_path, published("LaMP_3")[0])[0], path)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_lamp(tmp_path / "q.json")


# --- samples and events


def test_leave_one_out_of_profiles_uses_each_users_longest_and_no_question(tmp_path):
    items = [{"id": f"p{i}", "text": f"review {i}", "score": str(i % 5 + 1)} for i in range(4)]
    questions = [
        {"id": "1", "user_id": "A", "input": RATING + "q1", "profile": items[:2]},
        {"id": "2", "user_id": "A", "input": RATING + "q2", "profile": items},
        {"id": "3", "user_id": "B", "input": RATING + "q3", "profile": items[:1]},
    ]
    golds = [{"id": str(i), "output": "5"} for i in (1, 2, 3)]
    samples = leave_one_out_profiles(read_lamp(*write(tmp_path, questions, golds)).examples)
    assert [(s.user_id, s.input) for s in samples] == [("A", f"review {i}") for i in range(4)] + [("B", "review 0")]
    for s in samples:
        assert {i.input for i in s.history} == {f"review {i}" for i in range(4) if s.user_id == "A"} - {s.input}


@pytest.mark.parametrize("task", TASKS)
def test_events_come_back_with_their_template(tmp_path, task):
    data = read_lamp(*write(tmp_path, *published(task), task))
    path = tmp_path / "out" / "events.jsonl"
    count = write_events(data, path)
    events = read_events(path).events
    assert count == len(events) == 6
    expected = [(e.user_id, i.input, i.output, i.id) for e in data.examples for i in e.history]
    expected += [(e.user_id, e.input, e.output, e.id) for e in data.examples]
    assert [(e.user_id, e.item.input, e.item.output, e.item.id) for e in events] == expected
    side = json.loads((tmp_path / "out" / "events.meta.json").read_text())
    assert (side["template"], side["meta"]["task"]) == (data.template, task)


def test_events_of_the_time_split_keep_their_order(tmp_path):
    profile = [{"id": d, "text": d, "score": "1", "date": d} for d in ("2015-01-02", "2014-12-31")]
    questions = [{"id": "1", "user_id": "A", "input": "x", "profile": profile}]
    write_events(read_lamp(write(tmp_path, questions)[0]), tmp_path / "e.jsonl")
    items = [e.item for e in read_events(tmp_path / "e.jsonl").events]
    assert [i.id for i in sorted(items, key=lambda i: i.timestamp)] == ["2014-12-31", "2015-01-02"]


def test_events_of_a_user_with_several_questions_are_written_once(tmp_path):
    item = {"id": "10", "text": "Fine.", "score": "4"}
    questions = [{"id": str(n), "user_id": "A", "input": f"x {n}", "profile": [item]} for n in range(3)]
    golds = [{"id": str(n), "output": "5"} for n in range(3)]
    path = tmp_path / "e.jsonl"
    assert write_events(read_lamp(*write(tmp_path, questions, golds)), path) == 4
    assert len(read_events(path).events) == 4


@pytest.mark.parametrize(
    "questions",
    [
        # A question and an item of its user under one number: each is numbered in a list of its own.
        [{"id": "10", "user_id": "A", "input": "x", "profile": [{"id": "10", "text": "Fine.", "score": "4"}]}],
        # The same item twice.
        [{"id": "1", "input": "x", "profile": [{"id": "10", "text": "Fine.", "score": "4"}] * 2}],
    ],
    ids=["question and item", "item twice"],
)
def test_events_can_be_read_whatever_their_ids(tmp_path, questions):
    path = tmp_path / "e.jsonl"
    golds = [{"id": q["id"], "output": "5"} for q in questions]
    count = write_events(read_lamp(*write(tmp_path, questions, golds)), path)
    assert len(read_events(path).events) == count


def test_items_without_output_are_no_events(tmp_path):
    questions = [{"id": "1", "input": "x", "profile": [{"text": " "}, {"text": "words"}]}]
    assert write_events(read_lamp(write(tmp_path, questions)[0]), tmp_path / "e.jsonl") == 1


# --- a folder as training data


def test_a_folder_in_lamps_shape_is_training_data(tmp_path):
    questions, golds = [], []
    for n in range(30):
        profile = [{"id": str(i), "text": f"review {n} {i}", "score": str((n + i) % 5 + 1)} for i in range(3)]
        questions.append({"id": str(n), "input": f"{RATING}{n} it was", "profile": profile})
        golds.append({"id": str(n), "output": str(n % 5 + 1)})
    write(tmp_path, questions, golds)
    data = prepare(tmp_path)
    assert data.template == RATING + "{input}"
    assert data.answers == ("1", "2", "3", "4", "5")
    every = [*data.train, *data.valid, *data.held_out]
    assert len(every) == 30 * 4
    by_input = {e.input: e for e in every}
    assert len(by_input["7 it was"].history) == 3
    assert {i.input for i in by_input["review 7 1"].history} == {"review 7 0", "review 7 2"}


# --- known defects of the official files


def with_defect(tags=("sci-fi, comedy", "sci-fi, comedy"), begins="x "):
    """Return questions and golds of LaMP-2 whose question 110 has lost its instruction, as published."""
    ask = "Which tag does this movie relate to? tags: [{}] description: "
    questions = [
        {"id": f"11{n}", "input": ask.format(t) + text, "profile": [{"id": "1", "tag": "comedy", "description": "d"}]}
        for n, (t, text) in enumerate(zip(tags, ["A robot wakes.", "The king dances."], strict=True), 1)
    ]
    questions.insert(0, questions[0] | {"id": "110", "input": begins + "A princess flees."})
    return questions, [{"id": q["id"], "output": "comedy"} for q in questions]


def test_a_known_defect_is_repaired_by_name_and_reported(tmp_path, caplog):
    data = read_lamp(*write(tmp_path, *with_defect(), "LaMP_2"))
    assert data.template == "Which tag does this movie relate to? tags: [sci-fi, comedy] description: {input}"
    assert [e.input for e in data.examples] == ["A princess flees.", "A robot wakes.", "The king dances."]
    (said,) = data.repairs
    assert said.startswith("LaMP-2 (movies, user split, dev), question 110: ")
    assert "repaired" in said
    assert said in caplog.text


def test_a_defect_that_the_file_cannot_mend_is_left_out_with_its_gold(tmp_path):
    data = read_lamp(*write(tmp_path, *with_defect(["sci-fi, comedy", "comedy, sci-fi"]), "LaMP_2"))
    assert [e.id for e in data.examples] == ["111", "112"]
    assert "left out with its gold" in data.repairs[0]


def test_only_the_defect_itself_is_repaired(tmp_path):
    """Other tasks have a question 110 too, and may ask about x."""
    news = [{"id": "110", "input": "categories: [a] article: " + t, "profile": []} for t in ("x", "y")]
    news[1]["id"] = "111"
    assert read_lamp(write(tmp_path, news)[0]).repairs == ()
    data = read_lamp(*write(tmp_path, *with_defect(begins="Which tag? description: x "), "LaMP_2"))
    assert data.repairs == ()
    assert data.examples[0].input.endswith("description: x A princess flees.")


def files(folder, golds=("a", "b"), mark=b"", title="t"):
    """Write a question and a gold file as `fit` reads them, and return their folder."""
    items = [{"id": str(n), "text": f"text {n}", "title": title} for n in range(2)]
    questions = [{"id": str(n), "input": f"Say {n}", "profile": items} for n in range(len(golds))]
    gold = {"task": "LaMP_4", "golds": [{"id": str(n), "output": output} for n, output in enumerate(golds)]}
    (folder / "train_questions.json").write_bytes(mark + json.dumps(questions).encode())
    (folder / "train_outputs.json").write_bytes(mark + json.dumps(gold).encode())
    return folder


def read(folder):
    return read_lamp(folder / "train_questions.json", folder / "train_outputs.json")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    assert len(read(files(tmp_path, mark=b"\xef\xbb\xbf")).examples) == 2


def test_a_file_below_the_home_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(files(tmp_path)))
    assert len(read_lamp("~/train_questions.json").examples) == 2


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff", b"", b"9" * 5000], ids=lambda c: repr(c[:4]))
def test_what_is_no_json_is_one_line(tmp_path, content):
    files(tmp_path)
    (tmp_path / "train_questions.json").write_bytes(content)
    with pytest.raises(
        DataError, match=r"train_questions\.json: not JSON that can be read|non-empty JSON list"
    ) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("output", [float("nan"), float("inf")], ids=repr)
def test_a_gold_output_that_is_no_number_is_named(tmp_path, output):
    with pytest.raises(DataError, match="gold entry 1: field 'output' must be a text or a number"):
        read(files(tmp_path, ("a", output)))


@pytest.mark.parametrize("title", [["a"], {"a": 1}, True, float("nan")], ids=repr)
def test_a_field_of_an_item_that_is_no_text_is_named(tmp_path, title):
    with pytest.raises(DataError, match="question 0: profile item 0: field 'title' must be a text or a number"):
        read(files(tmp_path, title=title))


def test_half_a_character_is_named(tmp_path):
    with pytest.raises(DataError, match="profile item 0: field 'title' holds half a character"):
        read(files(tmp_path, title="a\ud800"))
    with pytest.raises(DataError, match="gold entry 0: field 'output' holds half a character"):
        read(files(tmp_path, ("a\ud800", "b")))


def test_questions_without_an_answer_are_no_targets_and_are_counted(tmp_path):
    data = prepare(files(tmp_path, ("a", "", "  ", "b", "c", "d")))
    assert "2 questions left out: their gold output is empty" in data.notes
    assert all(e.output.strip() for part in (data.train, data.valid, data.held_out) for e in part)
