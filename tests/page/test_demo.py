"""The command around the page."""

import sys

import pytest

from persona_plug.cli.demo import kept_where
from persona_plug.errors import ConfigError
from persona_plug.page.page import Page


def test_where_histories_are_kept_is_said_without_a_password():
    assert "temporary file, deleted when the page is stopped" in kept_where(None)
    assert "sqlite:///users.db" in kept_where("sqlite:///users.db")
    said = kept_where("postgresql://me:secret@localhost/users")
    assert "me:***@localhost/users" in said
    assert "secret" not in said


def test_missing_gradio_is_one_line(open_session, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"^the page needs gradio: pip install 'persona-plug\[app\]'$"):
        Page(open_session(), "here", tmp_path)


@pytest.mark.services
def test_port_in_use_is_one_line(open_session, tmp_path):
    import socket

    page = Page(open_session(), "here", tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^port {port} of 127\.0\.0\.1 cannot be used; choose another with --port$"
        ):
            page.serve("127.0.0.1", port)
