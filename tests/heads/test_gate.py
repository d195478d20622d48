"""The mixture: a distribution, the LLM's own where nothing is known, and equal however it is read."""

import pytest
import torch

from persona_plug.heads.gate import PARTS, WordGate, look
from persona_plug.heads.memory import WordMemory, recall
from tests.heads.test_memory import BLANK, item, request_words, tokenise

V, D, END = 140, 16, 0


@pytest.fixture
def memory():
    return recall([item("hello you"), item("hello me")], BLANK, tokenise)


def mixture(gate, logp, states, written, offset, memory, request):
    sight = look(logp, states, written, offset, memory, request, END)
    mixed, rest, weights = gate(sight)
    return (logp + rest.unsqueeze(1)).index_copy(1, sight.tokens, mixed), weights


def draw(length, seed=0):
    noise = torch.Generator().manual_seed(seed)
    logp = torch.randn(length, V, generator=noise).log_softmax(-1)
    return logp, torch.nn.functional.normalize(torch.randn(length, D, generator=noise), dim=-1)


def random_gate(parts=PARTS):
    gate = WordGate(parts)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gate


def test_the_mixture_is_a_distribution(memory):
    written = tokenise("hello")
    logp, states = draw(6)
    mixed, weights = mixture(random_gate(), logp, states, written, 0, memory, torch.tensor(tokenise("hell")))
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(6))
    torch.testing.assert_close(weights.sum(-1), torch.ones(6))


def test_with_nothing_known_it_is_the_llms():
    logp, states = draw(3)
    nobody = WordMemory.empty(D)
    mixed, weights = mixture(random_gate(), logp, states, tokenise("ab"), 0, nobody, torch.zeros(0, dtype=torch.long))
    torch.testing.assert_close(mixed, logp)
    assert weights[:, 0].tolist() == [1.0] * 3


def test_one_position_after_the_other_gives_what_all_at_once_do(memory):
    written, request = tokenise("hello y"), torch.tensor(tokenise("hello"))
    logp, states = draw(8)
    gate = random_gate()
    together, _ = mixture(gate, logp, states, written, 0, memory, request)
    for i in range(8):
        alone, _ = mixture(gate, logp[i : i + 1], states[i : i + 1], written[:i], i, memory, request)
        torch.testing.assert_close(alone[0], together[i])


@pytest.mark.parametrize("part", PARTS[1:])
def test_a_part_that_is_left_out_has_no_weight(memory, part):
    parts = [p for p in PARTS if p != part]
    logp, states = draw(6)
    _, weights = mixture(random_gate(parts), logp, states, tokenise("hello"), 0, memory, torch.tensor(tokenise("ell")))
    assert weights[:, PARTS.index(part)].tolist() == [0.0] * 6


def test_memory_says_what_followed_the_nearest_state(memory):
    gate = WordGate(["memory"])
    with torch.no_grad():
        gate.out.weight.zero_()
        gate.out.bias.copy_(torch.tensor([-20.0, 20.0, 0.0, 0.0]))
        gate.log_temperature.fill_(6.0)
    logp, _ = draw(1)
    mixed, _ = mixture(gate, logp, memory.states[4:5], tokenise("hell"), 4, memory, torch.zeros(0, dtype=torch.long))
    assert chr(int(mixed.argmax())) == "o"


def test_inside_a_slot_the_next_token_needs_the_ones_before():
    names = torch.eye(D)
    kept = [item("hi Ben,", "Ben lamp", names[:2])]
    read = recall(kept, request_words("lamp Jo", names[[1, 0]]), tokenise)
    logp, states = draw(2)
    sight = look(logp, states, tokenise("hi J"), 3, read, torch.zeros(0, dtype=torch.long), END)
    place = int(read.inside.int().argmax())
    assert sight.open[:, place].tolist() == [False, True]


