"""Prompts: where the soft tokens go, what is cut, and the trees of candidate answers."""

import copy

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from persona_plug.config import PlugConfig
from persona_plug.errors import ConfigError, DataError
from persona_plug.models.llm import Limits
from persona_plug.splice.prompts import AnswerTree, Prompter, template_day

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


# The chat template: its arguments, its day, and what ends a turn

TURNS = "{% for m in messages %}{{ '<|im_start|>' }}{{ m['role'] }} {{ m['content'] }}{{ END }}{% endfor %}"


@pytest.fixture
def chat(tokenizers):
    """`chat(template, **settings)` is a prompter with a chat template of its own."""

    def make(template, llm="tiny-gpt2", limits=None, **settings):
        tokenizer = copy.deepcopy(tokenizers[llm])
        tokenizer.chat_template = template
        return Prompter(tokenizer, PlugConfig("llm", "encoder", **settings), False, limits)

    return make


def test_an_answer_ends_with_what_ends_the_assistants_turn(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["tiny-llama"])
    tokenizer.eos_token = tokenizer.pad_token
    made = Prompter(tokenizer, PlugConfig("llm", "encoder"), False)
    assert tokenizer.convert_ids_to_tokens(made.eos) == "<|im_end|>"
    tokenizer.chat_template = None
    assert Prompter(tokenizer, PlugConfig("llm", "encoder"), False).eos == tokenizer.eos_token_id


@pytest.mark.parametrize("behind", ["", "\n\n", " and on"], ids=["nothing", "lines", "words"])
def test_a_turn_without_end_token_ends_with_the_tokenizers(chat, behind):
    made = chat(TURNS.replace("END", repr(behind)))
    assert made.eos == EOS


def test_arguments_of_the_chat_template_are_settings(chat):
    template = "{{ messages[0]['content'] }}{% if think is defined and not think %}[calm]{% endif %}"
    plain, calm = chat(template), chat(template, chat_template_args={"think": False})
    assert text(plain, plain.parts("hi").right) == ""
    assert text(calm, calm.parts("hi").right) == "[calm]"
    assert plain.digest != calm.digest


def test_the_day_that_a_template_writes_stays_the_same(chat):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    made = chat(template, template_day="2024-02-03")
    assert text(made, made.parts("hi").left) == "03 Feb 2024 hi"
    assert template_day(made.tokenizer)
    assert template_day(chat("{{ messages[0]['content'] }}").tokenizer) == ""


def test_a_chat_template_that_raises_is_one_line(chat):
    with pytest.raises(ConfigError, match=r"chat template fails .no such role") as error:
        chat("{{ raise_exception('no such role\nat all') }}")
    assert "\n" not in str(error.value)


# What the LLM can read and its tokenizer can write


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_a_prompt_beyond_the_positions_is_refused(chat, placement):
    made = chat(None, limits=Limits(259, 40), placement=placement, max_input_tokens=100)
    made.parts("a" * 31)
    with pytest.raises(DataError, match="has 40; lower max_input_tokens=100"):
        made.parts("a" * 32)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(chat):
    with pytest.raises(ConfigError, match="has 200 embeddings"):
        chat(None, limits=Limits(200, None))
    chat(None, limits=Limits(259, None))


def test_labels_that_a_tokenizer_drops_are_named(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["tiny-gpt2"])
    tokenizer.backend_tokenizer.normalizer = Replace("\n", "")
    made = Prompter(tokenizer, PlugConfig("llm", "encoder"), False)
    with pytest.raises(ConfigError, match="cannot write the answer"):
        made.candidates(["good", "\n"])
    assert made.candidates(["good", ""])[1] == ()
    assert made.after == []
    with pytest.raises(DataError, match="no token at all"):
        made.parts("\n")


def test_labels_that_are_unknown_or_alike_are_named():
    core = Tokenizer(WordLevel({"<unk>": 0, "good": 1, "<eos>": 2}, "<unk>"))
    core.pre_tokenizer = Whitespace()
    roles = {"unk_token": "<unk>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **roles)
    made = Prompter(tokenizer, PlugConfig("llm", "encoder"), False)
    assert made.candidates(["good"]) == [(1,)]
    with pytest.raises(ConfigError, match="cannot write the answer 'bad'"):
        made.candidates(["good", "bad"])
    with pytest.raises(ConfigError, match="'good' and ' good' alike"):
        made.candidates(["good", " good"])


def test_a_tokenizer_without_offsets_cuts_as_one_with_them(tokenizers, monkeypatch):
    config = PlugConfig("llm", "encoder", max_input_tokens=12, template="Say: {input}")
    fast = Prompter(tokenizers["tiny-gpt2"], config, False)
    expected = fast.parts("Grüße aus Köln")
    tokenizer = copy.deepcopy(tokenizers["tiny-gpt2"])
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert Prompter(tokenizer, config, False).parts("Grüße aus Köln") == expected
    assert expected.cut > 0
