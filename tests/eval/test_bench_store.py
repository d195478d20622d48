"""The store's benchmark finds what it is there for, on a small scale."""

import json

import pytest

from eval.bench import store


@pytest.mark.parametrize("encoder", ["tiny-encoder", "random"])
def test_every_figure_is_there(capsys, encoder):
    more = ["llm=tiny-llama"] if encoder == "tiny-encoder" else []
    store.main(["users=5", "events=40", "reads=10", "appends=3", "forgets=1", "history=6", f"encoder={encoder}", *more])
    found = json.loads(capsys.readouterr().out)
    assert found["import_again_new"] == 0
    assert found["bytes_per_event"] > 2 * 384 if encoder == "random" else found["bytes_per_event"] > 0
    assert 0 < found["read_ms"]["p50"] <= found["read_ms"]["p99"]
    assert found["append_over_encode"] > 0
    assert len(found["forget_s"]) == 1
    assert ("soft_over_prefill" in found) == bool(more)
    assert 0 < found["import_share_encoder"] < 1
