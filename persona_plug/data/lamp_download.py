"""LaMP's and LongLaMP's official files as a folder in LaMP's shape, which training and comparisons read.

LaMP lies on its authors' server, LongLaMP on the Hub. Texts of the e-mail tasks are not public: LaMP-6 is joined with
the user's own copy of the Avocado corpus. The files are kept as published; their known defects are repaired whenever
they are read (`persona_plug.data.lamp.DEFECTS`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_plug.data._http import NotThere, fetch
from persona_plug.data.avocado import Mail, read_mails
from persona_plug.data.lamp import LampData, read_lamp
from persona_plug.errors import ConfigError, DataError

BASE = "https://ciir.cs.umass.edu/downloads/LaMP"
HUB = "LongLaMP/LongLaMP"
FACTS = "lamp.json"
PARTS = ("train", "dev", "test")

# Task -> where its files lie under the base address, and the fields of a profile item (see `read_lamp`).
LAMP: dict[str, tuple[str, tuple[str, str]]] = {
    "LaMP_1": ("LaMP_1", ("abstract", "title")),
    "LaMP_2": ("LaMP_2/new", ("description", "tag")),  # LaMP_2 itself holds the older news task
    "LaMP_2N": ("LaMP_2", ("text", "category")),
    "LaMP_3": ("LaMP_3", ("text", "score")),
    "LaMP_4": ("LaMP_4", ("text", "title")),
    "LaMP_5": ("LaMP_5", ("abstract", "title")),
    "LaMP_6": ("LaMP_6", ("", "text")),  # names of e-mails
    "LaMP_7": ("LaMP_7", ("", "text")),
}
# Task -> the Hub's name of it, the field that holds the user, and the fields of a profile item.
LONGLAMP: dict[str, tuple[str, str, tuple[str, str]]] = {
    "LongLaMP_2": ("abstract_generation", "name", ("title", "abstract")),
    "LongLaMP_3": ("product_review", "reviewerId", ("overall+description+summary", "reviewText")),
    "LongLaMP_4": ("topic_writing", "author", ("summary", "content")),
}
SUBJECT = "Generate a subject for the following email: "
_LICENSED = "its texts are the Avocado corpus, which the LDC licenses (LDC2015T03)"


def download(
    task: str,
    split: str,
    folder: str | os.PathLike[str],
    base: str | None = None,
    avocado: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Make a folder of `{train,dev,test}_questions.json` and `_outputs.json`.

    A file takes its name only when it has arrived in full and been checked: JSON, LaMP's shape, the task's profile
    fields, the same ids in questions and gold. One that has its name is not fetched again, and what has arrived of
    another is gone on with. LaMP keeps the gold of its test part back: it is taken if it is there.

    Args:
        task: `LaMP_1` ... `LaMP_7`, `LaMP_2N` (the older LaMP-2, on news) or `LongLaMP_2` ... `LongLaMP_4`; the number
            alone means LaMP.
        split: `user` (users of one part occur in no other) or `time`, which LongLaMP calls `temporal`.
        folder: Where the files go; it may hold no other task or split.
        base: Another place of LaMP's files, an address or a folder, laid out alike (default what the environment names
            in PERSONA_PLUG_LAMP, else their authors' server); for LongLaMP another data set of the Hub or a folder.
        avocado: For LaMP-6, the corpus's `data/text` folder.

    Returns:
        Lines for the user: what is there now, what is missing, what is repaired.

    Raises:
        ConfigError: There is no such task or split.
        DataError: A file cannot be had or is not what it should be, or the e-mail corpus is missing.
    """
    task = task if task.startswith(("LaMP_", "LongLaMP_")) else f"LaMP_{task}"
    split = "time" if split == "temporal" else split
    if task == "LongLaMP_1":
        raise DataError(f"{task}: {_LICENSED}, and its authors' lists of e-mails have no public address; not supported")
    if task not in LAMP and task not in LONGLAMP:
        raise ConfigError(f"no task {task!r} to download; known are {', '.join([*LAMP, *LONGLAMP])}")
    if split not in ("user", "time"):
        raise ConfigError(f"split={split!r} is not one of user, time")
    if task == "LaMP_6" and avocado is None:
        raise DataError(f"{task}: {_LICENSED}; name your copy's data/text folder by --avocado")
    target = Path(folder)
    _claim(target, task, split)
    if task in LONGLAMP:
        return _longlamp(task, split, target, base or HUB)
    source = base or os.environ.get("PERSONA_PLUG_LAMP") or BASE
    if task != "LaMP_6":
        return _lamp(task, split, target, source)
    lists = target / "lists"
    lists.mkdir(exist_ok=True)
    said = _lamp(task, split, lists, source)
    return [*said, *_join(lists, target, Path(str(avocado)))]


def _claim(folder: Path, task: str, split: str) -> None:
    """Note in the folder whose files it holds, so that no two sets are mixed."""
    facts, wanted = folder / FACTS, {"task": task, "split": split}
    folder.mkdir(parents=True, exist_ok=True)
    if not facts.is_file():
        facts.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        return
    found = json.loads(facts.read_text(encoding="utf-8"))
    if found != wanted:
        raise DataError(f"{folder} holds {found.get('task')}, {found.get('split')} split; name another folder by --out")


