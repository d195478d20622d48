"""History items in LaMP's prompts: the wording, the length budget, and what is never cut."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.prompts.lamp import MIN_TOKENS, Prompt, render
from persona_plug.data.history import HistoryItem
from training.tasks import Task, load_task

RATING = load_task("LaMP_3")
TITLE = load_task("LaMP_5")
TWEET = load_task("LaMP_7")
CITE = load_task("LaMP_1")
QUESTION = "What is the score of the following review? review: the tail"


@pytest.fixture(scope="module")
def tokenizers():
    """Bytes, and a tokenizer whose tokens reach over the borders of texts, so that a sum of parts is not the whole."""
    import tokenizers as tk
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from persona_plug.models import zoo

    core = tk.Tokenizer(tk.models.BPE())
    core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(
        ['"good". What "fine", and 1 is the score for "good", and 5 is the score for "x"'] * 9, trainer
    )
    return {
        "bytes": AutoTokenizer.from_pretrained(zoo.pull("tiny-llama")),
        "merged": PreTrainedTokenizerFast(tokenizer_object=core),
    }


@pytest.fixture(scope="module")
def bytewise(tokenizers):
    return tokenizers["bytes"]


def long(task, tokenizer, text, items):
    """Render with more room than is needed."""
    return render(task, text, items, tokenizer, 10_000)


# Wording


@pytest.mark.parametrize(
    ("name", "question", "items", "expected"),
    [
        (
            "LaMP_1",
            'the paper with the title "Mine", a title? [1]: "a" [2]: "b"',
            [("abstract", "One"), ("", "Two")],
            'the paper with the title, and "One", and "Two" "Mine", a title? [1]: "a" [2]: "b"',
        ),
        (
            "LaMP_2",
            "Which tag? description: d",
            [("film", "comedy"), ("other", "action")],
            'the tag for the movie: "film" is "comedy", and the tag for the movie: "other" is "action". '
            "Which tag? description: d",
        ),
        ("LaMP_3", "review: r", [("good", "5")], '5 is the score for "good". review: r'),
        ("LaMP_4", "article: r", [("body", "Head")], '"Head" is the title for "body". article: r'),
        (
            "LaMP_5",
            "Generate. paper: p",
            [("abs", "T"), ("abt", "U")],
            '"T" is a title for "abs", and "U" is a title for "abt". Following the given patterns Generate. paper: p',
        ),
        (
            "LaMP_7",
            "tweet: t",
            [("", "mine"), ("", "too")],
            '"mine", and "too" are written by a person. Following the given patterns tweet: t',
        ),
    ],
)
def test_prompts_read_as_lamps(bytewise, name, question, items, expected):
    found = long(load_task(name), bytewise, question, [HistoryItem(*item) for item in items])
    assert found == Prompt(expected, len(items), 0, len(expected))


def test_an_item_without_input_shows_its_output_alone(bytewise):
    items = [HistoryItem(" ", "Alone"), HistoryItem("abs", "T")]
    assert long(TITLE, bytewise, "q", items).text.startswith('"Alone", and "T" is a title for "abs". ')


def test_an_item_without_output_is_passed_over(bytewise):
    found = long(RATING, bytewise, QUESTION, [HistoryItem("a", " "), HistoryItem("b", "5")])
    assert found.text == f'5 is the score for "b". {QUESTION}'
    assert found.items_used == 1


def test_braces_and_marks_of_the_chat_are_mere_text(bytewise):
    item = HistoryItem("{output} {0} }{", "{input}<|im_end|>")
    found = long(TITLE, bytewise, "{items} {x}", [item])
    assert '"{input}<|im_end|>" is a title for "{output} {0} }{"' in found.text
    assert found.text.endswith("{items} {x}")
    assert found.tokens == len(found.text)  # the end-of-turn mark is ten characters, no single token


def test_the_plain_question_is_returned_without_items(bytewise):
    expected = Prompt(QUESTION, 0, 0, len(QUESTION))
    assert long(RATING, bytewise, QUESTION, []) == expected
    assert long(RATING, bytewise, QUESTION, [HistoryItem("a", "")]) == expected


def test_where_there_is_no_place_for_items_the_question_stays(bytewise):
    assert long(CITE, bytewise, "no such word", [HistoryItem("", "One")]) == Prompt("no such word", 0, 0, 12)


# The budget. Tokens are bytes here; '5 is the score for ""' has 21, ". " 2, ", and " 6.


def frame(count):
    return len(QUESTION) + 2 + 21 * count + 6 * (count - 1)


def test_each_item_gets_the_same_share(bytewise):
    items = [HistoryItem(c * 50, "5") for c in "abc"]
    found = render(RATING, QUESTION, items, bytewise, frame(3) + 3 * 12)
    assert [found.text.count(c * 12) for c in "abc"] == [1, 1, 1]
    assert (found.items_used, found.items_cut, found.tokens) == (3, 3, frame(3) + 36)
    odd = render(RATING, QUESTION, items, bytewise, frame(3) + 3 * 12 + 2).text
    assert [odd.count(c * n) for c, n in (("a", 14), ("b", 12), ("b", 13))] == [1, 1, 0]
    exact = [HistoryItem(c * 12, "5") for c in "abc"]
    assert render(RATING, QUESTION, exact, bytewise, frame(3) + 36).items_cut == 0


def test_what_an_item_does_not_need_rolls_over_to_the_next(bytewise):
    items = [HistoryItem("x" * n, "5") for n in (50, 2, 50)]
    found = render(RATING, QUESTION, items, bytewise, frame(3) + 3 * 12)
    lengths = [len(part.split('"')[0]) for part in found.text.split('for "')[1:]]
    assert lengths == [12, 2, 22]
    assert found.items_cut == 2


def test_an_answer_is_never_cut(bytewise):
    task = dataclasses.replace(load_task("LaMP_2"), answers=("a very long answer", "b"))
    items = [HistoryItem("film " * 9, "a very long answer")] * 3
    used = set()
    for limit in range(260):
        found = render(task, "q", items, bytewise, limit)
        assert found.text.count('is "a very long answer"') == found.items_used
        used.add(found.items_used)
    assert used == {0, 1, 2, 3}


def test_an_output_is_cut_only_where_the_input_is_short_of_its_least(bytewise):
    wording = len('"" is a title for "". Following the given patterns q')
    item = HistoryItem("i" * 40, "o" * 20)
    for room in range(62):
        found = render(TITLE, "q", [item], bytewise, wording + room)
        sizes = [len(text) for text in found.text.split('"')[1:4:2]]
        if room < 2 * MIN_TOKENS:
            assert found == Prompt("q", 0, 0, 1)
        elif room < 20 + MIN_TOKENS:
            assert sizes == [room - room // 2, room // 2]
        else:
            assert sizes == [20, min(40, room - 20)]
        assert found.items_cut == (0 if room < 2 * MIN_TOKENS or room >= 60 else 1)


def test_a_long_output_takes_what_a_short_input_leaves(bytewise):
    wording = len('"" is a title for "". Following the given patterns q')
    found = render(TITLE, "q", [HistoryItem("short", "o" * 99)], bytewise, wording + 50)
    assert found.text.startswith('"' + "o" * 45 + '" is a title for "short"')


def test_an_item_without_input_has_its_output_cut(bytewise):
    wording = len('"" are written by a person. Following the given patterns q')
    for room in (MIN_TOKENS, 19, 20):
        found = render(TWEET, "q", [HistoryItem("", "o" * 20)], bytewise, wording + room)
        assert found.text.startswith('"' + "o" * room + '" are')
        assert (found.items_used, found.items_cut) == (1, int(room < 20))
    assert render(TWEET, "q", [HistoryItem("", "oo")], bytewise, wording + 2).items_used == 1


def test_an_input_that_is_not_shown_takes_no_room(bytewise):
    for task, unseen in ((TITLE, " " * 30), (TWEET, "unseen " * 5)):
        whole = long(task, bytewise, "q", [HistoryItem(unseen, "Title")])
        assert '"Title"' in whole.text
        assert "unseen" not in whole.text
        assert render(task, "q", [HistoryItem(unseen, "Title")], bytewise, whole.tokens) == whole


def test_characters_of_many_tokens_do_not_break_the_limit(bytewise):
    """A cut keeps whole characters, here of four bytes each; what that costs is taken off the shares again."""
    items = [HistoryItem("🙂" * 20, "5"), HistoryItem("é" * 40, "1")]
    for limit in range(frame(2) + 16, frame(2) + 90):
        found = render(RATING, QUESTION, items, bytewise, limit)
        assert limit - 8 <= found.tokens <= limit
        assert found.items_used == 2


def test_the_last_items_go_first_where_shares_are_too_small(bytewise):
    items = [HistoryItem(c * 20, "5") for c in "abcd"]
    for used in (1, 2, 3, 4):
        least = frame(used) + used * MIN_TOKENS
        found = render(RATING, QUESTION, items, bytewise, least)
        assert found.items_used == used
        assert ["abcd".index(part[0]) for part in found.text.split('for "')[1:]] == list(range(used))
        assert render(RATING, QUESTION, items, bytewise, least - 1).items_used == used - 1


def test_a_question_as_long_as_the_limit_stays_plain_and_whole(bytewise):
    items = [HistoryItem("good", "5")]
    for limit in (1, len(QUESTION) - 1, len(QUESTION), len(QUESTION) + 5):
        assert render(RATING, QUESTION, items, bytewise, limit) == Prompt(QUESTION, 0, 0, len(QUESTION))


def test_a_long_history_is_not_tokenised_in_vain(bytewise):
    read = []

    def counting(text, **options):
        read.append(text)
        return bytewise(text, **options)

    found = render(RATING, "q", [HistoryItem("good", "5")] * 5000, counting, 90)
    assert found.items_used == 3
    assert len(read) < 400


TEXTS = st.text(st.sampled_from('ab .,"{}éß🙂\n'), max_size=30) | st.sampled_from(["good", "x " * 20, "fine. What"])


@pytest.mark.parametrize("name", ["bytes", "merged"])
@given(
    task=st.sampled_from([RATING, TITLE, TWEET, CITE]),
    question=TEXTS.map(lambda text: f"a title {text} tail"),
    pairs=st.lists(st.tuples(TEXTS, TEXTS | st.sampled_from("12345")), max_size=6),
    limit=st.integers(1, 300),
)
def test_no_prompt_is_too_long_and_every_question_is_whole(tokenizers, name, task, question, pairs, limit):
    tokenizer = tokenizers[name]
    items = [HistoryItem(*pair) for pair in pairs]
    plain = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    found = render(task, question, items, tokenizer, limit)
    assert found.tokens == len(tokenizer(found.text, add_special_tokens=False)["input_ids"])
    assert found.tokens <= max(limit, plain)
    if task.insert_after:
        assert found.text.startswith("a title")
        assert found.text.endswith(question.removeprefix("a title"))
    else:
        assert found.text.endswith(question)
    assert found.items_cut <= found.items_used <= sum(bool(item.output.strip()) for item in items)
    assert (found.items_used == 0) == (found.text == question)
    usable = [item for item in items if item.output.strip()]
    room = long(task, tokenizer, question, items)
    assert (room.items_used, room.items_cut) == (len(usable), 0)


def test_the_budget_heeds_tokens_that_reach_over_borders(tokenizers):
    """The tokenizer of the property above is one where adding up the parts is not enough."""
    tokenizer, items = tokenizers["merged"], [HistoryItem("good", "5"), HistoryItem("fine", "1")]

    def count(text):
        return len(tokenizer(text)["input_ids"])

    whole = long(RATING, tokenizer, "What", items)
    parts = ['5 is the score for "good"', '1 is the score for "fine"']
    assert whole.text == ", and ".join(parts) + ". What"
    assert whole.tokens != count(", and ") + count(". What") + sum(map(count, parts))


def test_a_task_of_ones_own_is_rendered(bytewise):
    task = Task("mine", 1, "text", item="{input} -> {output}", join="\n", prompt="{items}\n{input}")
    found = long(task, bytewise, "c", [HistoryItem("a", "A"), HistoryItem("b", "B")])
    assert found.text == "a -> A\nb -> B\nc"
