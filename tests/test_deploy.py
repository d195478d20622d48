"""The container and compose files, as far as that goes without a container engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from persona_plug.cli import app

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy"


def options_of(words):
    return {w for w in words if str(w).startswith("--")}


def test_the_gateway_is_started_with_options_that_there_are():
    known = CliRunner().invoke(app, ["serve", "--help"], terminal_width=200).stdout
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert set(services) == {"gateway", "postgres", "vllm"}
    command = services["gateway"]["command"]
    assert command[:2] == ["serve", "/plug"]
    inside = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("CMD [")][-1]
    for option in options_of(command) | options_of(yaml.safe_load(inside.removeprefix("CMD "))):
        assert f"{option} " in known, option


def test_a_plug_in_a_container_has_texts_to_answer_by():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert "--keep-text" in services["gateway"]["command"]
    assert '"--keep-text"' in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def test_no_password_stands_in_a_command():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert not [word for service in services.values() for word in service.get("command", []) if "PASSWORD" in word]
    assert "POSTGRES_PASSWORD" in services["gateway"]["environment"]["PERSONA_PLUG_STORE"]


def test_no_secret_is_written_down_and_nothing_listens_outside():
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    services = yaml.safe_load(text)["services"]
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")
    assert all(port.startswith("127.0.0.1:") for s in services.values() for port in s.get("ports", []))
    assert services["gateway"]["read_only"]


@pytest.mark.services
def test_linters_find_nothing():
    from compose_spec import PyCompose

    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not done.stdout
    values = {"POSTGRES_PASSWORD": "secret", "HASH_KEY": "key", "PLUG": "/srv/plug", "LLM_FOLDER": "/srv/llm"}
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: values[found[1]], text)
    made = PyCompose.from_yaml(text)
    made.validate()
    made.to_spec()
    with pytest.raises(ValueError, match="prots"):
        PyCompose.from_yaml(text.replace("ports:", "prots:"))
