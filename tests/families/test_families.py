"""Every LLM family is run as its own plain pass, or is refused when a plug is made."""

import re
from pathlib import Path

import pytest
import torch

from persona_plug.errors import ConfigError
from persona_plug.splice.causal import CausalSplicer
from persona_plug.splice.families import TREES, splicer_for
from persona_plug.splice.rows import RowSplicer
from persona_plug.splice.seq2seq import Seq2SeqSplicer
from persona_plug.splice.states import StateCache
from tests.families.checks import check
from tests.families.tiny import families, model_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "families.md"

MOST_USED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt"]
MOST_USED += ["olmo2", "falcon", "granite", "smollm3", "t5"]
FAULTS = {
    "qwen3_moe": CausalSplicer,  # a window without kinds of layers, and experts
    "qwen3_next": RowSplicer,  # recurrent and attention by turns
    "rwkv": RowSplicer,  # no left padding
    "bloom": RowSplicer,  # ALiBi
    "gpt_neo": RowSplicer,  # local layers that count columns
    "llama4_text": RowSplicer,  # chunks
    "deepseek_v3": RowSplicer,  # keys and values of unlike shape
    "bart": Seq2SeqSplicer,  # a forced first token
    "pegasus": Seq2SeqSplicer,  # embeddings scaled outside of their table
    "longt5": Seq2SeqSplicer,  # an encoder of blocks
    "switch_transformers": Seq2SeqSplicer,  # experts
}
REFUSED = {
    "bert": "depend on tokens behind them",
    "xlnet": "depend on tokens behind them|does not run on embeddings",
    "ctrl": "does not run on embeddings",
    "prophetnet": "depend on tokens behind them",  # on how many there are
    "bamba": "does not run on embeddings",
}


@pytest.fixture(scope="module")
def tokenizer(load_parts):
    return load_parts("tiny-gpt2")[1]


@pytest.mark.parametrize("family", MOST_USED)
def test_the_most_used_families_are_right(family, tokenizer, encoder):
    check(model_of(family), tokenizer, encoder)


@pytest.mark.parametrize("family", FAULTS)
def test_layers_of_every_kind_are_right(family, tokenizer, encoder):
    llm = model_of(family)
    check(llm, tokenizer, encoder)
    assert type(splicer_for(llm, StateCache(0))) is FAULTS[family]


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(family):
    with pytest.raises(ConfigError, match=REFUSED[family]) as error:
        splicer_for(model_of(family), StateCache(0))
    assert f"family {family}" in str(error.value)
    assert "\n" not in str(error.value)


def test_alibi_makes_a_family_read_rows():
    assert type(splicer_for(model_of("falcon", alibi=True), StateCache(0))) is RowSplicer


def test_an_encoder_that_is_made_a_decoder_is_read_in_rows(tokenizer, encoder):
    llm = model_of("bert", is_decoder=True)
    check(llm, tokenizer, encoder)


def test_the_habits_of_a_generation_config_are_left_behind(tokenizer, encoder):
    llm = model_of("llama")
    settings = {"repetition_penalty": 3.0, "num_beams": 3, "min_length": 30, "no_repeat_ngram_size": 1}
    settings |= {"num_return_sequences": 3, "return_dict_in_generate": True, "stop_strings": ["e"], "temperature": 0.5}
    for name, value in settings.items():
        setattr(llm.generation_config, name, value)
    check(llm, tokenizer, encoder)


def test_a_model_whose_embeddings_lie_is_refused_with_the_difference():
    llm = model_of("llama")
    usual = llm.forward

    def forward(*positional, inputs_embeds=None, **named):
        scaled = None if inputs_embeds is None else inputs_embeds * 1.5
        return usual(*positional, inputs_embeds=scaled, **named)

    llm.forward = forward
    with pytest.raises(ConfigError, match=r"a score through the plug's path is [0-9.]+ away from its plain pass"):
        splicer_for(llm, StateCache(0))


@pytest.mark.families
@pytest.mark.parametrize("family", families())
def test_every_family_is_as_the_table_says(family, tokenizer, encoder):
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{family}` |"))
    if "| not built |" in row:
        pytest.xfail("no tiny model of it could be made")
    if "| refused" in row:
        with pytest.raises(ConfigError):
            splicer_for(model_of(family), StateCache(0))
    else:
        llm = model_of(family)
        check(llm, tokenizer, encoder)
        assert ("| trees |" in row) == isinstance(splicer_for(llm, StateCache(0)), CausalSplicer)


def test_the_table_has_every_family_that_reads_trees():
    rows = set(re.findall(r"^\| `(\S+)` \|.*\| trees \|", DOCS.read_text(), re.MULTILINE))
    assert rows == TREES


def test_a_check_leaves_the_llm_as_it_was():
    llm = model_of("llama")
    before = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    splicer_for(llm, StateCache(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.state_dict().items())
