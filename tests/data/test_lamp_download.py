import http.server
import json
import re
import threading
import time
import zipfile
from email.utils import formatdate, parsedate_to_datetime

import pytest
from typer.testing import CliRunner

from persona_plug.cli import app
from persona_plug.data import _http
from persona_plug.data.lamp import read_lamp
from persona_plug.data.lamp_download import LAMP, LONGLAMP, SUBJECT, download
from persona_plug.errors import ConfigError, DataError

ITEMS = {
    "LaMP_1": {"title": "My paper", "abstract": "We show"},
    "LaMP_2": {"tag": "comedy", "description": "A clown."},
    "LaMP_2N": {"text": "They won.", "title": "Won!", "category": "sports"},
    "LaMP_3": {"text": "Fine.", "score": "4"},
    "LaMP_4": {"text": "Snow fell.", "title": "Snow"},
    "LaMP_5": {"title": "My paper", "abstract": "We show"},
    "LaMP_6": {"text": "mail-1", "title": ""},
    "LaMP_7": {"text": "lol ok"},
}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes) with Range, and can cut connections.

    Attributes:
        asked: (path, Range header or None) of every request.
        cuts: path -> bytes after which the connection is cut, one a request.
        sent: path -> bytes of content sent.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.asked, self.sent, self.types, self.claims = {}, {}, [], {}, {}, {}
        self.modified, self.ranges = time.time() - 1e6, True

    @property
    def base(self):
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self):
        return [path for path, _ in self.asked]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, self.path.removeprefix("/")
        wanted = self.headers.get("Range")
        server.asked.append((path, wanted))
        if path not in server.files:
            return self.send_error(404)
        body, start, code = server.files[path], 0, 200
        since = self.headers.get("If-Unmodified-Since")
        if since and server.modified > parsedate_to_datetime(since).timestamp():
            return self.send_error(412)
        if wanted and server.ranges:
            start, code = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), 206
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        self.send_response(code)
        self.send_header("Content-Type", server.types.get(path, "application/json"))
        self.send_header("Content-Length", str(server.claims.get(path, len(body)) - start))
        self.send_header("Last-Modified", formatdate(server.modified, usegmt=True))
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        cut = server.cuts.get(path, [])
        body = body[start:][: cut.pop(0) if cut else None]
        self.wfile.write(body)
        server.sent[path] = server.sent.get(path, 0) + len(body)
        self.close_connection = True
        return None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_http, "PAUSE", 0.0)
    made = Server()
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def publish(server, task="LaMP_3", split="user", gold=("train", "dev"), count=3):
    """Put a task's files on the server as they are published; returns the path of a file from part and kind."""
    root = ("time/" if split == "time" else "") + LAMP[task][0]
    for part in ("train", "dev", "test"):
        questions = [
            {"id": f"{n}1", "input": f"Do it: {part} {n}", "profile": [{"id": "p", **ITEMS[task]}]}
            for n in range(count)
        ]
        if split == "time":
            for q in questions:
                q["user_id"] = f"u{q['id']}"
                q["profile"][0]["date"] = "2015-01-02"
        place = f"{root}/{part}/{part}_"
        server.files[place + "questions.json"] = json.dumps(questions).encode()
        if part in gold:
            golds = [{"id": q["id"], "output": "5"} for q in questions]
            server.files[place + "outputs.json"] = json.dumps({"task": task.rstrip("N"), "golds": golds}).encode()
    return lambda part, kind: f"{root}/{part}/{part}_{kind}.json"


def cli(*words, code=0):
    result = CliRunner().invoke(app, ["data", "lamp", *[str(w) for w in words]])
    assert result.exit_code == code, result.output
    return result


# --- what is downloaded


