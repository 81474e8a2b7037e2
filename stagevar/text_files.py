"""Text files as people have them: the one place that decodes them, splits them into lines and reads JSON and CSV.

Accepted: UTF-8 with or without a byte-order mark, UTF-16 and UTF-32 with one; lines that end in \\n, \\r\\n or \\r and in
nothing else: U+2028, U+0085 and their like are characters of a line, as JSON and CSV have it. Anything ambiguous
is a UsageError that names the file and the line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from stagevar.errors import UsageError

#: More than any prompt set or detections file; a device or a model's weights given by mistake end here.
MAX_BYTES = 2**29

_LINE_END = re.compile(r"\r\n|\n|\r")
#: UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]', re.DOTALL)


def read_text(path: str | os.PathLike[str], what: str = "") -> str:
    """The text of a file, without byte-order marks.

    Args:
        what: what the file is for, as messages call it ("prompts").

    Raises:
        UsageError: if it cannot be read, is too large, or is not text.
    """
    name = f"{what} {path}".strip()
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name} cannot be read: {reason}; give an existing text file") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{name} is larger than {MAX_BYTES >> 20} MiB, too large for a text file of this kind")
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        _refuse_bytes(name, encoding, data[len(mark) :], error.start)
    if "\0" in text:
        _refuse_bytes(name, encoding, text.encode(), text.encode().index(0))
    # Files put together with `cat` carry their marks along, at the beginnings of lines.
    return re.sub(r"(\A|[\r\n])\ufeff+", r"\1", text)


def _refuse_bytes(name: str, encoding: str, data: bytes, position: int) -> NoReturn:
    line = len(_LINE_END.split(data[:position].decode(encoding, "replace")))
    if data[position] == 0:
        raise UsageError(
            f"{name} line {line} has a zero byte: not a text file, or UTF-16 without a byte order mark; save it as UTF-8"
        )
    raise UsageError(
        f"{name} line {line}: byte 0x{data[position]:02x} is not {encoding.upper()}; save the file as UTF-8"
    )


def split_lines(text: str) -> list[str]:
    """Lines without their ends; a last one that is empty is left out."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


# JSON --------------------------------------------------------------------------------------------------------------


