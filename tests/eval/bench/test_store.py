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


def test_what_rounding_costs_is_told(make_plug, tmp_path, capsys):
    folder = make_plug(differ=True).save_pretrained(tmp_path / "plug")
    rows = [{"user_id": f"u{i % 3}", "input": f"ask {i}", "output": f"say {i}", "id": str(i)} for i in range(12)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    store.main([f"plug={folder}", f"data={tmp_path / 'e.jsonl'}", "samples=2"])
    found = json.loads(capsys.readouterr().out)
    assert found["users"] == 2
    assert found["loglik"]["fp16"] != found["loglik"]["int8"]
    gap = found["int8_minus_fp16"]
    assert gap[0] == pytest.approx(found["loglik"]["int8"] - found["loglik"]["fp16"])
    assert gap[1] <= gap[0] <= gap[2]
