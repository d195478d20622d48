"""Rows of files and tables: JSON lines, JSON arrays, CSV, TSV, Parquet, packed or not; pandas, `datasets` and others.

Every row comes with its place, or with the reason why it cannot be read. Nothing is written anywhere.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from persona_plug.errors import ConfigError, DataError, nearest

Row = tuple[str, Mapping[str, Any] | DataError]
FIELDS = ("user_id", "input", "output", "timestamp", "id")
OPTIONAL = ("timestamp", "id")
JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
TABLE_ENDINGS = {".csv": None, ".tsv": "\t", ".tab": "\t"}
PACKERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ENDINGS = ".jsonl, .json, .csv, .tsv or .parquet, the first four also as .gz, .bz2 or .xz"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_BREAKS = re.compile("[\x85\u2028\u2029\ud800-\udfff]")  # also halves of characters, which are no UTF-8
LONGEST_CELL = (1 << 31) - 1


def read_rows(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yield the place of each row of a file, and the row or what is wrong with it.

    Args:
        path: The file; its ending, in any letter case, says what it holds.
        columns: Field -> the file's own name of it, for fields that have another name there.

    Raises:
        DataError: There is no such file, or it cannot be read as what its ending says.
        ConfigError: `columns` names an unknown field.
    """
    file = local_path(path)
    check_columns(columns)
    if file.is_dir():
        raise DataError(f"{file}: is a folder; name a file in it")
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    endings = [ending.lower() for ending in file.suffixes]
    packer = PACKERS.get(endings[-1]) if endings else None
    ending = (endings[-2:-1] if packer else endings[-1:]) or [""]
    if ending[0] in JSON_ENDINGS:
        rows = _json_rows(file, packer)
    elif ending[0] in TABLE_ENDINGS:
        rows = _table_rows(file, packer, TABLE_ENDINGS[ending[0]])
    elif ending[0] == ".parquet" and packer is None:
        rows = _parquet_rows(file)
    else:
        raise DataError(f"{file}: unknown ending {''.join(endings[-2:])!r:.40}; use {ENDINGS}")
    yield from _renamed(_named_errors(file, rows), columns)


def table_rows(data: Any, columns: Mapping[str, str] | None = None) -> Iterator[Row]:  # noqa: ANN401
    """Yield the rows of a table in memory: a DataFrame, a `datasets.Dataset`, a list of mappings, a mapping of columns.

    What a DataFrame calls missing (NaN, NaT, NA) is missing. A row that is no mapping is an error of that row.

    Raises:
        DataError: The object is no table; of a dictionary of splits it is not clear which is meant.
        ConfigError: `columns` names an unknown field.
    """
    check_columns(columns)
    yield from _renamed(((f"record {n}", _mapping(row, n)) for n, row in enumerate(unfold(data))), columns)


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Refuse a mapping of columns that names no field of a record.

    Raises:
        ConfigError: It is no mapping, or a name is not one of `FIELDS`.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise ConfigError(f"columns={columns!r:.60} must be a mapping of fields, as {{'user_id': 'agent'}}")
    for name, column in (columns or {}).items():
        if name not in FIELDS:
            if column in FIELDS:
                raise ConfigError(f"columns: write field=column, so {column}={name} and not {name}={column}")
            raise ConfigError(
                f"columns: {name!r:.60} is no field of a record{nearest(name, FIELDS) or ';'} use {', '.join(FIELDS)}"
            )


