import pytest

from persona_plug.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("\n  cause \nmore", "cause"),
        (ValueError("cause\nmore"), "cause"),
        (ValueError(), "ValueError"),
        ("failed for one of:\n\n  the cause\nmore", "failed for one of: the cause"),
        ("nothing follows:", "nothing follows:"),
        (" \n", "no reason given"),
        (None, "None"),
    ],
)
def test_a_message_is_cut_to_its_first_line(message, line):
    assert first_line(message) == line


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("attentoin", ("attention", "mean"), "attention"),
        ("Agent 3", ("agent 3", "agent 4"), "agent 3"),
        ("LaMP_8", ("LaMP_1", "LaMP_2N", "LaMP_7"), None),  # another task, not a misspelt one
        ("user-0009", ("user-0001",), None),
        ("LaMP-2", ("LaMP_1", "LaMP_2"), "LaMP_2"),
        ("x", ("attention",), None),
        ("anything", (), None),
        (5, ("5x5",), None),
    ],
)
def test_the_nearest_name(name, known, meant):
    from persona_plug.errors import nearest

    assert nearest(name, known) == (f", did you mean {meant!r}?" if meant else "")
    assert nearest(name, known, "; ") == (f"; did you mean {meant!r}?" if meant else "")
