"""The gate learns whom to trust."""

import torch

from persona_plug.heads.fitting import fit_gate, gate_samples, mean_nll, sample_nll
from persona_plug.heads.gate import WordGate
from persona_plug.heads.memory import recall
from persona_plug.heads.words import WordsReader
from tests.heads.test_gate import END, D, V
from tests.heads.test_memory import BLANK, item, tokenise


class Head:
    """A head whose states are given: the position's, as in the items."""

    def __init__(self, gate):
        self.gate = gate

    def states(self, logits):
        return torch.nn.functional.one_hot(torch.arange(len(logits)), D).float()


def samples(gate, count, own):
    """Users who write one word each, and a memory of the own word or of another's."""
    words = ["hello", "howdy", "servus", "ahoy"]
    noise = torch.Generator().manual_seed(count)
    rows = []
    for i in range(count):
        word = words[i % 4]
        known = word if own else words[(i + 1) % 4]
        reader = WordsReader(Head(gate), recall([item(known)], BLANK, tokenise), torch.zeros(0, dtype=torch.long), END)
        tokens = [*tokenise(word), END]
        rows += gate_samples([reader], torch.randn(len(tokens), V, generator=noise), tokens)
    return rows


def test_a_memory_that_helps_is_trusted_and_one_that_does_not_is_not(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("persona_plug.heads.fitting.STEPS", 100)
    for own in (True, False):
        gate = WordGate(["memory"])
        train, valid = samples(gate, 24, own), samples(gate, 8, own)
        llm = float(torch.cat([s.logp for s in valid]).mean().neg())
        nll = fit_gate(gate, train, valid)
        assert nll == mean_nll(gate, valid)
        assert nll < llm / 3 if own else abs(nll - llm) < 0.35 * llm


def test_a_sample_gives_the_mixtures_likelihood():
    gate = WordGate()
    word = "hello"
    reader = WordsReader(Head(gate), recall([item("hallo")], BLANK, tokenise), torch.tensor(tokenise("hel")), END)
    tokens = [*tokenise(word), END]
    logits = torch.randn(len(tokens), V, generator=torch.Generator().manual_seed(1))
    (sample,) = gate_samples([reader], logits, tokens)
    nll = sample_nll(gate, sample)
    torch.testing.assert_close(-reader.score(logits, tokens).mean(), nll)
