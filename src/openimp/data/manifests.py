"""Manifests: tables in CSV, JSON Lines or JSON files.

Arrow reads them, with fixed types: `datasets` and pandas guess the type of a column, so "007" becomes 7, a caption
"None" is lost, and what looks like a date becomes one. Python's own readers read what Arrow refuses, more slowly. They
accept a little more, and their errors name the line.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from openimp.common.cache import CacheError, cache_folder, cached, stable_hash
from openimp.common.digests import digests
from openimp.common.errors import UserError, counted
from openimp.common.progress import notice

PYTHON_ROWS = 10_000
"""Rows that Python reads and converts to Arrow at once. The first ones determine the types of a JSON Lines file."""
BLOCK_BYTES = 2**24
"""Bytes that Arrow parses at once, and so the longest row that it reads."""
JSON_KINDS = {str: "a text", bool: "true or false", int | float: "a number", list: "a list", dict: "an object"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
CACHED_BYTES = 2**26
"""Bytes of manifests from which on their table is kept in the cache folder. Smaller manifests are read in less time
than the import of `datasets` takes, which opens cached tables."""
CACHE_VERSION = 7
"""Version of the files in the cache folder. Files of another version are not read."""


def read_manifests(name: str, path: str, files: list[str]) -> tuple[Any, list[int]]:
    """The rows of CSV or TSV files, or of JSON Lines or JSON lists of objects, and the number of rows of each file.

    The cells of a CSV file are text, and an empty one is missing. Large tables are memory-mapped, so that opening them
    again takes no time, and processes share their memory.
    """
    if sum(map(os.path.getsize, files)) < CACHED_BYTES:
        return _read_all(name, path, files)
    try:
        cache_folder("manifests")
    except UserError:  # It belongs to another user, or cannot be made.
        return _read_all(name, path, files)
    state = stable_hash([CACHE_VERSION, *digests(files)])
    try:
        return cached(
            "manifests",
            stable_hash(map(os.path.realpath, files)),
            lambda folder: _open_cached(folder / "rows.arrow", state),
            lambda folder: _write_cached(folder / "rows.arrow", *_read_all(name, path, files), state),
        )
    except (CacheError, OSError, ValueError, NotImplementedError):  # The disk is full, or the file system has no locks.
        return _read_all(name, path, files)


def _open_cached(file: Path, state: str) -> tuple[Any, list[int]]:
    """The table in a file of the cache, if it was written in this state of the manifests; else ValueError."""
    from datasets.table import MemoryMappedTable  # It pickles as a path, so workers share the file.

    data = MemoryMappedTable.from_file(str(file))
    metadata = data.schema.metadata
    if metadata[b"state"] != state.encode():
        raise ValueError("the manifests have changed")
    return data, json.loads(metadata[b"rows_by_file"])


def _write_cached(file: Path, data: pa.Table, rows_by_file: list[int], state: str) -> None:
    data = data.replace_schema_metadata({"rows_by_file": json.dumps(rows_by_file), "state": state})
    with pa.ipc.new_stream(file, data.schema) as writer:
        writer.write_table(data)


def _read_all(name: str, path: str, files: list[str]) -> tuple[pa.Table, list[int]]:
    tables = []
    for file in files:
        try:
            delimiter = DELIMITERS.get(Path(file).suffix.lower())
            tables.append(_read_csv(file, delimiter) if delimiter else _read_json(file))
        except UnicodeDecodeError:
            advice = "; save it as UTF-8 (Excel: CSV UTF-8)" if Path(file).suffix.lower() in DELIMITERS else ""
            raise UserError(f"source {name}: {file}: is not UTF-8 text{advice}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"source {name}: {file}: {error}") from None
    try:
        return _concatenated(tables), [table.num_rows for table in tables]
    except ValueError as error:
        raise UserError(f"source {name}: {path}: {error}") from None


class _Csv(NamedTuple):
    """How the cells of a CSV or TSV file are written."""

    delimiter: str = ","
    is_quoted: bool = True  # Cells in quotes may contain line breaks. False: quotes are ordinary characters.
    skips_spaces: bool = False  # A space after a delimiter belongs to no cell.

    def reader(self, lines: Iterable[str], strict: bool = False) -> Any:
        """A `csv.reader`. With `strict`, it raises csv.Error for a quote inside a cell in quotes."""
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quoting=csv.QUOTE_MINIMAL if self.is_quoted else csv.QUOTE_NONE,
            skipinitialspace=self.skips_spaces,
            strict=strict,
        )


def _has_spaces_after_commas(file: str) -> bool:
    """Whether spaces follow all commas of the header, as in "file, caption"."""
    with suppress(csv.Error), _open_csv(file) as lines:
        names: list[str] = next(_Csv().reader(lines), [])
        return len(names) > 1 and all(name.startswith(" ") for name in names[1:])
    return False


def _has_quoted_cells(file: str) -> bool:
    """Whether a TSV file has cells in quotes, as pandas writes them.

    Tabs often separate plain texts, such as `"No," she said.`, which are no valid cells in quotes.
    """
    with open(file, "rb") as lines:
        if not any(line.startswith(b'"') or b'\t"' in line for line in lines):
            return False
    with suppress(csv.Error), _open_csv(file) as texts:
        for _ in _Csv("\t").reader(texts, strict=True):
            pass
        return True
    return False


def _read_csv(file: str, delimiter: str = ",") -> pa.Table:
    if delimiter != ",":
        return _without_empty_end(_parsed_csv(file, _Csv(delimiter, is_quoted=_has_quoted_cells(file))))
    form = _Csv(skips_spaces=_has_spaces_after_commas(file))
    # Arrow cannot skip spaces.
    table = _to_arrow(_csv_rows(file, form)) if form.skips_spaces else _parsed_csv(file, form)
    texts = (column for column in table.columns if pa.types.is_string(column.type))
    if any(pc.any(pc.match_substring_regex(column, "[\r\n]")).as_py() for column in texts):
        _check_quotes(file, form)
    return _without_empty_end(table)


def _check_quotes(file: str, form: _Csv) -> None:
    """Raises ValueError for a quote that begins a cell by mistake, so that the cell takes in the rows below it.

    The readers of tables allow that: they continue to the next quote, or to the end of the file.
    """
    lines_of_row: list[str] = []
    first_line = 1
    # csv.Error: of what Arrow accepts, such as a NUL character in Python 3.10.
    with suppress(csv.Error), _open_csv(file) as lines:

        def recorded() -> Iterator[str]:
            for line in lines:
                lines_of_row.append(line)
                yield line

        for _ in form.reader(recorded()):
            if len(lines_of_row) > 1:
                strict_lines = [re.sub(r'"[ \t]+(?=,|$)', '"', line) for line in lines_of_row]
                try:
                    list(form.reader(strict_lines, strict=True))
                except csv.Error:
                    raise ValueError(
                        f'line {first_line}: the quote (") that begins a cell does not end it, so the cell takes in '
                        'lines below; remove it, or write the whole cell in quotes, and "" for a quote inside it'
                    ) from None
            first_line += len(lines_of_row)
            lines_of_row.clear()


def _open_csv(file: str) -> TextIO:
    csv.field_size_limit(max(BLOCK_BYTES, csv.field_size_limit()))  # As large as Arrow's cells.
    return open(file, encoding="utf-8-sig", newline="")  # -sig: Excel writes a byte order mark first.


def _parsed_csv(file: str, form: _Csv) -> pa.Table:
    with suppress(csv.Error, pa.ArrowException):
        with _open_csv(file) as lines:
            header = _csv_header(form.reader(lines), form.delimiter)
        table = pyarrow.csv.read_csv(
            file,
            pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES),
            pyarrow.csv.ParseOptions(
                delimiter=form.delimiter,
                quote_char='"' if form.is_quoted else False,
                newlines_in_values=form.is_quoted,
            ),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
        unnamed = table.columns[len(header) :]
        if table.column_names[: len(header)] == header and all(len(cells) == cells.null_count for cells in unnamed):
            return table.select(range(len(header)))
    return _to_arrow(_csv_rows(file, form))


def _without_empty_end(table: pa.Table) -> pa.Table:
    """Without the empty rows at the end, which spreadsheets write. Other empty rows stay, so that the numbers of rows
    do not change.
    """
    if not len(table) or any(column[-1].is_valid for column in table.columns):
        return table
    has_value = reduce(pc.or_, [column.is_valid() for column in table.columns])
    last_row = np.flatnonzero(has_value.to_numpy()).max(initial=-1)
    return table.slice(0, last_row + 1)


def _csv_header(lines: Any, delimiter: str) -> list[str]:
    """The first line of a `csv.reader`; ValueError if it cannot be the header of a table."""
    header: list[str] = next(lines, [])
    is_blank = not header
    while header and not header[-1]:  # Spreadsheets write empty names for columns that were emptied.
        header.pop()
    if not header and not is_blank:
        raise ValueError("its first line names no column")
    if delimiter == "," and len(header) == 1 and (other := re.search("[;\t|]", header[0])):
        raise ValueError(
            f'the header {header[0]!r} has no comma; write the columns separated by commas: python -c "import csv, '
            f'sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={other[0]!r}))" '
            "< OLD.csv > NEW.csv"
        )
    if len(set(header)) < len(header):
        raise ValueError(f"the header names a column twice: {', '.join(header)}")
    return header


def _csv_rows(file: str, form: _Csv) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or TSV file with a header. A file that is damaged, or something else, raises a ValueError that
    names the line.

    A row that spans several lines has the number of its first line.
    """
    with _open_csv(file) as handle:
        lines = form.reader(handle)
        short_lines = []  # A line break in a cell without quotes may be the reason.
        end = 0
        try:
            header = _csv_header(lines, form.delimiter)
            end = lines.line_num
            for cells in lines:
                line = end + 1  # A row begins on the line after the end of the row before it.
                end = lines.line_num
                while len(cells) > len(header) and not cells[-1]:
                    cells.pop()
                if len(cells) > len(header):
                    raise ValueError(f"line {line} has {counted(len(cells), 'cell')}, the header {len(header)} names")
                if 0 < len(cells) < len(header):
                    short_lines.append(line)
                if cells:
                    yield dict.fromkeys(header) | {column: cell or None for column, cell in zip(header, cells)}
        except csv.Error as error:
            raise ValueError(f"line {end + 1}: {error}") from None
    if short_lines:
        rows = counted(len(short_lines), "row")
        first = f"the first: line {short_lines[0]}"
        notice(f"{file}: {rows} with fewer cells than the header, where the last columns count as empty; {first}")


