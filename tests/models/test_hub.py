"""Offline, what is to come from the Hub fails at once: nothing waits and retries."""

import socket
import time

import pytest

from persona_plug import HistoryEncoder, PersonaPlug
from persona_plug.errors import PersonaPlugError
from persona_plug.models import hub


@pytest.fixture
def offline(monkeypatch):
    """No name resolves; asking is counted, and waiting is an error."""
    asked = []

    def resolve(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    def sleep(seconds):
        raise AssertionError(f"waited for {seconds} s")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(time, "sleep", sleep)
    hub._asked.cache_clear()
    yield asked
    hub._asked.cache_clear()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda plug: PersonaPlug.build("someone/an-llm", "tiny-encoder"), "someone/an-llm"),
        (lambda plug: PersonaPlug.build("gpt2", "tiny-encoder"), "gpt2"),
        (lambda plug: PersonaPlug.build("tiny-llama", "someone/an-encoder"), "someone/an-encoder"),
        (lambda plug: HistoryEncoder("someone/an-encoder"), "someone/an-encoder"),
        (lambda plug: PersonaPlug.from_pretrained("someone/a-plug"), "which does not answer"),
        (lambda plug: plug.push_to_hub("someone/a-plug"), "the Hub does not answer"),
    ],
    ids=["llm", "llm without an owner", "encoder of a plug", "encoder", "plug", "push"],
)
def test_a_hub_id_fails_at_once_in_one_line(make_plug, offline, call, named):
    with pytest.raises(PersonaPlugError, match=named) as refusal:
        call(make_plug())
    assert "\n" not in str(refusal.value)
    assert len(set(offline)) <= 1  # the Hub alone was asked


def test_the_environment_may_forbid_asking(offline, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PersonaPlugError, match="someone/an-llm"):
        PersonaPlug.build("someone/an-llm", "tiny-encoder")
    assert offline == []


def test_a_folder_asks_nobody(offline, tmp_path):
    from persona_plug.models import zoo

    PersonaPlug.build(str(zoo.pull("tiny-llama")), str(zoo.pull("tiny-encoder")))
    assert offline == []