def test_a_slot_that_is_written_does_not_begin_again():
    """86598 ends as it begins: behind it the place that follows an 8 is closed."""
    names = torch.eye(D)
    kept = [item("order 11 left", "11 lamp", names[:2])]
    read = recall(kept, request_words("lamp 86598", names[[1, 0]]), tokenise)
    place = int(read.inside.int().argmax())
    assert chr(int(read.tokens[place])) == "6"
    logp, states = draw(12)
    nothing = torch.zeros(0, dtype=torch.long)
    sight = look(logp, states, tokenise("order 86598"), 0, read, nothing, END)
    assert [at for at in range(12) if sight.open[at, place]] == [7]


def test_copying_follows_the_longest_common_end():
    logp, states = draw(1)
    request = torch.tensor(tokenise("xab yab zcab!"))
    sight = look(logp, states, tokenise("cab"), 3, WordMemory.empty(D), request, END)
    assert int(sight.match.max()) == 3
    assert chr(int(request[sight.match[0].argmax()])) == "!"


def test_places_gain_by_like_positions_recent_items_and_near_requests():
    """Three items that say different things from one state: what the gate trusts decides which is said."""
    names = torch.eye(D)
    kept = [item("a", topic=names[1]), item("xxxxb", topic=names[0]), item("c", topic=names[0])]
    memory = recall(kept, request_words("lamp Jo", names[[1, 0]]), tokenise)
    memory.states[:] = names[0]
    logp, _ = draw(1)
    sight = look(logp, names[:1], [], 0, memory, torch.zeros(0, dtype=torch.long), END)
    for trust, expected in (([0.0, 0.0, 9.0], "a"), ([0.0, 9.0, 0.0], "c"), ([9.0, 0.1, 0.0], "c")):  # of six
        gate = WordGate(["memory"])
        with torch.no_grad():
            gate.trust.copy_(torch.tensor([*trust, 0.0, 0.0, 0.0]))
        assert chr(int(sight.tokens[gate._memory(sight).probability[0].argmax()])) == expected


def test_what_is_written_already_is_known_as_such():
    """An answer that repeats itself goes round in circles: the gate has to see it."""
    memory = recall([item("abcd")], BLANK, tokenise)
    logp, states = draw(7)
    sight = look(logp, states, tokenise("abcabc"), 0, memory, torch.zeros(0, dtype=torch.long), END)
    assert [chr(int(t)) for t in memory.tokens[:4]] == list("abcd")
    assert sight.again.int().T.tolist()[2] == [0, 0, 0, 1, 1, 1, 1]
    assert not sight.again[:, [0, 1, 3]].any()
    logp[5, ord("d")] = 8.0
    assert not look(logp, states, tokenise("abcabc"), 0, memory, torch.zeros(0, dtype=torch.long), END).top_again[5]
    logp[5, ord("c")] = 9.0  # behind "ab" again
    assert look(logp, states, tokenise("abcabc"), 0, memory, torch.zeros(0, dtype=torch.long), END).top_again[5]
    alone = look(logp[4:5], states[4:5], tokenise("abca"), 4, memory, torch.zeros(0, dtype=torch.long), END)
    assert torch.equal(alone.again[0], sight.again[4])


def test_a_slot_that_fits_better_is_preferred():
    names = torch.eye(D)
    kept = [item("Ben!", "Ben lamp", names[[1, 0]]), item("Ben?", "Ben lamp", names[[0, 1]])]
    request = request_words("Jo Max", torch.stack([0.6 * names[0] + 0.8 * names[3], 0.9 * names[1] + 0.43 * names[4]]))
    memory = recall(kept, request, tokenise)
    assert memory.fits[memory.slots].unique().tolist() == pytest.approx([0.6, 0.9])
    logp, states = draw(1)
    sight = look(logp, states, [], 0, memory, torch.zeros(0, dtype=torch.long), END)
    gate = WordGate(["memory"])
    with torch.no_grad():
        gate.log_temperature.fill_(-9)
        gate.trust.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 30.0, 0.0]))
    assert chr(int(sight.tokens[gate._memory(sight).probability[0].argmax()])) == "M"
