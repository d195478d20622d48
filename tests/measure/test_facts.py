"""Facts of nobody's, copies of the request, lengths."""

import numpy as np
import pytest

from persona_plug.measure.facts import facts, foreign_facts, text_values

OWN = ["Hi Ben, it costs 5. Cheers, Ann", "Hi Wei, call 5521. Cheers, Ann", "Hi Zoe, no. Cheers, Ann"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi Ben, order 12345 is late. Cheers, Ann", ["ben", "12345", "ann"]),
        ("The end. Nothing more.", []),  # a sentence begins with a capital
        ("hello\nMaria wrote", []),
        ("we met Jean-Luc O'Neill at 10:30", ["jean-luc", "o'neill", "10", "30"]),
        ("спасибо, Анна, заказ 77", ["анна", "77"]),
        ("订单123已发货", ["123"]),
        ("part AB12c", ["ab12c"]),
        ("I think I am", []),
    ],
)
def test_numbers_and_names_are_facts(text, expected):
    assert facts(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi Wei, order 777 is here. Cheers, Ann", (0, 3)),  # all asked for, or what this user always writes
        ("Hi Ben, order 777 is here. Cheers, Ann", (1, 3)),  # another request's name
        ("Hi Wei, order 5521 is here. Cheers, Bob", (2, 3)),  # another item's number, another user's name
        ("sure", (0, 0)),
    ],
)
def test_what_neither_request_nor_user_gives_is_foreign(text, expected):
    assert foreign_facts(text, "Where is order 777? Wei", OWN) == expected


def test_values_of_each_answer():
    values = text_values(
        ["hi Wei 8 9", "Send the  letter, please!", "one two three four"],
        ["hi", "Please", "one two three four"],
        ["Wei has 8", "send the letter please", "one"],
        [[], OWN, OWN],
    )
    np.testing.assert_allclose(values["foreign"], [1 / 3, 0, 0])
    np.testing.assert_array_equal(values["copied"], [0, 1, 0])
    np.testing.assert_allclose(values["length"], [np.log(4) ** 2, np.log(4) ** 2, 0])