@pytest.mark.parametrize("split", ["user", "time"])
@pytest.mark.parametrize("task", [t for t in LAMP if t != "LaMP_6"])
def test_every_task_and_split_comes_as_published(server, tmp_path, task, split):
    name = publish(server, task, split)
    said = download(task, split, tmp_path, server.base)
    for part in ("train", "dev", "test"):
        for kind in ["questions", "outputs"][: 1 + (part != "test")]:
            assert (tmp_path / f"{part}_{kind}.json").read_bytes() == server.files[name(part, kind)]
    assert not (tmp_path / "test_outputs.json").exists()
    assert said[0] == "train: 3 questions of 3 users, 3 profile items"
    assert any(line.startswith("test:") and "no gold" in line for line in said)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".json") == []
    assert len(read_lamp(tmp_path / "dev_questions.json", tmp_path / "dev_outputs.json").examples) == 3


def test_the_command_takes_a_number_and_the_mirror_from_the_environment(server, tmp_path, monkeypatch):
    publish(server, split="time")
    monkeypatch.setenv("PERSONA_PLUG_LAMP", server.base + "/")
    result = cli("--task", 3, "--split", "time", "--out", tmp_path / "d")
    assert result.stdout.startswith("train: 3 questions of 3 users")
    assert (tmp_path / "d" / "train_outputs.json").is_file()


def test_a_local_copy_serves_as_well(server, tmp_path):
    publish(server)
    for path, content in server.files.items():
        (tmp_path / "mirror" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / path).write_bytes(content)
    download("3", "user", tmp_path / "d", str(tmp_path / "mirror"))
    assert server.asked == []
    assert (tmp_path / "d" / "dev_outputs.json").is_file()


def test_gold_of_the_test_part_is_taken_if_it_is_there(server, tmp_path):
    publish(server, gold=("train", "dev", "test"))
    said = download("3", "user", tmp_path, server.base)
    assert (tmp_path / "test_outputs.json").is_file()
    assert "no gold" not in " ".join(said)


def test_a_web_page_in_place_of_a_file_is_no_file(server, tmp_path):
    """The official server answers some wrong addresses with a page and code 200."""
    name = publish(server)
    for kind in ("questions", "outputs"):
        server.files[name("test", kind)] = b"<html>not found</html>"
        server.types[name("test", kind)] = "text/html; charset=utf-8"
    said = download("3", "user", tmp_path, server.base)
    assert "test_questions.json: no such file" in said[-1]
    server.types[name("train", "questions")] = "text/html"
    with pytest.raises(DataError, match=r"train_questions.json: no such file.*web page; check --base"):
        download("3", "user", tmp_path / "d", server.base)


def test_profile_items_without_a_date_are_counted_in_the_time_split(server, tmp_path):
    name = publish(server, split="time")
    questions = json.loads(server.files[name("dev", "questions")])
    del questions[1]["profile"][0]["date"]
    server.files[name("dev", "questions")] = json.dumps(questions).encode()
    said = download("3", "time", tmp_path, server.base)
    assert [line for line in said if "without a date" in line] == [
        "dev: 3 questions of 3 users, 3 profile items, 1 of them without a date"
    ]


def test_a_known_defect_is_reported_and_the_file_stays_as_published(server, tmp_path):
    name = publish(server, "LaMP_2")
    questions = json.loads(server.files[name("dev", "questions")])
    for q in questions:
        q["input"] = "Which tag? tags: [a, b] description: " + q["id"] + " dances."
    questions[0] |= {"id": "110", "input": "x A princess flees."}
    golds = [{"id": q["id"], "output": "a"} for q in questions]
    server.files[name("dev", "questions")] = json.dumps(questions).encode()
    server.files[name("dev", "outputs")] = json.dumps({"task": "LaMP_2", "golds": golds}).encode()
    said = download("2", "user", tmp_path, server.base)
    assert any("question 110" in line and "repaired" in line for line in said)
    assert (tmp_path / "dev_questions.json").read_bytes() == server.files[name("dev", "questions")]


# --- going on


def test_a_cut_connection_costs_nothing_that_arrived(server, tmp_path):
    name = publish(server, count=200)
    path = name("train", "questions")
    server.cuts[path] = [1000, 500]
    download("3", "user", tmp_path, server.base)
    assert [r for p, r in server.asked if p == path] == [None, "bytes=1000-", "bytes=1500-"]
    assert server.sent[path] == len(server.files[path])
    assert (tmp_path / "train_questions.json").read_bytes() == server.files[path]


