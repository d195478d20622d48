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
