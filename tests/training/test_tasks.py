"""Task definitions: every YAML, on inputs in the benchmarks' published shape."""

import json

import pytest

from eval.prompts.lamp import assemble, find_query
from persona_plug.data.lamp import read_lamp
from persona_plug.errors import ConfigError
from training.tasks import METRICS, TASKS, Task, load_task

NAMES = sorted(p.stem for p in TASKS.glob("*.yaml"))
MOVIE = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
    "explanation. tags: [sci-fi, based on a book, comedy] description: "
)
NEWS = "Which category does this article relate to among the following categories? categories: [sports] article: "
STARS = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
    "further explanation. review: "
)
OFFENSE = "How offensive is the following comment on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5. comment: "
PAPER = "Generate a title for the following abstract of a paper: "
TWEET = "Paraphrase the following tweet without any explanation before or after it: "
CITE = (
    'For an author who has written the paper with the title "Deep "nets" and [1]: "why", which reference is related? '
    "Just answer with [1] or [2] without explanation. "
)
REVIEW = 'Generate the review text written by a reviewer who gave "5.0" for "A lamp". The summary is "Bright: yes".'

# task -> an input, what retrieval looks for in it, a profile item, how that item is written, and the prompt with it;
# {item} and {input} stand for the two.
SHAPES = {
    "LaMP_1": (
        CITE + '[1]: "A "quoted" title" [2]: "On "B""',
        'A "quoted" title On "B"',
        {"id": "1", "title": "My paper", "abstract": "We show"},
        '"My paper"',
        (CITE + '[1]: "A "quoted" title" [2]: "On "B""').replace("title", "title, and {item}", 1),
    ),
    "LaMP_2": (
        MOVIE + "A king: description: his\nfall. ",
        "A king: description: his\nfall.",
        {"id": "1", "tag": "comedy", "description": "A clown."},
        'the tag for the movie: "A clown." is "comedy"',
        "{item}. {input}",
    ),
    "LaMP_2N": (
        NEWS + "They won.",
        "They won.",
        {"id": "1", "text": "It ended.", "title": "End", "category": "sports"},
        'the category for the article: "It ended." is "sports"',
        "{item}. {input}",
    ),
    "LaMP_3": (
        STARS + "Good.\nreview: 2",
        "Good.\nreview: 2",
        {"id": "1", "text": "Fine.", "score": 4},
        '4 is the score for "Fine."',
        "{item}. {input}",
    ),
    "offensiveness_rating": (
        OFFENSE + "You {fool}!",
        "You {fool}!",
        {"id": "1", "text": "So {what}", "score": "1"},
        '1 is the score for "So {what}"',
        "{item}. {input}",
    ),
    "LaMP_4": (
        "Generate a headline for the following article: Rain fell.",
        "Rain fell.",
        {"id": "1", "text": "Snow fell.", "title": "Snow"},
        '"Snow" is the title for "Snow fell."',
        "{item}. {input}",
    ),
    "LaMP_5": (
        PAPER + "We prove: a bound.",
        "We prove: a bound.",
        {"id": "1", "title": "My paper", "abstract": "We show"},
        '"My paper" is a title for "We show"',
        "{item}. Following the given patterns {input}",
    ),
    "LaMP_6": (
        "generate a subject for the following email: Hi: lunch?",
        "Hi: lunch?",
        {"id": "1", "text": "See you.", "title": "Bye"},
        '"Bye" is the title for "See you."',
        "{item}. {input}",
    ),
    "LaMP_7": (
        TWEET + "I am: tired.",
        "I am: tired.",
        {"id": "1", "text": "lol ok"},
        '"lol ok"',
        "{item} are written by a person. Following the given patterns {input}",
    ),
    "email_rewrite": (
        "Rewrite the following email to make it more polite: Send it.",
        "Send it.",
        {"id": "1", "original": "No.", "text": "I fear not."},
        '"I fear not." is the rewrite of "No."',
        "{item}. Following the given patterns {input}",
    ),
    "debian_synopsis": (
        "Write the one-line synopsis of this software package: A tool: it digs.",
        "A tool: it digs.",
        {"id": "1", "input": "It sews.", "output": "needle"},
        '"needle" is the synopsis of "It sews."',
        "{item}. Following the given patterns {input}",
    ),
    "rfc_title": (
        "Write the title of this document, whose abstract follows. abstract: We define: a header.",
        "We define: a header.",
        {"id": "1", "input": "This memo.", "output": "A Memo"},
        '"A Memo" is a title for "This memo."',
        "{item}. Following the given patterns {input}",
    ),
    "replies": (
        "Write the reply that this person would send to this message:\nWhere is it? Wei",
        "Where is it? Wei",
        {"id": "1", "input": "Is it red? Ben", "output": "Hi Ben, yes."},
        '"Hi Ben, yes." answers "Is it red? Ben"',
        "{item}. Following the given patterns {input}",
    ),
    "LongLaMP_1": (
        "Complete the following email: Subject: Lunch",
        "Subject: Lunch",
        {"id": "1", "text": "See you.", "title": "Bye"},
        '"Bye" is the title for "See you."',
        "{item}. {input}",
    ),
    "LongLaMP_2": (
        'Generate an abstract for the title "Nets" using the following items: 1. deep 2. wide',
        "1. deep 2. wide",
        {"id": "1", "title": "My paper", "abstract": "We show"},
        '"We show" is the abstract for the title "My paper"',
        "{item}. Use the above abstracts as context to understand the style and language of the user and, {input}",
    ),
    "LongLaMP_3": (
        REVIEW,
        REVIEW,
        {"overall": 5.0, "summary": "Dim", "description": "A lamp", "reviewText": "Too dark."},
        '"5.0 A lamp Dim" is the rating, description and summary for "Too dark."',
        "{item}. Following the given patterns {input}",
    ),
    "LongLaMP_4": (
        "Generate the content for a reddit post: my cat",
        "Generate the content for a reddit post: my cat",
        {"summary": "dog", "content": "It barks."},
        '"dog" is a summary for "It barks."',
        "{item}. Following the given patterns, {input}",
    ),
}
SHAPES |= {"movie_tagging": SHAPES["LaMP_2"], "scholarly_title": SHAPES["LaMP_5"]}
SHAPES |= dict.fromkeys(("critic_rating", "product_rating"), SHAPES["LaMP_3"])


