"""ROUGE and chrF of texts in any script."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.measure.overlap import chrf, overlaps, rouge, words

# Language -> a text, and another with half of its words.
TEXTS = {
    "Russian": ("Спасибо за письмо", "спасибо за заказ товара"),
    "Greek": ("Καλημέρα σας φίλοι", "καλημέρα σε όλους"),
    "Arabic": ("شكرا على رسالتك", "شكرا على طلبك اليوم"),
    "Hebrew": ("תודה על המכתב", "תודה על ההזמנה"),
    "Hindi": ("आपके पत्र के लिए धन्यवाद", "आपके आदेश के लिए"),
    "Tamil": ("உங்கள் கடிதத்திற்கு நன்றி", "உங்கள் நன்றி"),
    "Chinese": ("谢谢你的来信", "谢谢你的订单"),
    "Japanese": ("お手紙ありがとう", "ご注文ありがとう"),
    "Korean": ("편지 감사합니다", "주문 감사합니다"),
    "Thai": ("ขอบคุณสำหรับจดหมาย", "ขอบคุณสำหรับคำสั่งซื้อ"),
    "Lao": ("ຂອບໃຈສໍາລັບຈົດໝາຍ", "ຂອບໃຈຫຼາຍໆ"),
    "Khmer": ("អរគុណសម្រាប់លិខិត", "អរគុណច្រើន"),
    "Burmese": ("စာအတွက်ကျေးဇူး", "အတွက်ကျေးဇူး"),
    "Vietnamese": ("Cảm ơn lá thư", "cảm ơn đơn hàng"),
    "Amharic": ("ስለ ደብዳቤው እናመሰግናለን", "ስለ ትዕዛዙ እናመሰግናለን"),
    "Persian": ("از نامه می‌خواهم تشکر کنم", "از شما تشکر کنم"),
    "emoji": ("👍 🎉 👍", "👍 🙁"),
}


@pytest.mark.parametrize("language", TEXTS)
def test_equal_texts_share_all_and_like_texts_some(language):
    text, like = TEXTS[language]
    for name, most in (("rouge-1", 1), ("rouge-L", 1), ("chrf", 100)):
        same, some, none = overlaps([text, like, "qqq www"], [text] * 3)[name]
        assert same == pytest.approx(most), name
        assert 0 < some < most, name
        assert none == 0, name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC, it's 9_to_5!", ["don", "t", "panic", "it", "s", "9", "to", "5"]),
        ("Über-große Fragen?", ["über", "grosse", "fragen"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # marks stay with their letters
        ("مَرْحَبًا بك", ["مَرْحَبًا", "بك"]),
        ("2024年我买iPhone手机。", ["2024", "年", "我", "买", "iphone", "手", "机"]),
        ("ラーメン", ["ラ", "ー", "メ", "ン"]),
        ("ｶﾞﾝﾊﾞﾚ ＡＢＣ", ["ガ", "ン", "バ", "レ", "abc"]),  # noqa: RUF001 - half and full width
        ("ที่นี่", ["ที่", "นี่"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("ok 👍🏽❤️", ["ok", "👍", "❤"]),
        (" .,;!?_- ", []),
    ],
)
def test_words(text, expected):
    assert words(text) == [unicodedata.normalize("NFKC", word) for word in expected]


@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_words_of_ascii_are_those_of_the_library(text):
    from rouge_score.tokenize import tokenize

    assert words(text) == tokenize(text, None)


@pytest.mark.parametrize("text", ["café Zürich", "Ångström", "한국어 문장", "दूध ज़रूर"])
def test_encodings_of_one_text_are_one(text):
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    values = overlaps(forms, forms[::-1])
    assert {name: value.tolist() for name, value in values.items()} == {
        "rouge-1": [1, 1], "rouge-L": [1, 1], "chrf": [100, 100]
    }  # fmt: skip


def test_the_order_of_words_counts_for_the_longest_sequence_alone():
    found = rouge(["b a c"], ["a b c"])
    assert found["rouge-1"] == 1
    assert found["rouge-L"] == pytest.approx(2 / 3)


def test_chrf_is_the_library():
    import sacrebleu

    pairs = [("the cat sat", "the cats sat"), ("", "a"), ("a", ""), ("Спасибо", "Спасибо!"), ("ab", "ba")]
    found = chrf(*map(list, zip(*pairs, strict=True)))
    assert found.tolist() == [sacrebleu.sentence_chrf(p, [r]).score for p, r in pairs]
    assert isinstance(found, np.ndarray)