def test_another_run_goes_on_where_one_gave_up(server, tmp_path):
    name = publish(server, count=200)
    path = name("dev", "questions")
    server.cuts[path] = [1000, *[0] * _http.TRIES]
    with pytest.raises(DataError, match=r"dev_questions.json: 1,000 of .* bytes arrived; 1,000 bytes are kept"):
        download("3", "user", tmp_path, server.base)
    assert not (tmp_path / "dev_questions.json").exists()
    assert (tmp_path / "train_questions.json").is_file()
    server.asked.clear()
    download("3", "user", tmp_path, server.base)
    assert server.asked[0] == (path, "bytes=1000-")
    assert server.sent[path] == len(server.files[path])
    assert not [p for p in server.paths() if "train" in p]


def test_what_had_arrived_in_full_is_not_asked_for_again(server, tmp_path):
    name = publish(server)
    (tmp_path / "train_questions.json.part").write_bytes(server.files[name("train", "questions")])
    download("3", "user", tmp_path, server.base)
    assert name("train", "questions") not in server.sent


@pytest.mark.parametrize("newer", [True, False], ids=["newer", "shorter"])
def test_a_file_that_changed_is_fetched_from_its_beginning(server, tmp_path, newer):
    name = publish(server)
    old = tmp_path / "train_questions.json.part"
    old.write_bytes(b"[" * (20 if newer else 100_000))
    if newer:
        server.modified = time.time() + 60
    download("3", "user", tmp_path, server.base)
    assert (tmp_path / "train_questions.json").read_bytes() == server.files[name("train", "questions")]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    name = publish(server, count=200)
    server.ranges = False
    server.cuts[name("train", "questions")] = [1000]
    download("3", "user", tmp_path, server.base)
    assert (tmp_path / "train_questions.json").read_bytes() == server.files[name("train", "questions")]


def test_a_second_run_asks_for_nothing(server, tmp_path):
    publish(server)
    download("3", "user", tmp_path, server.base)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    server.asked.clear()
    said = download("3", "user", tmp_path, server.base)
    assert said == [f"{part}: already there" for part in ("train", "dev", "test")]
    assert server.asked == []
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()} == before


# --- what is refused


def test_less_than_announced_is_no_file(server, tmp_path):
    name = publish(server)
    path = name("train", "questions")
    server.claims[path], server.ranges = len(server.files[path]) + 7, False
    with pytest.raises(DataError, match=r"train_questions\.json: .* bytes arrived"):
        download("3", "user", tmp_path, server.base)
    assert not (tmp_path / "train_questions.json").exists()


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("questions", lambda b: b[:-20], "not JSON"),
        ("outputs", lambda b: b'{"task": "LaMP_3"}', "a LaMP gold file is an object"),
        ("questions", lambda b: b"[]", "non-empty JSON list"),
        ("outputs", lambda b: b.replace(b'"01"', b'"99"'), "ids differ"),
        ("questions", lambda b: b.replace(b'"score"', b'"stars"'), "lacks one of the fields 'text' and 'score'"),
    ],
    ids=["cut", "no golds", "empty", "other ids", "other fields"],
)
def test_a_file_that_is_not_what_it_should_be_is_removed(server, tmp_path, kind, change, said):
    name = publish(server)
    server.files[name("dev", kind)] = change(server.files[name("dev", kind)])
    result = cli("--task", 3, "--base", server.base, "--out", tmp_path, code=1)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert "run again" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lamp.json", "train_outputs.json", "train_questions.json"]