def test_every_task_is_tried_here():
    assert sorted(SHAPES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_definition_is_complete(name):
    task = load_task(name)
    assert task.name == name
    assert task.source
    assert task.join == ", and "
    text = (TASKS / f"{name}.yaml").read_text()
    for field in ("metrics", "fields", "item", "join", "prompt", "max_input_tokens", "max_answer_tokens"):
        assert f"\n{field}:" in text
    long = name.startswith("LongLaMP")
    assert task.no_repeat_ngram == (3 if long else 0)
    assert ("meteor" in task.metrics) == ("bleu" in task.metrics) == long
    assert task.max_answer_tokens >= {"label": 16, "rating": 4, "text": 32}[task.kind]


@pytest.mark.parametrize("name", NAMES)
def test_queries_items_and_prompts_of_published_shapes(tmp_path, name):
    text, query, profile, written, prompt = SHAPES[name]
    task = load_task(name)
    assert find_query(task, text) == query
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"id": "1", "input": text, "profile": [profile]}]))
    (example,) = read_lamp(path, fields=task.fields).examples
    (item,) = example.history
    assert task.item.format(input=item.input, output=item.output) == written
    expected = prompt.replace("{item}", f"{written}, and {written}").replace("{input}", text)
    assert assemble(task, [written, written], text) == expected
    assert assemble(task, [], text) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LaMP_1", 'title "A", which is related? [1]: "B"'),
        ("LaMP_2", "a film without its marker"),
        ("LaMP_5", "Generate a title for an abstract: x"),
        ("LongLaMP_2", "Generate an abstract"),
    ],
)
def test_an_input_of_another_shape_has_no_query(name, text):
    assert find_query(load_task(name), text) is None


def test_a_query_survives_a_lost_last_quote():
    assert find_query(load_task("LaMP_1"), CITE + '[1]: "A" [2]: "B') == "A B"


def test_items_without_a_place_leave_the_input_as_it_is():
    assert assemble(load_task("LaMP_1"), ['"A"'], "no such word") == "no such word"


