"""HistoryEncoder and its vector cache: what a vector is, encoded once, and a cache that survives anything."""

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from persona_plug.errors import ConfigError, DataError, ModelUnavailable
from persona_plug.models import zoo
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.models.vector_cache import VectorCache

TEXTS = ["short", "a somewhat longer text about bread", "Grüße aus Köln 🙂", "x", "two\nlines", "a " * 60]


@pytest.fixture
def make(tmp_path):
    def make(name="tiny-encoder", **settings):
        return HistoryEncoder(name, device="cpu", **{"cache_dir": tmp_path / "vectors", **settings})

    return make


def cache_files(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.is_file())


# What a vector is


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("prefix", ["", "query: "])
def test_vectors_equal_those_of_transformers(make, pooling, prefix):
    from transformers import AutoModel, AutoTokenizer

    encoder = make(pooling=pooling, prefix=prefix, max_length=40, batch_size=4)
    vectors = encoder.encode(TEXTS)
    folder = zoo.pull("tiny-encoder")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    assert vectors.shape == (len(TEXTS), encoder.dim)
    assert vectors.dtype == torch.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = tokenizer(prefix + text, truncation=True, max_length=40, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0]
        expected = normalize(hidden.mean(0) if pooling == "mean" else hidden[0], dim=0)
        torch.testing.assert_close(vector, expected, atol=1e-3, rtol=0)


def test_an_encoder_decoder_lends_its_encoder(make):
    encoder = make("tiny-t5")
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 64)
    assert not hasattr(encoder.model, "decoder")


def test_vectors_do_not_depend_on_the_company(make):
    together = make(use_cache=False, batch_size=16).encode(TEXTS)
    alone = torch.cat([make(use_cache=False).encode([t]) for t in TEXTS])
    backwards = make(use_cache=False, batch_size=2).encode(TEXTS[::-1]).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=0)
    torch.testing.assert_close(together, backwards, atol=1e-3, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_vectors_have_length_one_and_empty_texts_are_zero(make):
    vectors = make().encode([*TEXTS, "", "  \n"])
    torch.testing.assert_close(vectors[: len(TEXTS)].norm(dim=1), torch.ones(len(TEXTS)), atol=2e-3, rtol=0)
    assert not vectors[len(TEXTS) :].any()
    assert make().encode([]).shape == (0, 32)
    assert make().encode([""]).shape == (1, 32)


def test_odd_characters_are_text_too(make):
    encoder = make()
    vectors = encoder.encode(["a\x00b", "a"])
    assert torch.isfinite(vectors).all()
    assert not torch.equal(vectors[0], vectors[1])


def test_a_vector_that_is_not_finite_is_refused_by_text(make):
    encoder = make()
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[3 + ord("~") - ord("!")] = float("nan")
    with pytest.raises(DataError, match="non-finite vector for the text 'bad ~'"):
        encoder.encode(["good", "bad ~"])


# Encoded once


def test_each_text_is_encoded_once(make):
    encoder = make()
    first = encoder.encode([*TEXTS, *TEXTS, ""])
    assert (encoder.stats.requested, encoder.stats.encoded) == (2 * len(TEXTS) + 1, len(TEXTS))
    torch.testing.assert_close(encoder.encode(TEXTS), first[: len(TEXTS)], atol=0, rtol=0)
    assert encoder.stats.encoded == len(TEXTS)
    second = make()
    torch.testing.assert_close(second.encode(TEXTS[::-1]), first[: len(TEXTS)].flip(0), atol=0, rtol=0)
    assert second.stats.encoded == 0
    second.encode(["something new", TEXTS[0]])
    assert second.stats.encoded == 1


def test_many_texts_come_back_from_the_cache(make):
    texts = [f"text {i}" for i in range(1201)]  # more than one SQL statement can ask for
    first = make(batch_size=256).encode(texts)
    again = make()
    torch.testing.assert_close(again.encode(texts), first, atol=0, rtol=0)
    assert again.stats.encoded == 0


def test_without_cache_nothing_is_written(make, tmp_path):
    encoder = make(use_cache=False)
    encoder.encode(TEXTS)
    encoder.encode(TEXTS)
    assert encoder.stats.encoded == 2 * len(TEXTS)
    assert cache_files(tmp_path) == []


def test_the_default_cache_follows_the_environment(tmp_path, monkeypatch):
    folder = zoo.pull("tiny-encoder")
    monkeypatch.setenv("PERSONA_PLUG_CACHE", str(tmp_path))
    encoder = HistoryEncoder(str(folder), device="cpu")
    encoder.encode(["x"])
    assert (tmp_path / "vectors" / f"{encoder.fingerprint}.sqlite").is_file()


def test_truncated_texts_are_counted(make):
    encoder = make(max_length=12)
    encoder.encode(["short", "0123456789 and more", "another text that is too long", ""])
    assert encoder.stats.truncated == 2
    vectors = encoder.encode(["0123456789", "0123456789 and more"])
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-3, rtol=0)