def test_news_in_place_of_movies_is_refused(server, tmp_path):
    publish(server, "LaMP_2N")
    for path in list(server.files):
        server.files[path.replace("LaMP_2/", "LaMP_2/new/")] = server.files[path]
    with pytest.raises(DataError, match="lacks one of the fields 'description' and 'tag'"):
        download("2", "user", tmp_path, server.base)


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(_http, "PAUSE", 0.0)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    result = cli("--task", 3, "--base", f"http://127.0.0.1:{port}", "--out", tmp_path, code=1)
    (line,) = result.stderr.strip().splitlines()
    assert "train_questions.json: cannot be reached (" in line
    assert "--base" in line
    assert result.stdout == ""


@pytest.mark.parametrize("code", [403, 503])
def test_a_server_that_refuses(server, tmp_path, monkeypatch, code):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(code))
    with pytest.raises(DataError, match=f"train_questions.json: the server .*{code}"):
        download("3", "user", tmp_path, server.base)


def test_one_folder_holds_one_set(server, tmp_path):
    publish(server)
    publish(server, split="time")
    download("3", "user", tmp_path, server.base)
    for task, split in (("3", "time"), ("4", "user")):
        with pytest.raises(DataError, match="holds LaMP_3, user split; name another folder by --out"):
            download(task, split, tmp_path, server.base)


@pytest.mark.parametrize(("task", "split"), [("8", "user"), ("LaMP_0", "user"), ("3", "dev"), ("LongLaMP_5", "user")])
def test_unknown_names(tmp_path, task, split):
    with pytest.raises(ConfigError, match=r"known are|is not one of"):
        download(task, split, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_one_of_both_ways_is_asked_for(tmp_path):
    assert "--task" in cli("--out", tmp_path, code=2).stderr
    assert "--task" in cli("q.json", "--task", 3, "--out", tmp_path, code=2).stderr


# --- e-mail


MAILS = {
    "mail-1": b"From: a@b.c\r\nSubject: Re: the\r\n plan\r\n\r\nLet us meet.\r\n\r\n",
    "mail-2": b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\nMIME-Version: 1.0\n"
    b"Content-Type: multipart/alternative; boundary=B\n\n"
    b"--B\nContent-Type: text/html\n\n<p>Hi</p>\n--B\nContent-Type: text/plain; charset=latin-1\n"
    b"Content-Transfer-Encoding: quoted-printable\n\nSch=F6n!\n--B--\n",
    "mail-3": b"Content-Type: text/plain; charset=nonsense\n\nNo subject.\n",
}


def corpus(folder, zipped):
    """Write the mails as the corpus holds them: one archive a person, one folder in it."""
    folder.mkdir()
    for n, (name, content) in enumerate(MAILS.items()):
        if zipped:
            with zipfile.ZipFile(folder / f"{n}.zip", "w") as archive:
                archive.writestr(f"{n}/{name}", content)
                archive.writestr(f"{n}/other-{name}", b"Subject: other\n\nother")
        else:
            (folder / str(n)).mkdir()
            (folder / str(n) / name).write_bytes(content)
    return folder


def publish_lists(server, mail="mail-2"):
    publish(server, "LaMP_6", gold=())
    for path, content in server.files.items():
        questions = json.loads(content)
        for q in questions:
            q["input"] = mail if q["id"] == "01" else "mail-3"
        server.files[path] = json.dumps(questions).encode()


@pytest.mark.parametrize("zipped", [True, False], ids=["archives", "files"])
def test_lists_of_e_mails_are_joined_with_the_corpus(server, tmp_path, zipped):
    publish_lists(server)
    said = download("6", "user", tmp_path / "d", server.base, corpus(tmp_path / "text", zipped))
    assert "3 e-mails of" in said[-1]
    for part in ("train", "dev", "test"):
        data = read_lamp(tmp_path / "d" / f"{part}_questions.json", tmp_path / "d" / f"{part}_outputs.json")
        assert data.task == "LaMP_6"
        assert data.template == SUBJECT + "{input}"
        assert [(e.input, e.output) for e in data.examples[:2]] == [("Schön!", "Grüße"), ("No subject.", "")]
        (item,) = data.examples[0].history
        assert (item.input, item.output, item.id) == ("Let us meet.", "Re: the plan", "p")


def test_e_mails_that_the_corpus_lacks_are_named(server, tmp_path):
    publish_lists(server, "mail-9")
    with pytest.raises(DataError, match=r"1 of 3 e-mails are not there, first 'mail-9'"):
        download("6", "user", tmp_path / "d", server.base, corpus(tmp_path / "text", True))
    assert not (tmp_path / "d" / "train_questions.json").exists()


def test_a_damaged_archive_is_named(server, tmp_path):
    publish_lists(server)
    (corpus(tmp_path / "text", True) / "0.zip").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"0\.zip: a damaged zip archive"):
        download("6", "user", tmp_path / "d", server.base, tmp_path / "text")