def test_answers_are_those_of_the_benchmark():
    movies = (
        "sci-fi|based on a book|comedy|action|twist ending|dystopia|dark comedy|classic|psychology|fantasy|romance|"
        "thought-provoking|social commentary|violence|true story"
    )
    news = (
        "food & drink|sports|education|parents|religion|travel|business|crime|science & technology|culture & arts|"
        "entertainment|politics|women|style & beauty|healthy living"
    )
    for name in ("LaMP_2", "movie_tagging"):
        assert load_task(name).answers == tuple(movies.split("|"))
    assert load_task("LaMP_2N").answers == tuple(news.split("|"))
    assert load_task("LaMP_1").answers == ("[1]", "[2]")
    ratings = [n for n in NAMES if load_task(n).kind == "rating"]
    assert ratings == ["LaMP_3", "critic_rating", "offensiveness_rating", "product_rating"]
    for name in ratings:
        assert load_task(name).answers == ("1", "2", "3", "4", "5")
    assert [n for n in NAMES if load_task(n).answers is None] == [n for n in NAMES if load_task(n).kind == "text"]


# A task of one's own


def test_a_task_may_leave_its_metrics_to_its_kind(tmp_path):
    path = tmp_path / "mood.yaml"
    path.write_text("version: 2\nkind: label\nanswers: [sad, glad]\nfields: [note, mood]\n")
    task = load_task(str(path))
    assert (task.name, task.version, task.metrics) == ("mood", 2, ("accuracy", "f1"))
    assert task.fields == ("note", "mood")
    assert {kind: Task("t", 1, kind, a).metrics for kind, a in [("rating", ("1", "2")), ("text", None)]} == {
        "rating": ("mae", "rmse"),
        "text": ("rouge-1", "rouge-L"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: text", "field 'version' is missing"),
        ("version: 1\nkind: text\ncolour: red", "unknown field 'colour'; known are answers"),
        ("version: one\nkind: text", "version must be a whole number, not 'one'"),
        ("version: true\nkind: text", "version must be a whole number"),
        ("version: 1\nkind: text\nmetrics: bleu", "metrics must be a list, not 'bleu'"),
        ("version: 1\nkind: text\nitem: 3", "item must be a text, not 3"),
        ("version: 1\nkind: essay", "kind='essay' is not one of label, rating, text"),
        ("version: 1\nkind: label", "label and rating tasks have answers"),
        ("version: 1\nkind: label\nanswers: [a]", "answers must be two or more"),
        ("version: 1\nkind: rating\nanswers: [good, bad]", "answers are numbers"),
        ("version: 1\nkind: rating\nanswers: [2, 1]", "rising order"),
        ("version: 1\nkind: text\nmetrics: [accuracy]", "metric 'accuracy' is none of a text task's: rouge-1"),
        ("version: 1\nkind: text\nfields: [a, b, c]", "fields must be a pair"),
        ("version: 1\nkind: text\nfields: [a, '']", "fields must be a pair"),
        ("version: 1\nkind: text\nitem: x", r"item must contain \{output\}"),
        ("version: 1\nkind: text\nitem: '{output} {name}'", r"item cannot contain \{name\}"),
        ("version: 1\nkind: text\nitem: '{output} {'", "item: .*write a literal brace twice"),
        ("version: 1\nkind: text\nprompt: '{items}'", r"prompt must contain \{input\}"),
        ("version: 1\nkind: text\ninsert_after: x\nprompt: '{items} {input}'", r"prompt cannot contain \{input\}"),
        ("version: 1\nkind: text\nquery: '('", "query is no regular expression"),
        ("version: 1\nkind: text\nmax_answer_tokens: 0", "max_answer_tokens must be at least 1"),
        ("version: 1\nkind: text\nno_repeat_ngram: -1", "no_repeat_ngram must be 0 or more"),
        ("- 1", "a task is a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_what_is_wrong_with_a_definition_is_said_in_one_line(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as refusal:
        load_task(str(path))
    assert "\n" not in str(refusal.value)
    assert "own" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "meant"), [("LaMP-2", "LaMP_2"), ("lamp_3", "LaMP_3"), ("movie_taging", "movie_tagging")]
)
def test_a_task_that_is_misspelt_is_suggested(name, meant):
    with pytest.raises(ConfigError, match=f"no task '{name}', did you mean '{meant}'"):
        load_task(name)


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ConfigError, match="no task 'LaMP_8'; known are LaMP_1, LaMP_2, "):
        load_task("LaMP_8")


def test_every_metric_of_a_task_has_a_class():
    from eval.metrics.lamp import QUESTION_RULES, SET_RULES

    assert {m for names in METRICS.values() for m in names} <= {*QUESTION_RULES, *SET_RULES}