def test_a_text_that_just_fits_is_not_truncated(make):
    encoder = make(max_length=12)
    encoder.encode(["0123456789"])  # and two special tokens
    assert encoder.stats.truncated == 0


# Identity


def test_the_fingerprint_is_that_of_all_that_shapes_a_vector(make, tmp_path):
    plain = make()
    others = [make(pooling="cls"), make(max_length=100), make(prefix="query: "), make("tiny-t5")]
    folder = tmp_path / "other-weights"
    shutil.copytree(zoo.pull("tiny-encoder"), folder)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.weight.mul_(1.1)
    model.save_pretrained(folder)
    others.append(make(str(folder)))
    prints = {e.fingerprint for e in (plain, *others)}
    assert len(prints) == 6
    assert make(batch_size=1).fingerprint == plain.fingerprint
    copied = tmp_path / "copy"
    shutil.copytree(zoo.pull("tiny-encoder"), copied)
    assert make(str(copied)).fingerprint == plain.fingerprint
    plain.encode(TEXTS)
    assert make().fingerprint == plain.fingerprint


def test_the_tokenizer_is_part_of_the_identity(make, tmp_path):
    folder = tmp_path / "other-tokenizer"
    shutil.copytree(zoo.pull("tiny-encoder"), folder)
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    assert make(str(folder)).fingerprint != make().fingerprint


def test_encoders_in_one_folder_do_not_mix(make):
    mean, cls = make(), make(pooling="cls")
    a, b = mean.encode(["a text"]), cls.encode(["a text"])
    assert (a - b).abs().max() > 1e-2
    torch.testing.assert_close(make().encode(["a text"]), a, atol=0, rtol=0)


