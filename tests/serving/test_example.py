"""The example application against a running gateway, as its documentation says."""

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "mail_replies.py"


def run(server, *words, stdin="", **env):
    settings = {**os.environ, "PLUG_URL": server.url + "/v1", "PLUG_KEY": server.keys.acme, **env}
    command = [sys.executable, EXAMPLE, *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False, env=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def printable(text):
    """A text of a tiny LLM without what a pipe changes, such as line ends."""
    return "".join(c for c in text if c.isprintable())


def test_replies_are_learned_drafted_and_taken(gateway, tmp_path):
    server = gateway(tenants=("acme",))
    sent = tmp_path / "sent.jsonl"
    sent.write_text("".join(json.dumps({"input": f"mail {i}", "output": f"reply {i}"}) + "\n" for i in range(150)))
    assert run(server, "ann smith", sent) == "150 new replies\n"
    draft = run(server, "ann smith", stdin="Where is my parcel?", TAKE="yes")
    assert printable(draft)
    with server.http(server.keys.acme) as http:
        held = http.get("/v1/users/ann smith/events", params={"limit": 1}).json()
    assert held["total"] == 151
    assert printable(held["data"][0]["output"]) == printable(draft)


def test_a_users_records_of_a_set_are_learned(gateway, tmp_path):
    """Such as `persona-plug data synthetic` writes: with the users' names, times, and fields of their own."""
    server = gateway(tenants=("acme",))
    rows = [
        {
            "user_id": f"u{i % 3}",
            "input": f"mail {i}",
            "output": "ok",
            "id": f"x{i}",
            "timestamp": i,
            "topic": "parcels",
        }
        for i in range(30)
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(server, "u1", tmp_path / "set.jsonl") == "10 new replies\n"


def test_what_is_refused_is_one_line(gateway, tmp_path):
    server = gateway(tenants=("acme",))
    (tmp_path / "a.jsonl").write_text('{"input": "a", "output": ""}\n')
    (tmp_path / "b.jsonl").write_text("oops\n")
    for words, settings in (
        (["ann", tmp_path / "a.jsonl"], {}),
        (["ann", tmp_path / "b.jsonl"], {}),
        (["ann", tmp_path / "no.jsonl"], {}),
        (["ann"], {"PLUG_KEY": "wrong"}),
        (["ann"], {"PLUG_URL": "http://127.0.0.1:9/v1"}),
    ):
        env = {**os.environ, "PLUG_URL": server.url + "/v1", "PLUG_KEY": server.keys.acme, **settings}
        command = [sys.executable, EXAMPLE, *map(str, words)]
        done = subprocess.run(command, input="x", capture_output=True, text=True, timeout=60, check=False, env=env)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_it_is_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 70
