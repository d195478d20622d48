"""`python -m persona_plug`: the command line without the installed script."""

from persona_plug.cli import app

app(prog_name="persona-plug")
