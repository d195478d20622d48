"""The load script, with few requests: what it counts, and that nothing is left running."""

import json
import subprocess
import sys

import pytest


def run(*settings):
    command = [sys.executable, "-m", "eval.bench.load", *settings]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_server_under_load():
    found = run("requests=40", "connections=4", "users=3", "items=2", "tokens=16")
    assert found["statuses"] == {"200": 40}
    assert found["answers_that_tell_the_user"] == "12 of 12"
    assert found["wrong_user"] == 0
    assert 0 < found["seconds"]["p50"] <= found["seconds"]["max"]
    assert len(found["rss_mb"]) >= 3


@pytest.mark.slow
def test_what_is_refused_is_counted():
    found = run("requests=40", "connections=8", "users=2", "items=1", "tokens=8", "pending=1")
    assert set(found["statuses"]) == {"200", "429"}
    assert sum(found["statuses"].values()) == 40


@pytest.mark.slow
def test_overhead():
    found = run("overhead=true", "pairs=2", "users=2", "items=1", "tokens=4")
    assert set(found["at_once"]) == {"1", "8"}
    for row in found["at_once"].values():
        assert row["median_ratio"] > 0