@pytest.mark.parametrize("task", ["6", "LongLaMP_1"])
def test_without_the_licensed_corpus_one_line_says_so(tmp_path, task):
    result = cli("--task", task, "--out", tmp_path / "d", code=1)
    (line,) = result.stderr.strip().splitlines()
    assert "LDC2015T03" in line
    assert not (tmp_path / "d").exists()


# --- LongLaMP


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder laid out like the data set on the Hub, with a cache of its own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, configs = tmp_path / "hub", []
    for name, user, _ in LONGLAMP.values():
        item = {
            "abstract_generation": {"id": "7", "title": "T", "abstract": "A"},
            "product_review": {"overall": "5.0", "description": "D", "summary": "S", "reviewText": "R"},
            "topic_writing": {"id": "7", "summary": "S", "content": "C"},
        }[name]
        for split in ("user", "temporal"):
            place = folder / f"{name}_{split}"
            place.mkdir(parents=True)
            for part in ("train", "val", "test"):
                rows = [
                    {user: f"u{i}", "input": f"Write: {part} {i}", "output": f"{split} {i}", "profile": [item, item]}
                    for i in range(2)
                ]
                (place / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            files = "".join(f"\n  - split: {p}\n    path: {place.name}/{p}.jsonl" for p in ("train", "val", "test"))
            configs.append(f"- config_name: {place.name}\n  data_files:{files}\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return folder


@pytest.mark.parametrize("task", LONGLAMP)
@pytest.mark.parametrize("split", ["user", "temporal"])
def test_longlamp_is_written_in_lamps_shape(hub, tmp_path, task, split):
    out = tmp_path / "d"
    said = download(task, split, out, str(hub))
    assert said[1] == "dev: 2 questions of 2 users, 4 profile items"
    for part, theirs in (("train", "train"), ("dev", "val"), ("test", "test")):
        files = out / f"{part}_questions.json", out / f"{part}_outputs.json"
        data = read_lamp(*files, fields=LONGLAMP[task][2])
        assert [(e.user_id, e.output) for e in data.examples] == [("u0", f"{split} 0"), ("u1", f"{split} 1")]
        assert data.template == f"Write: {theirs} {{input}}"
        assert len(data.examples[0].history) == 2
    assert [p.name for p in out.iterdir() if p.suffix != ".json"] == []
    assert download(task, split, out, str(hub)) == [f"{part}: already there" for part in ("train", "dev", "test")]


def test_a_hub_that_cannot_be_reached(tmp_path):
    result = cli("--task", "LongLaMP_2", "--base", tmp_path / "nothing", "--out", tmp_path / "d", code=1)
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "cannot be had" in lines[0]
    assert "--base" in lines[0]


def test_another_data_set_of_the_hub_is_refused(hub, tmp_path):
    for part in ("train", "val", "test"):
        rows = hub / "abstract_generation_user" / f"{part}.jsonl"
        rows.write_text(rows.read_text().replace('"name"', '"who"'))
    with pytest.raises(DataError, match="lacks the column 'name'"):
        download("LongLaMP_2", "user", tmp_path / "d", str(hub))
    (hub / "abstract_generation_temporal" / "train.jsonl").write_text("no JSON")
    with pytest.raises(DataError, match="cannot be had"):
        download("LongLaMP_2", "time", tmp_path / "e", str(hub))
