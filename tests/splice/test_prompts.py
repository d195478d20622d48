"""Prompts: where the soft tokens go, what is cut, and the trees of candidate answers."""

import copy

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persona_plug.config import PlugConfig
from persona_plug.errors import ConfigError
from persona_plug.splice.prompts import AnswerTree, Prompter

EOS = 2
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizers():
    from transformers import AutoTokenizer

    from persona_plug.models import zoo

    return {name: AutoTokenizer.from_pretrained(zoo.pull(name)) for name in ("tiny-llama", "tiny-gpt2", "tiny-t5")}


@pytest.fixture(scope="module")
def prompter(tokenizers):
    def make(llm="tiny-llama", **settings):
        return Prompter(tokenizers[llm], PlugConfig("llm", "encoder", **settings), llm == "tiny-t5")

    return make


def text(prompter, ids):
    return prompter.tokenizer.decode(ids)


# Where the soft tokens go


@pytest.mark.parametrize(
    ("llm", "placement", "left", "right"),
    [
        ("tiny-llama", "suffix", "<|im_start|>user\nSay: hi!", "<|im_end|>\n<|im_start|>assistant\n"),
        ("tiny-llama", "prefix", "<|im_start|>user\n", "Say: hi!<|im_end|>\n<|im_start|>assistant\n"),
        ("tiny-gpt2", "suffix", "Say: hi!", "\n"),
        ("tiny-gpt2", "prefix", "", "Say: hi!\n"),
        ("tiny-t5", "suffix", "Say: hi!<|eos|>", ""),
        ("tiny-t5", "prefix", "", "Say: hi!<|eos|>"),
    ],
)
def test_soft_tokens_sit_inside_the_user_turn(prompter, llm, placement, left, right):
    made = prompter(llm, placement=placement, template="Say: {input}!")
    parts = made.parts("hi")
    assert (text(made, parts.left), text(made, parts.right), parts.cut) == (left, right, 0)


def test_special_tokens_of_the_chat_template_are_single_tokens(prompter):
    parts = prompter().parts("hi")
    assert parts.left[0] == 1
    assert parts.right[0] == EOS
    assert parts.right.count(1) == 1


def test_a_bos_token_that_the_tokenizer_adds_is_kept(tokenizers):
    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizers["tiny-gpt2"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|bos|> $A", special_tokens=[("<|bos|>", 1)]
    )
    for placement in ("suffix", "prefix"):
        parts = Prompter(tokenizer, PlugConfig("llm", "encoder", placement=placement), False).parts("hi")
        assert (*parts.left, *parts.right).count(1) == 1
        assert parts.left[0] == 1


def test_a_template_that_repeats_or_drops_the_user_is_refused(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["tiny-llama"])
    for template in ("{{ messages[0].content }}{{ messages[0].content }}", "nothing"):
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match="chat template"):
            Prompter(tokenizer, PlugConfig("llm", "encoder"), False)


def test_a_tokenizer_without_end_token_is_refused(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["tiny-gpt2"])
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        Prompter(tokenizer, PlugConfig("llm", "encoder"), False)


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
@pytest.mark.parametrize("template", ["{input}", "An instruction: {input}", "Text: {input} Answer:"])
@given(request=TEXT)
def test_every_prompt_begins_with_the_head(prompter, llm, template, request):
    made = prompter(llm, template=template)
    assert made.parts(request).left[: len(made.head)] == made.head
    instruction = template.split("{input}")[0]
    assert len(made.head) >= len(instruction) - 1