def parse_json(text: str, name: str, first_line: int = 1) -> Any:
    """The value of a JSON text.

    Args:
        name: what messages call the file.
        first_line: number of the text's first line within it.

    Raises:
        UsageError: with the line, for text that is not JSON, a key given twice in one object, NaN, and infinities.
    """
    repeated = False

    def once(pairs: list[tuple[str, Any]]) -> dict[str, object]:
        nonlocal repeated
        content = dict(pairs)
        repeated |= len(content) < len(pairs)
        return content

    def no_number(word: str) -> NoReturn:
        raise UsageError(f"{name}{_line_of_word(text, word, first_line)}: {word} is not a valid JSON number")

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except json.JSONDecodeError as error:
        line = first_line - 1 + len(_LINE_END.split(text[: error.pos]))
        raise UsageError(f"{name} line {line}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise UsageError(f"{name} line {first_line}: JSON nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise UsageError(f"{name} line {first_line}: not JSON ({str(error).split(';')[0]})") from None
    if repeated:
        key, line = _repeated_key(text)
        raise UsageError(f"{name} line {first_line - 1 + line}: key {key!r} appears twice in one object")
    return value


def _line_of_word(text: str, word: str, first_line: int) -> str:
    position = next(
        (m.start() for m in re.finditer(r'"(?:[^"\\]|\\.)*"|-?\w+', text) if m[0] == word), 0
    )  # outside of strings
    return f" line {first_line - 1 + len(_LINE_END.split(text[:position]))}"


def _repeated_key(text: str) -> tuple[str, int]:
    """The first key of a JSON text that its object already has, and the line of the second one."""
    objects: list[set[str] | None] = []  # keys of the open objects, None for an open list
    expects_key = False
    for token in _JSON_TOKEN.finditer(text):
        word = token[0]
        if word in "{[":
            objects.append(set() if word == "{" else None)
            expects_key = word == "{"
        elif word in "}]":
            objects.pop()
            expects_key = False
        elif word == ",":
            expects_key = objects[-1] is not None
        elif word == ":":
            expects_key = False
        elif expects_key:
            keys, key = objects[-1], json.loads(word)
            assert keys is not None  # a key is expected in objects only
            if key in keys:
                return key, len(_LINE_END.split(text[: token.start()]))
            keys.add(key)
            expects_key = False
    raise AssertionError("no key appears twice")


def read_json(path: str | os.PathLike[str], what: str = "") -> Any:
    """The value of a JSON file. Raises UsageError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, what), f"{what} {path}".strip())


def read_json_values(path: str | os.PathLike[str], what: str = "") -> list[tuple[int, Any]]:
    """(line, value) of a file that holds JSON lines, one JSON list, or one other JSON value, distinguished by content.

    The line is where a value begins; those of a list on one line share it. An object that spans several lines is one
    value.

    Raises:
        UsageError: as `read_text` and `parse_json` do.
    """
    return parse_json_values(read_text(path, what), f"{what} {path}".strip())


def parse_json_values(text: str, name: str) -> list[tuple[int, Any]]:
    """Like `read_json_values`, but from a text."""
    lines = [(number, line) for number, line in enumerate(split_lines(text), start=1) if line.strip()]
    if not lines:
        return []
    if len(lines) > 1 and _is_json(lines[0][1]):  # a whole value on the first line, and more behind it
        return [(number, parse_json(line, name, number)) for number, line in lines]
    value = parse_json(text, name)
    if not isinstance(value, list):
        return [(lines[0][0], value)]
    return list(zip(_lines_of_entries(text), value, strict=True))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines_of_entries(text: str) -> list[int]:
    """The line on which each entry of a JSON list begins."""
    decoder, position, starts = json.JSONDecoder(), text.index("[") + 1, []
    while True:
        position = re.compile(r"[\s,]*").match(text, position).end()  # type: ignore[union-attr]
        if text[position] == "]":
            break
        starts.append(position)
        position = decoder.raw_decode(text, position)[1]
    lines, before, line = [], 0, 1
    for start in starts:
        line += len(_LINE_END.findall(text, before, start))
        lines.append(line)
        before = start
    return lines


# CSV ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A CSV file with a header.

    Attributes:
        columns: names in lower case, in file order.
        rows: (line, cells by column name).
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[int, Mapping[str, str]], ...]


def read_table(path: str | os.PathLike[str], what: str = "") -> Table:
    """A CSV file with a header line; the separator is whichever of comma, semicolon and tab the header has most of.

    Cells may contain line breaks. Blank lines are skipped, Excel's first line `sep=;` is obeyed, and columns with
    neither a name nor cells are dropped.

    Raises:
        UsageError: with the line, for an unclosed quote, a duplicate column, or a row whose length differs from the
            header's.
    """
    return parse_table(read_text(path, what), f"{what} {path}".strip())


def parse_table(text: str, name: str) -> Table:
    """Like `read_table`, but from a text."""
    lines = _LINE_END.split(text, maxsplit=1)
    told = re.fullmatch(r"sep=(.)\s*", lines[0], re.IGNORECASE)
    skipped = 1 if told else 0
    body = (lines[1] if len(lines) > 1 else "") if told else text
    header_line = next((line for line in split_lines(body) if line.strip()), "")
    delimiter = told[1] if told else max(",\t;", key=re.sub(r'"[^"]*"', "", header_line).count)
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    table: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                table.append((begin + skipped, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{name} line {begin + skipped}: not CSV ({error}); close every quote, and double quotes inside a cell"
        ) from None
    if len(table) < 2:
        raise UsageError(f"{name} has no rows; expected a header line and rows below it")
    header = [cell.strip().lower() for cell in table[0][1]]
    for number, row in table[1:]:
        if len(row) != len(header):
            raise UsageError(f'{name} line {number}: {len(row)} cells under {len(header)} columns; quote lists: "1,2"')
    kept = [index for index in range(len(header)) if header[index] or any(row[index] for _, row in table[1:])]
    _check_header(name, table[0][0], [header[index] for index in kept])
    rows = tuple((number, {header[index]: row[index] for index in kept}) for number, row in table[1:])
    return Table(tuple(header[index] for index in kept), rows)


def _check_header(name: str, line: int, header: Sequence[str]) -> None:
    if "" in header:
        raise UsageError(f"{name} line {line}: column {header.index('') + 1} has cells but no name")
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise UsageError(f"{name} line {line}: column {twice!r} appears twice")
