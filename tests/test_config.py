"""PlugConfig: recipes, what is refused, and the file it becomes."""

import dataclasses
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.config import AGGREGATORS, FORMAT_VERSION, PLACEMENTS, RECIPES, PlugConfig
from persona_plug.errors import ConfigError, CorruptFileError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = TEXT.filter(lambda t: "{input}" not in t)
SIZE = st.integers(1, 1 << 20)


@st.composite
def configs(draw):
    return PlugConfig(
        llm=draw(TEXT),
        encoder=draw(TEXT),
        llm_fingerprint=draw(TEXT),
        encoder_fingerprint=draw(TEXT),
        llm_width=draw(st.integers(0, 1 << 20)),
        encoder_dim=draw(st.integers(0, 1 << 20)),
        recipe=draw(st.sampled_from(sorted(RECIPES))),
        placement=draw(st.sampled_from(PLACEMENTS)),
        aggregator=draw(st.sampled_from(AGGREGATORS)),
        heads=draw(SIZE),
        user_tokens=draw(st.integers(0, 16)),
        task_tokens=draw(st.integers(1, 16)),
        use_request=draw(st.booleans()),
        answer_head=draw(st.booleans()),
        answers=draw(st.none() | st.lists(TEXT.filter(bool), min_size=2, max_size=6, unique=True).map(tuple)),
        template=draw(PLAIN) + "{input}" + draw(PLAIN),
        max_history=draw(SIZE),
        max_answer_tokens=draw(SIZE),
    )


