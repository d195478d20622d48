import pytest

from persona_plug.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("\n  cause \nmore", "cause"),
        (ValueError("cause\nmore"), "cause"),
        (ValueError(), "ValueError"),
        (" \n", "no reason given"),
        (None, "None"),
    ],
)
def test_a_message_is_cut_to_its_first_line(message, line):
    assert first_line(message) == line
