"""`python -m eval.bench.load [key=value ...]`: a gateway under load, and what it costs over its engine.

A server process of its own is started on loopback and asked for mixed users by so many connections at once. The users'
answers differ, so that an answer tells whose it is: `wrong_user` counts answers that are another user's, `other_text`
those that are nobody's (a batch moves the last bits, and a near tie falls the other way). With `overhead=true` the same
completions are also made by calling the engine directly, in turn with HTTP, in one process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from eval.bench.settings import LoadSettings
from persona_plug.errors import ConfigError
from persona_plug.plug import PersonaPlug
from training.config import load, run_command

TEXTS = ["rate this", "a long evening with friends", "the bread of the small bakery", "what now?"]


def main(arguments: Sequence[str]) -> None:
    """Run what was asked for, and print it as JSON."""
    settings = load(arguments, LoadSettings)
    with tempfile.TemporaryDirectory() as scratch:
        figures = overhead(settings, Path(scratch)) if settings.overhead else run(settings, Path(scratch))
    text = json.dumps(figures, indent=2)
    sys.stdout.write(text + "\n")
    if settings.out:
        Path(settings.out).write_text(text + "\n", encoding="utf-8")


def different(plug: PersonaPlug) -> PersonaPlug:
    """Return the plug with random weights under which users' answers differ, as those of a trained one do."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        weight = plug.get_parameter("embedder.out.weight")
        size = plug.config.projector_hidden * plug.config.llm_width
        weight.copy_(torch.randn(weight.shape, generator=noise) * 4 / size**0.5)
    return plug


def histories(settings: LoadSettings) -> dict[str, list[dict[str, str]]]:
    """Return each user's items, whose outputs only this user writes."""

    def output(user: int, item: int) -> str:
        return hashlib.sha256(f"{user} {item}".encode()).hexdigest()[:24]

    return {
        f"user-{u}": [
            {"input": f"{TEXTS[i % len(TEXTS)]} {i}", "output": output(u, i), "id": str(i)}
            for i in range(settings.items)
        ]
        for u in range(settings.users)
    }


