"""What a method answers is in the order of the questions, however they were batched."""

import numpy as np
import pytest

from persona_plug.data.history import Example, HistoryItem
from persona_plug.measure.answers import evaluate

TEXTS = ["a long request with many words in it that goes on", "short", "of middling length, this one", "tiny"] * 5


@pytest.mark.parametrize("answers", [("good", "bad"), None])
def test_each_question_gets_its_own_values(make_plug, answers):
    plug = make_plug(answers=answers, max_answer_tokens=6)
    held = [
        Example(f"u{i}", f"{text} {i}", "good" if i % 3 else "bad", (HistoryItem(f"before {i}", "bad"),))
        for i, text in enumerate(TEXTS)
    ]
    together = evaluate(plug, held, generated=7)
    for i in (0, 1, 7, 19):
        alone = evaluate(plug, held[i : i + 1], generated=1)
        assert together.values["nll"][i] == pytest.approx(alone.values["nll"][0], abs=1e-4)
        if answers is None and not np.isnan(together.values["rouge-1"][i]):
            assert together.values["rouge-1"][i] == pytest.approx(alone.values["rouge-1"][0])
    if answers is None:
        some = [i for i in range(20) if not np.isnan(together.values["rouge-1"][i])]
        assert len(some) == 7
        assert together.texts == [evaluate(plug, held[i : i + 1], generated=1).texts[0] for i in some]
        named = evaluate(plug, held, generated=[some[5], some[1]])
        assert named.texts == [together.texts[5], together.texts[1]]
        assert np.flatnonzero(~np.isnan(named.values["rouge-1"])).tolist() == [some[1], some[5]]
    else:
        assert together.texts == plug.choose([e.input for e in held], history=[list(e.history) for e in held])[0]


@pytest.mark.parametrize("answers", [("good", "bad"), None])
def test_the_plain_llm_encodes_nothing(make_plug, answers, monkeypatch):
    """Else the first method that is asked would be charged for what another one reads."""
    plug = make_plug(answers=answers, max_answer_tokens=6)
    held = [Example("u", text, "good", (HistoryItem("before", "bad"),)) for text in TEXTS[:4]]
    encoded = []
    encode = plug.encoder.encode
    monkeypatch.setattr(plug.encoder, "encode", lambda texts, *a, **k: encoded.extend(texts) or encode(texts, *a, **k))
    evaluate(plug, held, generated=2)
    assert encoded
    del encoded[:]
    evaluate(plug, held, generated=2, personal=False)
    assert not encoded