def _read_json(file: str) -> pa.Table:
    rows = _json_rows(file)
    first_rows = _to_arrow(islice(rows, PYTHON_ROWS))
    if first_rows.num_rows == PYTHON_ROWS and not _is_list(file):
        with suppress(pa.ArrowException):
            # With the types of the first rows, Arrow guesses none. It refuses a row that does not fit them.
            table = pyarrow.json.read_json(
                file,
                pyarrow.json.ReadOptions(block_size=BLOCK_BYTES),
                pyarrow.json.ParseOptions(explicit_schema=first_rows.schema, unexpected_field_behavior="error"),
            )
            table.validate(full=True)  # Arrow's parser does not check that texts are UTF-8.
            return table
    return _concatenated([first_rows, _to_arrow(rows)])


def _is_list(file: str) -> bool:
    with open(file, encoding="utf-8-sig") as handle:
        return handle.read(1024).lstrip()[:1] == "["


def _json_rows(file: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, or of a file with one object per line; any other file is a ValueError.

    Its message names the line or the item. A list that is nested too deeply is a RecursionError.
    """
    is_list = _is_list(file)
    with open(file, encoding="utf-8-sig") as handle:
        for number, row in enumerate(json.load(handle), 1) if is_list else _json_lines(handle):
            if not isinstance(row, dict):
                raise ValueError(f"{'item' if is_list else 'line'} {number} is not a JSON object")
            yield row


def _json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                message = f"line {number}, column {error.colno}: {error.msg}"
                raise ValueError(f"{message}; write a list of objects, or one object per line") from None
            except RecursionError as error:
                raise ValueError(f"line {number}: {error}") from None


def _to_arrow(rows: Iterator[dict[str, Any]]) -> pa.Table:
    """The rows as a table. Columns that some rows lack are null there."""
    tables = []
    while chunk := list(islice(rows, PYTHON_ROWS)):
        arrays = {}
        for column in dict.fromkeys(column for row in chunk for column in row):
            try:
                arrays[column] = pa.array([row.get(column) for row in chunk])
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start])
                raise ValueError(f"column {column!r}: {half} is half of a character; a text was cut there") from None
            except (pa.ArrowException, OverflowError) as error:
                raise ValueError(f"column {column!r} mixes types: {_mixed(chunk, column) or error}") from None
        tables.append(pa.table(arrays))
    return _concatenated(tables)


def _mixed(rows: list[dict[str, Any]], column: str) -> str:
    """Two values of different kinds in a column, with what to do; empty if all values are of one kind."""
    first_of_kind: dict[str, Any] = {}
    for row in rows:
        if (value := row.get(column)) is not None:
            kind = next((name for kind, name in JSON_KINDS.items() if isinstance(value, kind)), "other")
            first_of_kind.setdefault(kind, value)
    if len(first_of_kind) < 2:
        return ""
    (kind, value), (other_kind, other), *_ = first_of_kind.items()
    return f"{value!r:.60} is {kind}, and {other!r:.60} is {other_kind}; write all values in the same way"


def _concatenated(tables: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables or [pa.table({})], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"a column mixes types: {error}") from None