def run(settings: LoadSettings, scratch: Path) -> dict[str, Any]:
    """Start a server, load it, and return counts, latencies and memory."""
    plug = different(
        PersonaPlug.build(
            settings.llm, settings.encoder, words=False, user_tokens=16, task_tokens=0, max_input_tokens=64
        )
    )
    plug.save_pretrained(scratch / "plug")
    url, process = _serve(settings, scratch)
    try:
        return asyncio.run(_load(settings, url, process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _serve(settings: LoadSettings, scratch: Path) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"store": f"sqlite:///{scratch}/users.db", "port": port, "pending": settings.pending}
    options |= {"max-batch": settings.max_batch}
    command = [str(Path(sys.executable).parent / "persona-plug"), "serve", str(scratch / "plug"), "--keep-text"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    log = (scratch / "log.jsonl").open("wb")
    process = subprocess.Popen(command, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        if process.poll() is not None:
            raise ConfigError(f"the server ended: {(scratch / 'log.jsonl').read_text()[-500:]}")
        try:
            if httpx.get(url + "/readyz").status_code == 200:
                return url, process
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise ConfigError("the server was not ready within two minutes")


async def _load(settings: LoadSettings, url: str, pid: int) -> dict[str, Any]:
    people = histories(settings)
    limits = httpx.Limits(max_connections=settings.connections, max_keepalive_connections=settings.connections)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def ask(user: str, text: str) -> tuple[int, str]:
            body = {"model": "plug", "prompt": text, "user": user, "max_tokens": settings.tokens}
            answer = await http.post("/v1/completions", json=body)
            return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""

        for user, items in people.items():
            (await http.post(f"/v1/users/{user}/events", json={"events": items})).raise_for_status()
        right = {(user, text): (await ask(user, text))[1] for user in people for text in TEXTS}
        owners = {(text, answer): user for (user, text), answer in right.items()}
        statuses: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        seconds: list[float] = []
        memory = [_rss(pid)]
        todo = iter(range(settings.requests))
        pairs = list(right)

        async def connection() -> None:
            for number in todo:
                user, text = pairs[number * 7919 % len(pairs)]
                began = time.perf_counter()
                try:
                    status, answer = await ask(user, text)
                except httpx.HTTPError as exc:
                    statuses[type(exc).__name__] += 1
                    continue
                seconds.append(time.perf_counter() - began)
                statuses[str(status)] += 1
                if status == 200 and answer != right[user, text]:
                    wrong["wrong_user" if (text, answer) in owners else "other_text"] += 1
                if number % max(1, settings.requests // 10) == 0:
                    memory.append(_rss(pid))

        began = time.perf_counter()
        await asyncio.gather(*(connection() for _ in range(settings.connections)))
        total = time.perf_counter() - began
        memory.append(_rss(pid))
    return {
        "requests": settings.requests,
        "connections": settings.connections,
        "answers_that_tell_the_user": f"{len(owners)} of {len(right)}",
        "statuses": dict(statuses),
        "wrong_user": wrong["wrong_user"],
        "other_text": wrong["other_text"],
        "requests_per_second": round(settings.requests / total, 1),
        "seconds": _percentiles(seconds),
        "rss_mb": memory,
    }


def overhead(settings: LoadSettings, scratch: Path) -> dict[str, Any]:
    """Compare HTTP with direct calls of the same engine in one process, in turn, at 1 and 8 at once."""
    import uvicorn

    from persona_plug.serving.engine import TransformersEngine
    from persona_plug.serving.gateway import Backend, Settings
    from persona_plug.serving.logs import Log
    from persona_plug.serving.routes import create_app
    from persona_plug.serving.schema import CompletionRequest
    from persona_plug.store.history_store import HistoryStore

    plug = different(
        PersonaPlug.build(
            settings.llm, settings.encoder, words=False, user_tokens=16, task_tokens=0, max_input_tokens=64
        )
    )
    plug.keep_nothing()
    store = HistoryStore(f"sqlite:///{scratch}/users.db", plug.encoder, keep_text=True)
    people = histories(settings)
    for user, items in people.items():
        store.append(f"local/{user}", items)
    app = create_app(Settings("plug"), lambda: Backend(plug, store, TransformersEngine(plug)), Log(lambda line: None))
    gateway = app.state.gateway
    names = list(people)

    def body(i: int) -> dict[str, Any]:
        user, text = names[i % len(names)], TEXTS[i % len(TEXTS)]
        return {"model": "plug", "prompt": text, "user": user, "max_tokens": settings.tokens}

    async def direct(i: int) -> None:
        (prepared,) = await gateway.prepare(CompletionRequest.model_validate(body(i)), "local")
        await gateway.generate(prepared)

    async def measure() -> dict[str, Any]:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            while not gateway.ready:
                await asyncio.sleep(0.05)
            loop, figures = asyncio.get_running_loop(), {}
            for count in (1, 8):
                figures[str(count)] = await asyncio.to_thread(_compare, loop, url, body, direct, count, settings.pairs)
            server.should_exit = True
            await serving
        return figures

    return {"llm": settings.llm, "tokens": settings.tokens, "at_once": asyncio.run(measure())}


def _compare(
    loop: asyncio.AbstractEventLoop,
    url: str,
    body: Callable[[int], dict[str, Any]],
    direct: Callable[[int], Awaitable[None]],
    count: int,
    pairs: int,
) -> dict[str, Any]:
    """Time rounds of `count` completions at once, ABBA; the client runs outside of the server's loop.

    `loop_cpu_ms` is the loop thread's processor time a request: what the gateway itself costs, whatever else runs here.
    """
    clients = [httpx.Client(base_url=url, timeout=600) for _ in range(count)]

    def over_http(i: int) -> None:
        clients[i].post("/v1/completions", json=body(i)).raise_for_status()

    def directly(i: int) -> None:
        asyncio.run_coroutine_threadsafe(direct(i), loop).result()  # type: ignore[arg-type]

    def round_of(call: Callable[[int], None]) -> list[float]:
        seconds: list[float] = []

        def one(i: int) -> None:
            began = time.perf_counter()
            call(i)
            seconds.append(time.perf_counter() - began)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return seconds

    async def thread_seconds() -> float:
        return time.thread_time()

    def loop_seconds() -> float:
        return asyncio.run_coroutine_threadsafe(thread_seconds(), loop).result()

    seconds: dict[Any, list[float]] = {over_http: [], directly: []}
    busy: dict[Any, float] = {over_http: 0.0, directly: 0.0}
    round_of(over_http), round_of(directly)
    for i in range(pairs):
        for call in (over_http, directly) if i % 2 == 0 else (directly, over_http):
            began = loop_seconds()
            seconds[call] += round_of(call)
            busy[call] += loop_seconds() - began
    for client in clients:
        client.close()
    ratio = statistics.median(seconds[over_http]) / statistics.median(seconds[directly])
    milliseconds = {call: round(total * 1000 / (pairs * count), 3) for call, total in busy.items()}
    return {
        "http": {**_percentiles(seconds[over_http]), "loop_cpu_ms": milliseconds[over_http]},
        "direct": {**_percentiles(seconds[directly]), "loop_cpu_ms": milliseconds[directly]},
        "median_ratio": round(ratio, 4),
        "pairs": pairs,
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ascending = sorted(seconds)
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    quantiles = {name: round(ascending[min(len(ascending) - 1, int(len(ascending) * p))], 4) for name, p in at.items()}
    return {**quantiles, "max": round(ascending[-1], 4)}


def _rss(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


if __name__ == "__main__":
    run_command(main, LoadSettings)
