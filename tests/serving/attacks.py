"""Backends that are slow, stuck or strange, for tests of what the gateway bears."""

import asyncio
import threading
import time

from persona_plug.serving.engine import Answer, Delta


def until(true, seconds=20):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class SayingEngine:
    """Answers every call with one text, in pieces of a character; `slow` seconds between them."""

    text, slow, calls = "yes", 0.0, []

    def __init__(self, plug, seen=None):
        self.calls.clear()

    async def stream(self, call):
        self.calls.append(call)
        for character in self.text:
            yield Delta(character, 1)
            await asyncio.sleep(self.slow)
        yield Delta("", 1, "stop")

    async def generate(self, call):
        return Answer("".join([delta.text async for delta in self.stream(call)]), len(self.text) + 1, "stop")

    async def close(self):
        pass


def saying(text, slow=0.0):
    return type("Saying", (SayingEngine,), {"text": text, "slow": slow, "calls": []})


class Gate:
    """Holds calls of a function up until it is opened; knows how many stand there."""

    def __init__(self, function):
        self.function, self.waiting, self.calls = function, 0, 0
        self.open = threading.Event()

    def __call__(self, *args, **kwargs):
        self.calls += 1
        self.waiting += 1
        try:
            assert self.open.wait(60)
            return self.function(*args, **kwargs)
        finally:
            self.waiting -= 1
