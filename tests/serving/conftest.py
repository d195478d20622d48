"""A real server on loopback: uvicorn in a thread, a tiny plug whose users' answers differ, a store in a file."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest


@pytest.fixture(scope="session")
def serving_plug(make_plug):
    """A plug that keeps nothing from request to request, with an encoder of its own."""
    from persona_plug.models.encoder import HistoryEncoder

    encoder = HistoryEncoder("tiny-encoder", device="cpu")
    plug = make_plug(differ=True, encoder=encoder, max_input_tokens=256)
    plug.keep_nothing()
    return plug


@pytest.fixture(scope="session")
def people_items(people):
    """What each user's history is, as JSON."""
    users = {"ann": people.ann, "bob": people.bob, "eve": people.eve}
    return {
        user: [{"input": i.input, "output": i.output, "id": f"{user}-{n}"} for n, i in enumerate(items)]
        for user, items in users.items()
    }


class Server:
    """A running gateway: its address, log lines, and clients."""

    def __init__(self, app, lines):
        import uvicorn

        self.app, self.gateway, self.lines = app, app.state.gateway, lines
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def wait(self):
        """Return when the models are loaded."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.server.started and (self.gateway.ready or self.gateway.failure):
                return self
            time.sleep(0.01)
        raise TimeoutError

    def http(self, key=None, **options):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def openai(self, key="none", **options):
        from openai import OpenAI

        return OpenAI(base_url=self.url + "/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **options})

    def logged(self):
        return [json.loads(line) for line in self.lines]

    def close(self):
        self.server.should_exit = True
        self.thread.join(30)
        self.socket.close()
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def start(serving_plug, tmp_path_factory):
    """`start(tenants=("acme",), keep_text=True, engine=None, **limits)` runs a gateway; the caller closes it."""
    from persona_plug.serving.auth import new_key
    from persona_plug.serving.engine import TransformersEngine
    from persona_plug.serving.gateway import Backend, Settings
    from persona_plug.serving.limits import Limits
    from persona_plug.serving.logs import Log
    from persona_plug.serving.routes import create_app
    from persona_plug.store.history_store import HistoryStore

    def start(tenants=(), keep_text=True, engine=TransformersEngine, load=None, load_after=None, **limits):
        folder = tmp_path_factory.mktemp("gateway")
        keys = {tenant: new_key(folder / "keys.jsonl", tenant) for tenant in tenants}
        lines = []

        def load_all():
            if load_after is not None:
                load_after.wait(60)
            store = HistoryStore(f"sqlite:///{folder}/users.db", serving_plug.encoder, keep_text)
            seen = made.gateway.metrics.batch.observe
            return Backend(serving_plug, store, engine(serving_plug, seen=seen))

        settings = Settings("tiny", folder / "keys.jsonl" if tenants else None, Limits(**limits))
        made = Server(create_app(settings, load or load_all, Log(lines.append)), lines)
        made.folder = folder
        made.keys = SimpleNamespace(**{tenant: secret for tenant, (_, secret) in keys.items()})
        return made.wait() if load_after is None else made

    return start


@pytest.fixture
def gateway(start):
    """`gateway(...)` is `start(...)`, closed when the test ends."""
    running = []

    def make(**options):
        running.append(start(**options))
        return running[-1]

    yield make
    for server in running:
        server.close()


@pytest.fixture(scope="module")
def served(start, people_items):
    """One gateway for tests that only ask: tenants acme and bolt, acme's users with their histories."""
    server = start(tenants=("acme", "bolt"))
    with server.http(server.keys.acme) as http:
        for user, items in people_items.items():
            http.post(f"/v1/users/{user}/events", json={"events": items}).raise_for_status()
    yield server
    server.close()