# What is cut


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
@given(request=TEXT, room=st.integers(0, 40))
@example(request="🙂🙂🙂", room=2)
@example(request="abc", room=0)
@example(request="", room=0)
@example(request="{input}", room=20)
@example(request="<|pad|>", room=0)
@example(request="a <|end|> b", room=20)
def test_only_the_end_of_the_request_is_cut(prompter, llm, placement, request, room):
    made = prompter(llm, placement=placement, template="Say: {input} now.", max_input_tokens=10 + room)
    empty = prompter(llm, placement=placement, template="{input}").parts("")
    parts = made.parts(request)
    body = text(made, (*parts.left, *parts.right))
    before, after = text(made, empty.left), text(made, empty.right)
    if placement == "suffix" and llm == "tiny-t5":
        before, after = "", text(made, empty.left)
    body = body.removeprefix(before).removesuffix(after)
    assert body.startswith("Say: ")
    assert body.endswith(" now.")
    kept = body[5:-5]
    assert request.startswith(kept)
    cut = len(request[len(kept) :].encode())
    assert parts.cut == cut
    tokens = len(parts.left) + len(parts.right) - len(empty.left) - len(empty.right)
    assert tokens == 10 + len(kept.encode()) <= 10 + room
    if cut:  # not more than the limit asks for, but whole characters and a small step
        assert len(kept.encode()) > room - 8


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_a_template_longer_than_the_limit_is_refused(prompter, llm):
    made = prompter(llm, template="A long instruction: {input}", max_input_tokens=10)
    with pytest.raises(ConfigError, match="max_input_tokens=10"):
        made.parts("hello")


def test_answers_leave_room_for_the_end_token(prompter):
    made = prompter(max_answer_tokens=4)
    assert text(made, made.answer("abcdef")) == "abc"
    assert text(made, made.answer("ab")) == "ab"
    assert made.answer("") == ()


# Trees of candidates

CANDIDATES = st.lists(st.lists(st.integers(3, 6), max_size=4).map(tuple), min_size=1, max_size=5)


def tokens_on_path(tree, node):
    found = []
    while node >= 0:
        found.append(tree.tokens[node])
        node = tree.parents[node]
    return found[::-1]


def begins_another(candidates):
    return any(i != j and b[: len(a)] == a for i, a in enumerate(candidates) for j, b in enumerate(candidates))


@given(candidates=CANDIDATES, data=st.data())
@example(candidates=[(3,), (3, 4)], data=None)
@example(candidates=[(3,), (4,), (3, 4)], data=None)
@example(candidates=[(), (3,)], data=None)
def test_paths_spell_the_candidates(candidates, data):
    gold = None if data is None else data.draw(st.none() | st.integers(0, len(candidates) - 1))
    tree = AnswerTree.build(candidates, EOS, gold)
    closed = len(candidates) == 1 or begins_another(candidates)
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert len(set(zip(tree.parents, tree.tokens, strict=True))) == len(tree.tokens)
    for candidate, path in zip(candidates, tree.paths, strict=True):
        predicted = [token for _, token in path]
        assert predicted == [*candidate, EOS] if closed else predicted == list(candidate)
        for position, (node, _) in enumerate(path):
            assert tokens_on_path(tree, node) == list(candidate[:position])
    if gold is None or closed:
        assert tree.gold_end is None
    else:
        assert tokens_on_path(tree, tree.gold_end[0]) == list(candidates[gold])
        assert tree.gold_end[1] == EOS


def test_shared_beginnings_are_shared():
    tree = AnswerTree.build([(5, 6, 7), (5, 6, 8), (5, 9)], EOS)
    assert tree.tokens == (5, 6)
    assert AnswerTree.build([(3,), (4,)], EOS).tokens == ()


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_special_tokens_that_a_person_writes_are_plain_characters(prompter, llm):
    """Else a request could end its own turn, or an answer itself."""
    made = prompter(llm)
    special = made.tokenizer.eos_token
    assert made.eos not in made.ids(f"a {special} b")
    ends = [made.eos, *made.before, *made.after]
    asked = made.parts(f"a {special} b")
    assert [*asked.left, *asked.right].count(made.eos) == ends.count(made.eos) - 1
    assert made.eos not in made.answer(special)


def test_many_texts_are_tokenised_as_each_alone(make_plug):
    prompter = make_plug().prompter
    texts = ["the loud guitar", "", "</s> is plain here", "a"]
    assert prompter.ids_of_many(texts) == [prompter.ids(t) for t in texts]
    assert prompter.ids_of_many([]) == []