@pytest.mark.parametrize("wrong", [{"pooling": "sum"}, {"max_length": 2}, {"max_length": 4096}, {"batch_size": 0}])
def test_settings_that_cannot_work_are_refused(make, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make(**wrong)


def test_an_llm_is_told_from_nothing_at_all(make, tmp_path):
    with pytest.raises(ModelUnavailable):
        make(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        make(str(tmp_path / "empty"))


# The cache file


def test_no_text_is_stored(make, tmp_path):
    diary = "my secret diary entry number seven"
    make().encode([diary, "Grüße aus Köln"])
    files = cache_files(tmp_path)
    assert files
    for file in files:
        content = file.read_bytes()
        assert not any(word.encode() in content for word in [*diary.split(), "Grüße", "Köln"] if len(word) > 3)


def test_a_corrupt_file_is_rebuilt_with_a_notice(make, tmp_path, caplog):
    encoder = make()
    first = encoder.encode(TEXTS)
    path = tmp_path / "vectors" / f"{encoder.fingerprint}.sqlite"
    for damage in (b"this is no database " * 500, b"", path.read_bytes()[:600]):
        for extra in ("-wal", "-shm"):
            Path(f"{path}{extra}").unlink(missing_ok=True)
        path.write_bytes(damage)
        caplog.clear()
        again = make()
        torch.testing.assert_close(again.encode(TEXTS), first, atol=1e-3, rtol=0)
        assert again.stats.encoded == len(TEXTS)
        if damage:
            assert any("damaged" in r.message and r.levelno >= logging.WARNING for r in caplog.records)
        third = make()
        third.encode(TEXTS)
        assert third.stats.encoded == 0


def test_a_file_that_goes_bad_while_in_use_is_rebuilt(make, tmp_path, caplog):
    encoder = make()
    first = encoder.encode([f"text {i}" for i in range(300)])
    path = tmp_path / "vectors" / f"{encoder.fingerprint}.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    torch.testing.assert_close(encoder.encode([f"text {i}" for i in range(300)]), first, atol=1e-3, rtol=0)
    assert encoder.stats.encoded == 600
    assert "damaged" in caplog.text
    encoder.encode(["text 1"])
    assert encoder.stats.encoded == 600


def test_one_text_is_no_list_of_texts(make):
    with pytest.raises(DataError, match=r"a list of texts, not the text 'abc'; put it into a list"):
        make().encode("abc")


@pytest.mark.parametrize("texts", [None, 5, b"abc", ["a", None], [5], [["a"]]], ids=repr)
def test_what_is_no_text_is_named(make, texts):
    with pytest.raises(DataError, match=r"texts must be (a list of )?texts, not"):
        make().encode(texts)


def test_texts_may_come_one_by_one(make):
    encoder = make()
    assert encoder.encode(iter(["a", "b"])).equal(encoder.encode(["a", "b"]))


@pytest.mark.parametrize("obstacle", ["a file in the way", "a folder in the way"])
def test_a_cache_that_cannot_be_made_is_refused_with_the_cure(tmp_path, obstacle):
    path = tmp_path / "vectors" / "x.sqlite"
    if obstacle == "a file in the way":
        path.parent.write_text("")
    else:
        path.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"vectors cannot be kept here .*set PERSONA_PLUG_CACHE to a folder"):
        VectorCache(path, 4)


def test_a_flipped_bit_is_encoded_again(make, tmp_path, caplog):
    encoder = make()
    first = encoder.encode(TEXTS)
    path = tmp_path / "vectors" / f"{encoder.fingerprint}.sqlite"
    with sqlite3.connect(path) as db:
        key, blob = db.execute("SELECT key, vector FROM vectors LIMIT 1").fetchone()
        flipped = bytes([blob[0] ^ 4, *blob[1:]])
        db.execute("UPDATE vectors SET vector = ? WHERE key = ?", (flipped, key))
    db.close()
    again = make()
    torch.testing.assert_close(again.encode(TEXTS), first, atol=1e-3, rtol=0)
    assert again.stats.encoded == 1
    assert "1 damaged" in caplog.text
    third = make()
    torch.testing.assert_close(third.encode(TEXTS), first, atol=1e-3, rtol=0)
    assert third.stats.encoded == 0


@settings(max_examples=20)
@given(rows=st.dictionaries(st.binary(min_size=32, max_size=32), st.integers(0, 1 << 16), max_size=20))
def test_what_is_put_is_got(tmp_path_factory, rows):
    cache = VectorCache(tmp_path_factory.mktemp("cache") / "x.sqlite", 4)
    vectors = {k: np.random.default_rng(v).normal(size=4).astype(np.float16) for k, v in rows.items()}
    cache.put(vectors)
    cache.put(vectors)
    found = cache.get([*vectors, b"unknown"])
    assert found.keys() == vectors.keys()
    assert len(cache) == len(vectors)
    assert all((found[k] == vectors[k]).all() for k in vectors)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from persona_plug.models.vector_cache import VectorCache

path, who, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sys.stdin.readline()
cache = VectorCache(path, 16)
for i in range(rounds):
    keys = [bytes([who, i % 256, i // 256, j]) for j in range(50)]
    cache.put({key: np.full(16, i % 1000, dtype=np.float16) for key in keys})
    print(i, flush=True)
    cache.get(keys)
"""


def writer(path, who, rounds):
    command = [sys.executable, "-c", WRITER, str(path), str(who), str(rounds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def start(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_may_write_at_once(tmp_path):
    path = tmp_path / "x.sqlite"
    processes = [writer(path, who, 20) for who in range(3)]
    time.sleep(0.5)
    for process in processes:
        start(process)
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(VectorCache(path, 16)) == 3 * 20 * 50


OPENER = """
import sys
from pathlib import Path
from persona_plug.models.vector_cache import VectorCache

print("ready", flush=True)
sys.stdin.readline()
VectorCache(Path(sys.argv[1]), 16)
"""


def test_processes_may_create_the_file_at_once(tmp_path):
    """SQLite's switch to the write-ahead log does not wait for others: without a lock some of these fail."""
    pipe = subprocess.PIPE
    for round_ in range(6):
        command = [sys.executable, "-c", OPENER, str(tmp_path / f"{round_}.sqlite")]
        processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(6)]
        for process in processes:
            process.stdout.readline()
        for process in processes:
            start(process)
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors


def test_a_killed_writer_leaves_whole_vectors(tmp_path, caplog):
    path = tmp_path / "x.sqlite"
    for who in range(3):
        process = writer(path, who, 100_000)
        start(process)
        written = [int(process.stdout.readline()) for _ in range(5 + 3 * who)]
        time.sleep(0.01 + 0.007 * who)  # into one of the next transactions
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
        cache = VectorCache(path, 16)
        keys = [bytes([who, i, 0, j]) for i in written for j in range(50)]
        found = cache.get(keys)
        assert len(found) == len(keys)  # what was reported as written is there
        assert all((vector == key[1]).all() for key, vector in found.items())
        assert len(cache) % 50 == 0  # and nothing was written by half
    assert "damaged" not in caplog.text
