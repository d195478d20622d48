"""A real page for tests: `persona-plug demo` in a process of its own, and Chromium in front of it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

# As the command does, with a list of every address outside the machine that the process names.
PROGRAM = """
import sys
said = open(sys.argv.pop(1), "a", buffering=1)
def listen(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if host not in (None, "localhost", "::1", "", "0.0.0.0") and not str(host).startswith("127."):
        said.write(f"{event} {host}\\n")
sys.addaudithook(listen)
import typer
from persona_plug.cli.demo import demo
typer.run(demo)
"""

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def demo(plug, folder, *options):
    """Run the command until the block ends; gives its address, its process and the file of outside addresses."""
    folder.mkdir(exist_ok=True)
    outside, log, port = folder / "outside.txt", folder / "log.txt", free_port()
    outside.touch()
    words = [sys.executable, "-c", PROGRAM, str(outside), str(plug), "--port", str(port), *options]
    with log.open("wb") as out:
        env = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=out, stderr=out, env=env)
    try:
        for _ in range(600):
            if "Ctrl+C" in log.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        else:
            raise AssertionError(log.read_text())
        yield f"http://127.0.0.1:{port}/", process, outside
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextmanager
def chromium(profile, width=1280, height=900):
    """Open Debian's Chromium with a new profile; gives a context that makes pages."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "the browser tests need Chromium: apt-get install chromium"
    size = {"width": width, "height": height}
    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(profile), executable_path=path, args=FLAGS, viewport=size, reduced_motion="reduce"
        )
        yield context
        context.close()
