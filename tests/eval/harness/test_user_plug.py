"""What stands around a plugged LLM: continuations as a tree, and a user's items from a file."""

import json

import pytest
import torch

from eval.harness.user_plug import Row, UserPlug, open_tree, read_history
from persona_plug.config import PlugConfig
from persona_plug.errors import DataError
from persona_plug.plug import PersonaPlug
from tests.families.tiny import model_of


@pytest.mark.parametrize(
    ("continuations", "tokens", "parents"),
    [
        ([(5,)], (), ()),
        ([(5, 6, 7), (5, 6), (9,), (5, 8, 1)], (5, 6, 8), (-1, 0, 0)),
        ([(1, 2), (1, 2)], (1,), (-1,)),
    ],
)
def test_continuations_share_their_beginnings_and_have_no_end_token(continuations, tokens, parents):
    tree = open_tree(continuations)
    assert (tree.tokens, tree.parents) == (tokens, parents)
    assert tree.gold_end is None
    for ids, path in zip(continuations, tree.paths, strict=True):
        assert tuple(token for _, token in path) == ids
        for i, (node, _) in enumerate(path):
            assert node == -1 if i == 0 else tree.tokens[node] == ids[i - 1]


def test_a_history_of_several_users_needs_a_name(tmp_path):
    file = tmp_path / "all.jsonl"
    file.write_text(
        "".join(json.dumps({"user_id": u, "input": "i", "output": u}) + "\n" for u in ("ann", "bob", "ann"))
    )
    assert [i.output for i in read_history(file, "ann")] == ["ann", "ann"]
    with pytest.raises(DataError, match="holds 2 users; choose one with user=ID"):
        read_history(file)
    with pytest.raises(DataError, match="holds no user 'eve'"):
        read_history(file, "eve")


def test_an_llm_that_reads_rows_is_scored_and_judged_as_by_itself(load_parts, encoder):
    """Bloom counts columns: its continuations run one by one, and what it would write is seen there."""
    llm, (_, tokenizer) = model_of("bloom"), load_parts("tiny-gpt2")
    plug = PersonaPlug.join(PlugConfig("tiny", encoder.name, max_answer_tokens=4), llm, tokenizer, encoder)
    user_plug = UserPlug(plug, detached=True)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in ("Once", "what is two and two?")]
    parts = [user_plug.place(Row("", ids))[0] for ids in prompts]
    none = torch.zeros(2, 0, plug.config.llm_width)
    with torch.no_grad():
        best = [llm(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() for ids in prompts]
    answers = [((best[0],), (7, 8)), ((9,), (best[1],))]
    scores, greedy = user_plug.score(parts, none, [open_tree(a) for a in answers])
    assert greedy == [[True, False], [False, True]]
    for ids, row, values in zip(prompts, answers, scores, strict=True):
        for answer, value in zip(row, values, strict=True):
            with torch.no_grad():
                logp = llm(input_ids=torch.tensor([[*ids, *answer[:-1]]])).logits[0, -len(answer) :].log_softmax(-1)
            assert value == pytest.approx(float(logp.gather(1, torch.tensor(answer)[:, None]).sum()), abs=1e-3)