@given(config=configs())
def test_json_round_trip(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PlugConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == config.to_json()


@given(config=configs())
def test_round_trip_through_a_file(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    assert PlugConfig.load(folder) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "middle"}, "placement='middle' is not one of suffix, prefix"),
        ({"aggregator": "max"}, "aggregator='max'"),
        ({"recipe": "soup"}, "recipe='soup'"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"key_dim": 0}, "key_dim=0"),
        ({"projector_hidden": -1}, "projector_hidden=-1"),
        ({"max_history": 0}, "max_history=0"),
        ({"max_input_tokens": 0}, "max_input_tokens=0"),
        ({"max_answer_tokens": 0}, "max_answer_tokens=0"),
        ({"user_tokens": -1}, "user_tokens=-1 must not be negative"),
        ({"task_tokens": -1}, "task_tokens=-1"),
        ({"llm_width": -1}, "llm_width=-1"),
        ({"user_tokens": 0, "task_tokens": 0}, "needs a soft token, or lora or retrieve"),
        ({"template": "no place"}, "exactly once"),
        ({"template": "{input}{input}"}, "exactly once"),
        ({"answers": ("one",)}, "two or more"),
        ({"answers": ("a", "a")}, "different"),
        ({"answers": ("a", "")}, "non-empty"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        PlugConfig("llm", "encoder", **settings)
    if "recipe" not in settings:
        with pytest.raises(ConfigError, match=message):
            PlugConfig("llm", "encoder").replace(**settings)


def test_recipes_set_what_they_promise():
    assert PlugConfig.create("l", "e") == PlugConfig("l", "e", words=True)
    assert PlugConfig.create("l", "e", "mean").aggregator == "mean"
    paper = PlugConfig.create("l", "e", "paper")
    assert (paper.aggregator, paper.placement, paper.user_tokens, paper.task_tokens) == ("paper", "prefix", 1, 1)
    assert not any((paper.item_outputs, paper.use_request, paper.use_answer_counts, paper.answer_head))
    assert paper.recipe == "paper"


def test_a_default_plug_remembers_words_for_free_text_alone():
    text = PlugConfig.create("l", "e")
    assert (text.remembers, text.shared_tokens, text.user_tokens, text.soft_tokens) == (True, 12, 4, 16)
    labels = text.replace(answers=("a", "b"))
    assert (labels.remembers, labels.shared_tokens, labels.user_tokens, labels.soft_tokens) == (False, 4, 4, 8)
    assert PlugConfig.create("l", "e", words=False).soft_tokens == 8
    for config in (PlugConfig.create("l", "e", task_tokens=3), PlugConfig.create("l", "e", task_tokens=3, words=False)):
        assert (config.shared_tokens, config.replace(answers=("a", "b")).shared_tokens) == (3, 3)


def test_which_recipes_have_a_memory():
    assert {name for name in RECIPES if PlugConfig.create("l", "e", name).remembers} == {"default", "words"}
    words = PlugConfig.create("l", "e", "words")
    assert (words.user_tokens, words.soft_tokens) == (0, 16)


def test_explicit_settings_win_over_the_recipe_and_none_does_not():
    config = PlugConfig.create("l", "e", "paper", user_tokens=3, placement=None)
    assert (config.user_tokens, config.placement) == (3, "prefix")


@pytest.mark.parametrize("wrong", [{"colour": 1}, {"recipe": "soup"}])
def test_create_names_what_it_does_not_know(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PlugConfig.create("l", "e", **wrong)


def test_a_config_cannot_be_changed():
    config = PlugConfig("l", "e", answers=["a", "b"])
    assert config.answers == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.heads = 3


def altered(**changes):
    return json.dumps({**json.loads(PlugConfig("l", "e").to_json()), **changes})


def test_an_unknown_key_warns_and_is_left_out():
    with pytest.warns(UserWarning, match="colour"):
        config = PlugConfig.from_json(altered(colour=1))
    assert config == PlugConfig("l", "e")


def test_a_plug_that_quoted_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^here\.json .*quote_tokens=8.* are gone: fit the plug again.*$"):
        PlugConfig.from_json(altered(quote_tokens=8), "here.json")


@pytest.mark.parametrize(
    "earlier",
    [{"quote_tokens": 0}, {"quote_tokens": 8, "answers": ["a", "b"]}, {"quote_tokens": 8, "user_tokens": 0}],
    ids=str,
)
def test_an_earlier_plug_that_quoted_nothing_still_opens(earlier):
    """Labels and plugs without user tokens were never quoted, whatever the field said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PlugConfig.from_json(altered(**earlier))
    assert config == PlugConfig("l", "e", **{k: v for k, v in earlier.items() if k != "quote_tokens"})


def test_quoted_tokens_are_an_unknown_setting():
    with pytest.raises(ConfigError, match=r"^unknown setting 'quote_tokens'"):
        PlugConfig.create("l", "e", quote_tokens=8)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, "2", 1.5, None])
def test_a_newer_format_is_refused(version):
    with pytest.raises(ConfigError, match=f"format version {version}.*upgrade"):
        PlugConfig.from_json(altered(format_version=version))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"llm": "l"}', '{"llm": 1, "encoder": "e"}'])
def test_what_is_no_config_is_refused(text):
    with pytest.raises(CorruptFileError, match=r"here\.json .*save the plug again"):
        PlugConfig.from_json(text, "here.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": "two"},
        {"heads": 2.5},
        {"heads": None},
        {"template": 3},
        {"template": None},
        {"user_tokens": [1]},
        {"task_tokens": "4"},
        {"task_tokens": True},
        {"answers": 5},
        {"answers": "yes no"},
        {"answers": [1, 2]},
        {"use_request": "no"},
        {"placement": 1},
        {"placement": ["suffix"]},
        {"llm_fingerprint": 7},
    ],
    ids=repr,
)
def test_values_of_the_wrong_type_are_refused(wrong):
    """A file may have been edited by hand; nothing but the library's own errors may come of it."""
    with pytest.raises((CorruptFileError, ConfigError)):
        PlugConfig.from_json(altered(**wrong))


def test_a_folder_without_config_is_no_plug(tmp_path):
    with pytest.raises(CorruptFileError, match="is not a saved plug"):
        PlugConfig.load(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80"])
def test_a_config_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CorruptFileError):
        PlugConfig.load(tmp_path)
