"""`users remember`: the LLM reads stored texts once."""

import json

import pytest

from persona_plug import HistoryStore
from tests.cli.test_users import fails, run
from tests.fit.test_words import data, few_steps, fitted, people  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def folder(make_plug, data, tmp_path_factory):  # noqa: F811
    plug = fitted(make_plug, data)
    return plug, plug.save_pretrained(tmp_path_factory.mktemp("plug"))


def test_stored_texts_are_read_once(folder, tmp_path):
    plug, path = folder
    url = f"sqlite:///{tmp_path}/users.db"
    samples = people(2, 2)[::5]
    with HistoryStore(url, plug.encoder, keep_text=True) as store:
        for sample in samples:
            store.append(sample.user_id, sample.history)
    count = sum(len(s.history) for s in samples)
    first = json.loads(run("users", "remember", path, "--store", url, "--device", "cpu", "--json").stdout)
    assert (first["read"], first["known"]) == (count, 0)
    assert first["events_per_second"] > 0
    again = json.loads(run("users", "remember", path, "--store", url, "--device", "cpu", "--json").stdout)
    assert (again["read"], again["known"]) == (0, count)


def test_details_bracket_what_the_memory_brought(folder, data, tmp_path):  # noqa: F811
    _, path = folder
    sample = data.held_out[0]
    events = tmp_path / "events.jsonl"
    events.write_text("".join(json.dumps({"input": i.input, "output": i.output}) + "\n" for i in sample.history))
    words = ["generate", path, sample.input, "--history", events, "--device", "cpu", "--max-new-tokens", 8]
    row = json.loads(run(*words, "--json").stdout)
    assert row["marks"]
    shown = run(*words, "--details").stdout.splitlines()[0]
    assert shown != row["text"]
    assert shown.replace("[", "").replace("]", "") == row["text"]
    start, end = row["marks"][0]
    assert f"[{row['text'][start:end]}]" in shown


def test_a_store_without_texts_and_a_plug_without_words_are_refused(folder, make_plug, tmp_path):
    plug, path = folder
    url = f"sqlite:///{tmp_path}/users.db"
    HistoryStore(url, plug.encoder).close()
    fails("users", "remember", path, "--store", url, "--device", "cpu", say="keeps no texts to read")
    other = make_plug().save_pretrained(tmp_path / "other")
    fails("users", "remember", other, "--store", url, "--device", "cpu", say="has no words memory")