def json_line(value: Any, compact: bool = False) -> str:  # noqa: ANN401
    """Return a value as JSON on one line, also for readers that end lines where Unicode does."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":") if compact else None)
    return _BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return the path, with a leading ~ as the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name of nobody: a file that is called so
        return Path(path)


# -- files -------------------------------------------------------------------------------------------------------------


def _named_errors(file: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """Pass rows on; turn what the readers raise into one line that names the file."""
    try:
        yield from rows
    except UnicodeDecodeError as exc:
        raise DataError(f"{file}: not UTF-8 text ({exc.reason}); save it as UTF-8") from exc
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as exc:
        raise DataError(f"{file}: the packed file is damaged or no such file ({exc}); pack it again") from exc
    except csv.Error as exc:
        raise DataError(f"{file}: not a table that can be read ({exc}); check quotes and separators") from exc
    except OSError as exc:
        raise DataError(f"{file}: cannot be read ({exc.strerror or exc}); check the file and its rights") from exc


def _open(file: Path, packer: Callable[..., Any] | None, newline: str | None) -> io.TextIOWrapper:
    stream = packer(file) if packer else file.open("rb")
    start = stream.read(4)
    stream.seek(0)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(stream, encoding=encoding, newline=newline)


def _json_rows(file: Path, packer: Callable[..., Any] | None) -> Iterator[Row]:
    with _open(file, packer, None) as stream:
        first = next((line for line in stream if line.strip()), "")
        if first.lstrip().startswith("["):
            stream.seek(0)
            yield from _array_rows(file, stream.read())
            return
        stream.seek(0)
        for number, line in enumerate(stream, 1):
            if line.strip():
                row = _json_object(line, f"{file}:{number}")
                if number == 1 and isinstance(row, DataError) and line.strip() == "{":
                    raise DataError(f"{file}: one JSON object over several lines; write a JSON array or one a line")
                yield f"{file}:{number}", row


def _array_rows(file: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as exc:
        raise DataError(f"{file}:{exc.lineno}: not a JSON array ({exc.msg} at column {exc.colno}); repair it") from exc
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{file}: not JSON that can be read ({exc!s:.60}); repair it") from exc
    for number, row in enumerate(rows, 1):
        where = f"{file}:record {number}"
        yield where, row if isinstance(row, dict) else _no_object(row, where)


def _json_object(line: str, where: str) -> Mapping[str, Any] | DataError:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as exc:
        return DataError(f"{where}: not JSON ({exc.msg} at column {exc.colno}); one JSON object a line is expected")
    except (ValueError, RecursionError) as exc:
        return DataError(f"{where}: not JSON that can be read ({exc!s:.60}); one JSON object a line is expected")
    return record if isinstance(record, dict) else _no_object(record, where)


def _no_object(value: object, where: str) -> DataError:
    return DataError(f"{where}: holds a JSON {type(value).__name__}, not an object with user_id, input, output")


def _table_rows(file: Path, packer: Callable[..., Any] | None, mark: str | None) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    with _open(file, packer, "") as stream:
        line = stream.readline()
        skipped = 0
        if line[:4].lower() == "sep=":  # a line of its own for spreadsheets
            mark, skipped = line[4:5], 1
        else:
            stream.seek(0)
        reader = csv.reader(stream, delimiter=mark or _separator(line), strict=True)
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            double = next(name for name in header if header.count(name) > 1)
            raise DataError(f"{file}: column {double!r:.60} stands twice in the header; rename one")
        number = reader.line_num + 1
        for cells in reader:
            where = f"{file}:{number + skipped}"
            number = reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) == len(header):
                yield where, dict(zip(header, cells, strict=True))
            else:
                yield where, DataError(f"{where}: {len(cells)} cells under {len(header)} columns; check the quotes")


def _separator(header: str) -> str:
    """Return the separator that a header line holds most of; names in quotes do not count."""
    bare = "".join(header.split('"')[::2])
    return max(",;\t|", key=bare.count)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:row {number}", {k: v for k, v in row.items() if v is not None}
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise DataError(
            f"{file}: not a readable Parquet file ({str(exc).splitlines()[0]:.120}); write it again"
        ) from exc


# -- tables in memory --------------------------------------------------------------------------------------------------


def unfold(data: Any) -> Iterable[Any]:  # noqa: ANN401
    """Return the rows of a table, or the elements of any other iterable.

    The libraries are known by their methods, none is imported.

    Raises:
        DataError: The object is no table; of a dictionary of splits it is not clear which is meant.
    """
    if isinstance(data, Mapping):
        return unfold(_split_of(data)) if is_splits(data) else _from_columns(data)
    if hasattr(data, "to_dicts"):  # polars
        return data.to_dicts()
    if hasattr(data, "to_pylist"):  # pyarrow
        return data.to_pylist()
    if hasattr(data, "iterrows") and hasattr(data, "to_dict"):  # pandas
        return (_without_missing(row) for row in data.to_dict("records"))
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise DataError(f"data must be a file, a table or a list of records, not {type(data).__name__}")
    return data


def is_table(data: object) -> bool:
    """Whether an object is a table of one of the libraries that `unfold` knows."""
    return any(hasattr(data, name) for name in ("to_dicts", "to_pylist", "iterrows", "column_names"))


def is_splits(data: Any) -> bool:  # noqa: ANN401
    """Whether data is a dictionary of tables, such as a `datasets.DatasetDict`."""
    if not isinstance(data, Mapping) or not data:
        return False
    return all(hasattr(v, "column_names") or hasattr(v, "iterrows") for v in data.values())


def _split_of(data: Mapping[str, Any]) -> Any:  # noqa: ANN401
    if len(data) == 1:
        return next(iter(data.values()))
    names = ", ".join(map(str, data))
    raise DataError(f"data has several splits ({names}); give the one to use, as in data['train']")


def _from_columns(data: Mapping[str, Any]) -> Iterable[Any]:
    columns = {k: list(v) for k, v in data.items() if hasattr(v, "__len__") and not isinstance(v, str | Mapping)}
    if len(columns) < len(data) or len({len(v) for v in columns.values()}) != 1:
        raise DataError("data is one mapping; give a list of records, or columns of one length")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _without_missing(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Leave out what a DataFrame calls missing: None, and what does not equal itself or refuses to say so."""

    def present(value: object) -> bool:
        if value is None or type(value).__name__ in ("NAType", "NaTType"):
            return False
        return not (isinstance(value, float) and value != value)

    return {str(name): value for name, value in row.items() if present(value)}


def _mapping(row: object, number: int) -> Mapping[str, Any] | DataError:
    if isinstance(row, Mapping):
        return row
    kind = type(row).__name__
    return DataError(f"record {number}: is a {kind}, not a mapping with user_id, input, output")


# -- columns -----------------------------------------------------------------------------------------------------------


def _renamed(rows: Iterable[Row], columns: Mapping[str, str] | None) -> Iterator[Row]:
    """Give fields their own names; only `timestamp` and `id` may be missing in a row, though not in all."""
    unseen = {c for field, c in (columns or {}).items() if field in OPTIONAL}
    there = ""
    for where, row in rows:
        if isinstance(row, DataError) or not columns:
            yield where, row
            continue
        there = ", ".join(map(str, row))
        unseen -= row.keys()
        missing = [c for field, c in columns.items() if c not in row and field not in OPTIONAL]
        if missing:
            yield (
                where,
                DataError(
                    f"{where}: has no column {missing[0]!r:.60}; it has {there:.160}{nearest(missing[0], row, '; ')}"
                ),
            )
            continue
        others = {k: v for k, v in row.items() if k not in columns and k not in columns.values()}
        yield where, {**others, **{field: row[c] for field, c in columns.items() if c in row}}
    if unseen and there:
        raise DataError(f"no row has the column {min(unseen)!r:.60}; the last one has {there:.160}")
