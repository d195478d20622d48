"""The LLM's state, had back from its logits."""

import pytest
import torch

from persona_plug.errors import ConfigError
from persona_plug.heads.states import StateMap


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_states_come_back_from_logits(load_parts, name):
    llm, _ = load_parts(name)
    width = llm.get_output_embeddings().weight.shape[1]
    states = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
    logits = llm.get_output_embeddings()(states)
    state_map = StateMap.of(llm, width)
    state_map.fit(llm, logits)
    mapped, true = state_map(logits), torch.nn.functional.normalize(states, dim=-1)
    torch.testing.assert_close(mapped @ mapped.T, true @ true.T, atol=1e-3, rtol=0)
    torch.testing.assert_close(state_map(logits.log_softmax(-1)), mapped, atol=1e-3, rtol=0)


def test_a_softcap_is_undone(load_parts):
    llm, _ = load_parts("tiny-llama")
    weight = llm.get_output_embeddings().weight
    states = torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(0))
    capped = StateMap(weight.shape[1], len(weight), softcap=30.0)
    logits = states @ weight.T
    capped.fit(llm, 30 * torch.tanh(logits / 30))
    mapped, true = capped(30 * torch.tanh(logits / 30)), torch.nn.functional.normalize(states, dim=-1)
    torch.testing.assert_close(mapped @ mapped.T, true @ true.T, atol=1e-2, rtol=0)


class Layer(torch.nn.Module):
    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight, requires_grad=False), bias


@pytest.mark.parametrize(
    "layer",
    [
        Layer(torch.ones(100, 8)),
        Layer(torch.eye(100, 8), bias=torch.zeros(100)),
        Layer((torch.eye(100, 8) * 100).to(torch.int8)),
        torch.nn.Identity(),
    ],
    ids=["rank one", "bias", "quantised", "no matrix"],
)
def test_a_layer_that_cannot_be_inverted_is_named(load_parts, monkeypatch, layer):
    llm, _ = load_parts("tiny-llama")
    monkeypatch.setattr(llm, "get_output_embeddings", lambda: layer)
    with pytest.raises(ConfigError, match=rf"{type(layer).__name__}.*words=False"):
        StateMap.of(llm, 4).fit(llm, torch.zeros(3, 100))
