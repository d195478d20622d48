"""The gateway's threads: what waits for one thing never holds up what needs another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, ParamSpec, TypeVar

from persona_plug.store.database import StoreUnavailable

P = ParamSpec("P")
R = TypeVar("R")
Room = Literal["plug", "encode", "read", "write", "erase", "probe"]

# Tokenizers bear one thread: requests and events are encoded on one thread each, with a tokenizer each.
SIZES: dict[Room, int] = {"plug": 1, "encode": 1, "read": 4, "write": 2, "erase": 2, "probe": 1}
STORE: tuple[Room, ...] = ("read", "write", "probe")


class Threads:
    """A pool of threads for each kind of work.

    `plug` makes prompts and soft tokens, `encode` the vectors of events. `read`, `write` and `probe` ask the store and
    give up when it does not answer. `erase` deletes, and may wait for whoever reads an old state.
    """

    def __init__(self, store_seconds: float) -> None:
        """Create them; the store has `store_seconds` to answer."""
        self.store_seconds = store_seconds
        self._pools = {room: ThreadPoolExecutor(size, f"persona-plug-{room}") for room, size in SIZES.items()}

    async def run(self, room: Room, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run something in a room.

        Raises:
            StoreUnavailable: The store did not answer in time; its thread goes on waiting.
        """
        work = asyncio.get_running_loop().run_in_executor(self._pools[room], lambda: call(*args, **kwargs))
        if room not in STORE:
            return await work
        done, _ = await asyncio.wait({work}, timeout=self.store_seconds)
        if not done:
            work.cancel()
            raise StoreUnavailable(f"the store did not answer within {self.store_seconds:g} s; is it there?")
        return work.result()

    def close(self) -> None:
        """Let the threads end when they are done."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
