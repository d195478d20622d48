"""`persona-plug serve` and `keys`, as processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

from persona_plug.cli import app

SCRIPT = Path(sys.executable).parent / "persona-plug"


@pytest.fixture(scope="module")
def folder(make_plug, tmp_path_factory):
    return make_plug(differ=True).save_pretrained(tmp_path_factory.mktemp("plugs") / "my-plug")


@pytest.fixture
def serve(folder, tmp_path):
    """Run the command with a store in tmp_path; gives (process, base URL)."""
    started = []

    def run(*options, plug=folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [SCRIPT, "serve", plug, "--store", f"sqlite:///{tmp_path}/users.db", "--port", str(port), *options]
        env = {**os.environ, "VLLM_API_KEY": "vllm-secret"}
        started.append(subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True, env=env))
        return started[-1], f"http://127.0.0.1:{port}"

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait(process, url):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        try:
            if httpx.get(url + "/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError


def test_a_server_from_start_to_stop(serve, tmp_path, folder, people):
    from persona_plug.plug import PersonaPlug

    made = CliRunner().invoke(app, ["keys", "new", "--tenant", "acme", "--keys", str(tmp_path / "k.jsonl"), "--json"])
    key = json.loads(made.stdout)["key"]
    process, url = serve("--keys", tmp_path / "k.jsonl", "--keep-text")
    wait(process, url)
    client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
    assert [m.id for m in client.models.list()] == ["my-plug"]
    events = [{"input": i.input, "output": i.output} for i in people.ann]
    headers = {"Authorization": f"Bearer {key}"}
    httpx.post(url + "/v1/users/ann/events", json={"events": events}, headers=headers).raise_for_status()
    answer = client.completions.create(model="my-plug", prompt="rate this", user="ann")
    assert answer.choices[0].text == PersonaPlug.from_pretrained(folder).generate("rate this", people.ann)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    lines = [json.loads(line) for line in errors.splitlines()]
    assert [line["event"] for line in lines] == ["start", "ready", "request", "request", "request"]
    assert "ann" not in errors
    assert key not in errors


def test_a_plug_that_cannot_be_loaded_ends_the_server(serve, tmp_path):
    process, _ = serve(plug=tmp_path / "nothing")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: ")
    assert "no such folder" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from outside: give --keys FILE"),  # noqa: S104
        (["--keys", "nothing.jsonl"], "make one with `persona-plug keys new`"),
        (["--pending", "0"], "pending=0 must be above 0"),
        (["--max-batch", "0"], "max_batch=0"),
        (["--engine", "magic"], "neither `transformers` nor the URL of a vLLM server"),
    ],
)
def test_settings_that_cannot_work(serve, options, message):
    process, _ = serve(*options)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in errors.splitlines()[-1]


@pytest.mark.parametrize("store", ["none yet", "made without texts"])
@pytest.mark.parametrize("settings", [{"words": True}, {"retrieve": 2}], ids=str)
@pytest.mark.parametrize("keep_text", [None, False])
def test_a_plug_that_needs_texts_is_not_served_without(
    tmp_path, monkeypatch, encoder, make_plug, store, settings, keep_text
):
    from persona_plug import HistoryStore, PersonaPlug
    from persona_plug.cli.serve import _load
    from persona_plug.errors import ConfigError

    monkeypatch.setattr(PersonaPlug, "from_pretrained", lambda *_, **__: pytest.fail("loaded the LLM before it looked"))
    url = f"sqlite:///{tmp_path}/users.db"
    if store == "made without texts":
        HistoryStore(url, encoder).close()
    folder = make_plug(**settings).save_pretrained(tmp_path / "plug")
    with pytest.raises(
        ConfigError, match=rf"keeps no texts, and this plug .*--keep-text, or .*{next(iter(settings))}="
    ):
        _load(str(folder), url, keep_text, None, None, None, "transformers", 4, "cpu", None)
    assert store != "none yet" or not (tmp_path / "users.db").exists()


def test_a_plug_that_needs_no_texts_is_served_without(make_plug, tmp_path, monkeypatch):
    from persona_plug import PersonaPlug
    from persona_plug.cli.serve import _load

    folder = make_plug().save_pretrained(tmp_path / "plug")
    monkeypatch.setattr(PersonaPlug, "from_pretrained", lambda *_, **__: pytest.fail("loading"))
    with pytest.raises(pytest.fail.Exception, match="loading"):
        _load(str(folder), f"sqlite:///{tmp_path}/u.db", None, None, None, None, "transformers", 4, "cpu", None)


def test_users_of_the_command_line_are_seen_and_the_start_says_so(serve, tmp_path, people):
    """`users add` and `serve` with their defaults, and the command that the start prints."""
    url = f"sqlite:///{tmp_path}/users.db"
    rows = [{"user_id": "me", "input": i.input, "output": i.output} for i in people.ann]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["users", "add", str(tmp_path / "e.jsonl"), "--store", url, "--keep-text", "--encoder", "tiny-encoder"]
    assert CliRunner().invoke(app, words).exit_code == 0
    process, address = serve()
    wait(process, address)
    lines = [json.loads(process.stderr.readline()) for _ in range(2)]
    assert [line["event"] for line in lines] == ["start", "ready"]
    assert lines[0]["address"] == address
    assert (lines[1]["users"], lines[1]["keeps_texts"], lines[1]["remembers_words"]) == (1, True, False)
    command = lines[1]["try"]
    assert command.startswith(f"curl {address}/v1/chat/completions ")
    body = json.loads(command.split(" -d ")[1].strip("'"))
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["persona_plug"]["history_items"] == len(people.ann)


def test_keys(tmp_path):
    path = str(tmp_path / "keys.jsonl")

    def run(*words):
        result = CliRunner().invoke(app, ["keys", *words, "--keys", path])
        return result.exit_code, result.stdout + result.stderr

    code, shown = run("new", "--tenant", "acme")
    secret = shown.splitlines()[0]
    assert (code, secret[:3]) == (0, "pp-")
    code, listed = run("list", "--json")
    (row,) = json.loads(listed)
    assert row["tenant"] == "acme"
    assert set(row) == {"id", "tenant", "created"}
    assert secret not in Path(path).read_text()
    assert run("revoke", row["id"]) == (0, f"{row['id']} of acme is revoked\n")
    code, error = run("revoke", row["id"])
    assert code == 1
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


@pytest.mark.services
def test_on_postgresql(serve, tmp_path):
    """The same command on a real server: events, an answer, and a user who is forgotten."""
    from persona_plug import HistoryStore
    from persona_plug.serving.auth import store_key
    from tests.services_postgres import postgres

    with postgres() as store:
        process, url = serve("--store", store, "--keep-text")
        wait(process, url)
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        for user in ("ann", "bob"):
            body = {"events": [{"input": "how was it", "output": f"fine says {user}", "id": "1"}]}
            client.post(f"/users/{user}/events", body=body, cast_to=object)
        asked = [{"role": "user", "content": "how was it"}]
        answer = client.chat.completions.create(model="my-plug", user="ann", messages=asked, max_tokens=4)
        assert answer.persona_plug["history_items"] == 1
        assert httpx.delete(url + "/v1/users/ann").json()["events"] == 1
        with HistoryStore(store) as held:
            assert [row.user_id for row in held.users()] == [store_key("local", "bob")]
        process.terminate()  # before its database goes
        process.wait(30)
