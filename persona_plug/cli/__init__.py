"""The command line `persona-plug`, a file a group of commands; nothing heavy is imported before one runs."""

from persona_plug.cli.main import app

__all__ = ["app"]
