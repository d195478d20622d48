"""A real PostgreSQL server for tests, from Debian's packages, in a temporary folder and on a free port."""

import glob
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ACCOUNT = "postgres"  # the server refuses to run as root; Debian's package makes this account


def programs():
    """The folder of the newest server's programs; installs Debian's package where there is none."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda p: float(p.split("/")[4]))
    if not found:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.fail("no PostgreSQL server here: apt-get install postgresql")
        # The package would start a server of its own.
        settings = Path("/etc/postgresql-common/createcluster.d")
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "no-main.conf").write_text("create_main_cluster = false\n")
        command = [shutil.which("apt-get"), "install", "-y", "-q", "--no-install-recommends", "postgresql"]
        subprocess.run(command, check=True)
        return programs()
    return Path(found[-1]).parent


@contextmanager
def postgres():
    """Run a server and yield the URL of its database `postgres`."""
    folder = programs()
    who = {"user": ACCOUNT, "group": ACCOUNT, "extra_groups": []} if os.geteuid() == 0 else {}
    base = Path(tempfile.mkdtemp(prefix="persona-plug-postgres-"))
    try:
        if who:
            shutil.chown(base, ACCOUNT, ACCOUNT)
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--username=postgres", "--no-sync"]
        subprocess.run(
            [folder / "initdb", "-D", base / "data", *options], check=True, capture_output=True, cwd=base, **who
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": base, "fsync": "off"}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (base / "log").open("wb") as log:
            server = subprocess.Popen(
                [folder / "postgres", "-D", base / "data", "-p", str(port), *words],
                stdout=log,
                stderr=log,
                cwd=base,
                **who,
            )
        try:
            ready = [folder / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            for _ in range(300):
                if subprocess.run(ready, check=False).returncode == 0:
                    break
                assert server.poll() is None, (base / "log").read_text()
                time.sleep(0.1)
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown
            server.wait(60)
    finally:
        shutil.rmtree(base)
