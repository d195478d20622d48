"""`persona-plug users`, and answers for a user in a store."""

import json
import stat

import pytest
from typer.testing import CliRunner

from persona_plug import HistoryStore
from persona_plug.cli import app
from persona_plug.serving.auth import store_key

TINY = ["--encoder", "tiny-encoder"]


def run(*words, code=0, stdin=None):
    result = CliRunner().invoke(app, [str(w) for w in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{words}: a traceback instead of an error of one line") from result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*words, say):
    result = run(*words, code=1)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert say in lines[0]


@pytest.fixture
def file(tmp_path):
    records = [
        {"user_id": f"user-{i % 2}", "input": f"question {i}", "output": f"answer {i}", "id": i, "timestamp": 86400 * i}
        for i in range(6)
    ]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path / "e.jsonl"


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/users.db"


@pytest.fixture
def filled(file, url):
    run("users", "add", file, "--store", url, "--keep-text", *TINY)
    return url


def test_add_says_what_is_new_and_goes_on(file, url):
    first = json.loads(run("users", "add", file, "--store", url, *TINY, "--json").stdout)
    assert first == {"new": 6, "known": 0, "skipped": 0, "truncated": 0}
    with file.open("a") as more:
        more.write('oops\n{"user_id": "user-9", "output": "x", "input": ""}\n')
    fails("users", "add", file, "--store", url, *TINY, say="e.jsonl:7: not JSON")
    again = run("users", "add", file, "--store", url, *TINY, "--skip-bad")
    assert again.stdout == "new: 1, known: 6, skipped: 1, truncated: 0\n"
    assert "e.jsonl:7" in again.stderr


def test_list_show_and_export(filled, tmp_path):
    rows = json.loads(run("users", "list", "--store", filled, "--json").stdout)
    assert [(r["user_id"], r["items"]) for r in rows] == [("user-0", 3), ("user-1", 3)]
    assert run("users", "list", "--store", filled, "--prefix", "user-1").stdout.startswith("user-1  3 items  20")
    shown = json.loads(run("users", "show", "user-1", "--store", filled, "--limit", 2, "--json").stdout)
    assert (shown["items"], [i["output"] for i in shown["newest"]]) == (3, ["answer 3", "answer 5"])
    lines = run("users", "show", "user-1", "--store", filled).stdout.splitlines()
    assert lines[0] == "user-1: 3 items"
    assert lines[1] == "1  1970-01-02T00:00:00+00:00  question 1 -> answer 1"
    out = tmp_path / "user-1.jsonl"
    run("users", "export", "user-1", "--store", filled, "--out", out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run("users", "export", "user-1", "--store", filled).stdout == out.read_text()
    assert [json.loads(line)["output"] for line in out.read_text().splitlines()] == ["answer 1", "answer 3", "answer 5"]


def test_without_texts_ids_and_times_are_shown(file, url):
    run("users", "add", file, "--store", url, *TINY)
    lines = run("users", "show", "user-0", "--store", url).stdout.splitlines()
    assert lines[:2] == ["user-0: 3 items, kept without their texts", "0  1970-01-01T00:00:00+00:00"]
    item = json.loads(run("users", "show", "user-0", "--store", url, "--json").stdout)["newest"][0]
    assert item == {"id": "0", "timestamp": 0.0}


def test_delete_and_forget(filled):
    kept = run("users", "delete", "user-0", "2", "--store", filled, code=1, stdin="n\n")
    assert "delete item 2 of user-0 for good?" in kept.stderr
    assert run("users", "delete", "user-0", "2", "--store", filled, stdin="y\n").stdout.endswith("deleted\n")
    fails("users", "delete", "user-0", "2", "--store", filled, "--yes", say="no such item")
    refused = run("users", "forget", "user-0", "--store", filled, code=1, stdin="n\n")
    assert "delete 2 items of user-0 for good?" in refused.stderr
    assert "deleted 2 items and 4 cached" in run("users", "forget", "user-0", "--store", filled, stdin="y\n").stdout
    result = json.loads(run("users", "forget", "user-1", "--store", filled, "--yes", "--json").stdout)
    assert result == {"items": 3, "cached_vectors": 6}
    again = json.loads(run("users", "forget", "user-1", "--store", filled, "--yes", "--json").stdout)
    assert again == {"items": 0, "cached_vectors": 0}
    assert run("users", "list", "--store", filled, "--json").stdout == "[]\n"


def test_errors_are_one_line(filled, url, tmp_path, file):
    missing = f"sqlite:///{tmp_path}/no.db"
    for words in (["list"], ["show", "a"], ["export", "a"], ["delete", "a", "b", "--yes"], ["forget", "a", "--yes"]):
        fails("users", *words, "--store", missing, say="no such store")
    fails("users", "show", "nobody", "--store", filled, say="no such user")
    fails("users", "export", "nobody", "--store", filled, say="no such user")
    fails("users", "list", "--store", "nonsense", say="sqlite:///users.db")
    fails("users", "add", tmp_path / "no.jsonl", "--store", url, *TINY, say="no such file")
    fails("users", "add", file, "--store", url, *TINY, "--vectors", "int8", say="not int8")
    fails("users", "add", file, "--store", f"sqlite:///{tmp_path}/new.db", *TINY, "--vectors", "int4", say="int4")
    run("users", "list", code=2)
    assert not (tmp_path / "no.db").exists()


def test_control_characters_do_not_reach_the_terminal(url, encoder):
    from persona_plug import HistoryStore

    with HistoryStore(url, encoder, keep_text=True) as store:
        store.append("a\x1b[31mb\nc", [{"input": "x\x1b]0;t\x07", "output": "y\r\nz", "id": "i\x1b"}])
    out = run("users", "list", "--store", url).stdout + run("users", "show", "a\x1b[31mb\nc", "--store", url).stdout
    assert not set(out) & {"\x1b", "\x07", "\r"}
    assert out.count("\n") == 3


def test_answers_for_a_user_in_a_store(filled, make_plug, tmp_path, file):
    saved = make_plug(differ=True, answers=("answer 1", "other")).save_pretrained(tmp_path / "plug")
    with_store = ["--store", filled, "--user", "user-1"]
    with_file = ["--history", file, "--user", "user-1"]
    for words in (["score", saved, "hello", "--json"], ["generate", saved, "hello", "--max-new-tokens", 3]):
        assert run(*words, *with_store).stdout == run(*words, *with_file).stdout
    row = json.loads(run("generate", saved, "hello", *with_store, "--max-new-tokens", 3, "--json").stdout)
    assert {w["id"] for w in row["weights"]} == {"1", "3", "5"}
    cold = run("score", saved, "hello", "--store", filled, "--user", "nobody")
    assert "no such user" in cold.stderr
    assert cold.stdout == run("score", saved, "hello").stdout
    run("score", saved, "hello", "--store", filled, code=2)
    run("score", saved, "hello", *with_store, "--history", file, code=2)
    fails("score", saved, "hello", "--store", f"sqlite:///{tmp_path}/no.db", "--user", "a", say="no such store")


def test_details_show_ids_where_no_text_is_kept(file, url, make_plug, tmp_path):
    run("users", "add", file, "--store", url, *TINY)
    saved = make_plug(differ=True).save_pretrained(tmp_path / "plug")
    out = run("generate", saved, "hello", "--store", url, "--user", "user-1", "--max-new-tokens", 2, "--details").stdout
    assert sorted(line.split()[-1] for line in out.splitlines()[-3:]) == ["1", "3", "5"]


def test_a_tenants_users_are_those_that_a_gateway_finds(file, url):
    run("users", "add", file, "--store", url, "--keep-text", "--tenant", "acme", *TINY)
    with HistoryStore(url) as store:
        assert [row.user_id for row in store.users()] == [store_key("acme", "user-0"), store_key("acme", "user-1")]
    fails("users", "show", "user-0", "--store", url, say="holds no such user")
    shown = json.loads(run("users", "show", "user-0", "--store", url, "--tenant", "acme", "--json").stdout)
    assert shown["items"] == 3
    assert "answer 0" in run("users", "export", "user-0", "--store", url, "--tenant", "acme").stdout
    run("users", "delete", "user-0", "0", "--store", url, "--tenant", "acme", "--yes")
    run("users", "forget", "user-0", "--store", url, "--tenant", "acme", "--yes")
    fails("users", "show", "user-0", "--store", url, "--tenant", "acme", say="holds no such user")
    assert run("users", "list", "--store", url).stdout.count("items") == 1


def test_an_export_can_be_read_and_added_again(filled, tmp_path):
    out = tmp_path / "mine.jsonl"
    run("users", "export", "user-1", "--store", filled, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert set(rows[0]) == {"user_id", "id", "input", "output", "timestamp", "last_update_of_user"}
    again = json.loads(
        run("users", "add", out, "--store", f"sqlite:///{tmp_path}/b.db", "--keep-text", *TINY, "--json").stdout
    )
    assert again["new"] == 3
    everything = run("users", "export", "user-1", "--store", filled, "--vectors").stdout
    assert "text_hashes" in json.loads(everything.splitlines()[0])


def test_an_export_replaces_nothing_unasked(filled, tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text("precious")
    fails("users", "export", "user-1", "--store", filled, "--out", out, say="is there already")
    assert out.read_text() == "precious"
    run("users", "export", "user-1", "--store", filled, "--out", out, "--force")
    assert "answer 1" in out.read_text()


@pytest.mark.parametrize("tenant", [[], ["--tenant", "local"], ["--tenant", "acme"], ["--tenant", "a/b"]])
@pytest.mark.parametrize("keep_text", ["--keep-text", "--no-keep-text"])
def test_an_export_is_added_again_for_the_same_tenant(file, url, tmp_path, tenant, keep_text):
    run("users", "add", file, "--store", url, *TINY, keep_text, *tenant)
    before = run("users", "list", "--store", url, "--json").stdout
    for user in ("user-0", "user-1"):
        run("users", "export", user, "--store", url, "--out", tmp_path / f"{user}.jsonl", *tenant)
    (tmp_path / "all.jsonl").write_text("".join((tmp_path / f"user-{n}.jsonl").read_text() for n in range(2)))
    again = f"sqlite:///{tmp_path}/again.db"
    added = json.loads(
        run("users", "add", tmp_path / "all.jsonl", "--store", again, *TINY, keep_text, *tenant, "--json").stdout
    )
    assert (added["new"], added["known"]) == (6, 0)
    after = run("users", "list", "--store", again, "--json").stdout
    assert [(r["user_id"], r["items"]) for r in json.loads(after)] == [
        (r["user_id"], r["items"]) for r in json.loads(before)
    ]


@pytest.mark.parametrize("name", ["ann", "a/b", "Zo\u00eb %2F", "local/ann"])
def test_users_that_are_added_by_default_are_those_of_a_gateway_without_keys(url, tmp_path, name):
    (tmp_path / "e.jsonl").write_text(json.dumps({"user_id": name, "input": "q", "output": "a"}))
    run("users", "add", tmp_path / "e.jsonl", "--store", url, "--keep-text", *TINY)
    with HistoryStore(url) as store:
        assert [row.user_id for row in store.users()] == [store_key("local", name)]
    assert "1 items" in run("users", "show", name, "--store", url).stdout


def test_the_store_may_stand_in_the_environment(file, url, monkeypatch):
    monkeypatch.setenv("PERSONA_PLUG_STORE", url)
    run("users", "add", file, *TINY)
    assert len(json.loads(run("users", "list", "--json").stdout)) == 2
    assert url not in run("users", "list", "--help").stdout


def test_several_are_forgotten_at_once_and_old_items_expire(filled):
    assert json.loads(run("users", "expire", "--keep-days", 1, "--store", filled, "--json").stdout) == {"items": 0}
    gone = json.loads(run("users", "forget", "user-0", "user-1", "nobody", "--store", filled, "--yes", "--json").stdout)
    assert gone["items"] == 6
    assert run("users", "list", "--store", filled, "--json").stdout == "[]\n"
    assert run("users", "expire", "--keep-days", 0, "--store", filled).stdout == "deleted 0 items\n"


def test_style_of_a_user_as_lines_and_as_json(tmp_path, url):
    greetings = {"ann": "Servus", "bob": "Hello there"}
    rows = [
        {"user_id": u, "input": f"q {i}", "output": f"{g}, take {i} 🌳"} for u, g in greetings.items() for i in range(5)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run("users", "add", tmp_path / "s.jsonl", "--store", url, "--keep-text", *TINY)
    lines = run("users", "show", "ann", "--store", url, "--style").stdout.splitlines()
    assert lines[:2] == ["ann", "5 texts, compared with 5 of other users"]
    assert any(line.startswith("openings  Servus, take") for line in lines)
    card = json.loads(run("users", "show", "ann", "--store", url, "--style", "--json").stdout)
    assert card["openings"][0]["text"] == "Servus, take"
    assert card["emoji"] == []  # both write it
    fails("users", "show", "zoe", "--store", url, "--style", say="holds no such user")


def test_style_needs_texts(file, url):
    run("users", "add", file, "--store", url, *TINY)
    fails("users", "show", "user-1", "--store", url, "--style", say="keeps no texts")
