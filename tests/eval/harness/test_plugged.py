"""What stands around a plugged LLM: continuations as a tree, and a user's items from a file."""

import json

import pytest

from eval.harness.plugged import open_tree, read_history
from persona_plug.errors import DataError


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