def _lamp(task: str, split: str, folder: Path, base: str) -> list[str]:
    """Fetch a LaMP task's files; the part `test` may lack its gold, and LaMP-6 has none."""
    place, fields = LAMP[task]
    root = "/".join([base.rstrip("/"), *(["time"] if split == "time" else []), place])
    said: list[str] = []
    for part in PARTS:
        questions, outputs = folder / f"{part}_questions.json", folder / f"{part}_outputs.json"
        names = [questions] if task == "LaMP_6" else [questions, outputs]
        if questions.is_file() and (outputs.is_file() or part == "test" or names == [questions]):
            said.append(f"{part}: already there")
            continue
        files: list[Path] = []
        try:
            for name in names:
                files.append(name if name.is_file() else name.with_name(f"{name.name}.part"))
                if files[-1] != name:
                    _get(f"{root}/{part}/{name.name}", files[-1])
        except NotThere as exc:
            if part != "test":
                raise
            said.append(f"{part}: {exc.args[0].split('; ')[0]}")
            files.pop()
        if files:
            said += _check(part, split, files, fields, gold=len(files) == len(names))
            _name(files)
    return said


def _get(source: str, part: Path) -> None:
    """Fetch from an address, or copy from a folder that was named instead of one."""
    if "://" in source:
        fetch(source, part)
    elif Path(source).is_file():
        shutil.copyfile(source, part)
    else:
        raise NotThere(f"{source}: no such file; check --base")


def _check(part: str, split: str, files: Sequence[Path], fields: tuple[str, str], gold: bool = True) -> list[str]:
    """Read a part as training does and tell what it holds; what is wrong and just arrived is removed."""
    try:
        data = read_lamp(files[0], files[1] if len(files) > 1 else None, fields=fields)
    except DataError as exc:
        for path in files:
            if path.suffix == ".part":
                path.unlink()
        raise DataError(f"{exc}; what had arrived is removed: run again, or name another --base") from exc
    return _tell(part, split, data, gold)


def _name(files: Sequence[Path]) -> None:
    for path in files:
        if path.suffix == ".part":
            os.replace(path, path.with_suffix(""))


def _tell(part: str, split: str, data: LampData, gold: bool) -> list[str]:
    users = len({e.user_id for e in data.examples})
    items = sum(len(e.history) for e in data.examples)
    said = f"{part}: {len(data.examples)} questions of {users} users, {items} profile items"
    undated = sum(i.timestamp is None for e in data.examples for i in e.history)
    if split == "time" and undated:
        said += f", {undated} of them without a date"
    return [said + ("" if gold else ", no gold: it cannot be scored here"), *(f"{part}: {r}" for r in data.repairs)]


def _join(lists: Path, folder: Path, corpus: Path) -> list[str]:
    """Put the e-mails' texts in place of their names: the body is the request, the subject the answer.

    The subject is gold for every part, `test` included: who has the corpus has it.
    """
    rows = {
        part: json.loads(path.read_text(encoding="utf-8"))
        for part in PARTS
        if (path := lists / f"{part}_questions.json").is_file()
    }
    questions = [q for part in rows.values() for q in part]
    wanted = {q["input"] for q in questions} | {i["text"] for q in questions for i in q["profile"]}
    mails = read_mails(corpus, wanted)
    if absent := sorted(wanted - set(mails)):
        raise DataError(
            f"{corpus}: {len(absent)} of {len(wanted)} e-mails are not there, first {absent[0]!r}; "
            "name the corpus's data/text folder by --avocado"
        )
    for part, found in rows.items():
        golds = [{"id": q["id"], "output": mails[q["input"]].subject} for q in found]
        files = [folder / f"{part}_{kind}.json.part" for kind in ("questions", "outputs")]
        _write(files[0], (_with_texts(q, mails) for q in found))
        _write_whole(files[1], {"task": "LaMP_6", "golds": golds})
        _name(files)
    return [f"{len(mails)} e-mails of {corpus} put in place of their names"]


def _with_texts(question: Mapping[str, Any], mails: Mapping[str, Mail]) -> dict[str, Any]:
    found = [(item, mails[item["text"]]) for item in question["profile"]]
    profile = [{**item, "text": mail.body, "title": mail.subject} for item, mail in found]
    return {**question, "input": SUBJECT + mails[question["input"]].body, "profile": profile}


def _longlamp(task: str, split: str, folder: Path, source: str) -> list[str]:
    """Load a LongLaMP task from the Hub and write it in LaMP's shape; a question's id is its place in its part."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each of its tries
    if not os.isatty(2):
        disable_progress_bars()
    name, user, fields = LONGLAMP[task]
    config = f"{name}_{'user' if split == 'user' else 'temporal'}"
    said = []
    for part, theirs in zip(PARTS, ("train", "val", "test"), strict=True):
        questions, outputs = folder / f"{part}_questions.json", folder / f"{part}_outputs.json"
        if questions.is_file() and outputs.is_file():
            said.append(f"{part}: already there")
            continue
        try:
            rows = load_dataset(source, config, split=theirs)
        except (OSError, DatasetsError) as exc:
            raise DataError(
                f"{source} ({config}) cannot be had: {_line(exc)}; check the network, or name a copy by --base"
            ) from exc
        except ValueError as exc:  # datasets' way to say that a configuration or a split is not there
            raise DataError(f"{source} has no {config}, {theirs}: {_line(exc)}; check --base") from exc
        if lacking := sorted({user, "input", "output", "profile"} - set(rows.column_names)):
            raise DataError(f"{source} ({config}, {theirs}) lacks the column {lacking[0]!r}; check --base")
        golds = [{"id": f"{i}", "output": text} for i, text in enumerate(rows["output"])]
        made = (
            {"id": f"{i}", "user_id": str(r[user]), "input": r["input"], "profile": r["profile"]}
            for i, r in enumerate(rows)
        )
        files = [p.with_name(f"{p.name}.part") for p in (questions, outputs)]
        _write(files[0], made)
        _write_whole(files[1], {"task": task, "golds": golds})
        said += _check(part, "user", files, fields)
        _name(files)
    return said


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON list row by row: a task's profiles are gigabytes."""
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for i, row in enumerate(rows):
            file.write(("" if i == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("]\n")


def _write_whole(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
