"""Prompt files: the one place that knows what they may look like, for tuning, analysis and evaluation alike.

Kinds, by content first and suffix second, in any case:

* JSON lines (.jsonl, .ndjson): GenEval metadata, objects with a text under "prompt", or bare strings, one per line;
* JSON (.json): a list of the same, alone or under "prompts";
* CSV (.csv, .tsv): a header with a column `prompt`; other columns stay with the prompt;
* text (.txt, and whatever has no other kind): one prompt per line;
* a folder of .txt files: one prompt per file, the file's name as its "item_id" (DPG-Bench).

Space around a prompt is dropped; the text itself is unchanged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagevar.errors import UsageError, nearest
from stagevar.prompts.geneval import check_metadata
from stagevar.text_files import parse_json_values, parse_table, read_text, split_lines

KINDS = ".txt (one prompt per line), .jsonl, .json, .csv with a column prompt"
_JSON, _CSV = (".jsonl", ".ndjson", ".jsonlines", ".json"), (".csv", ".tsv", ".tab")
#: Text of a kind that is never a list of prompts, so that its lines are not taken for some.
_OTHERS = (".yaml", ".yml", ".toml", ".xml", ".html", ".htm", ".ipynb", ".py", ".rtf")
#: Text that begins like intended JSON: an object, or a list of objects or strings on its first lines.
_LOOKS_LIKE_JSON = re.compile(r'\s*(?:\{\s*"|\[\s*(?:\{\s*"|"(?:[^"\\]|\\.)*"\s*[,\]]))')


@dataclass(frozen=True)
class PromptEntry:
    """One prompt of a file.

    Attributes:
        text: the caption.
        fields: what else the file says about it.
        line: where it is, counted from 1; in a folder, which file it is.
    """

    text: str
    fields: Mapping[str, object]
    line: int

    @property
    def metadata(self) -> dict[str, object]:
        """The fields with the caption under "prompt"."""
        return {**self.fields, "prompt": self.text}


def read_prompt_file(path: str | os.PathLike[str]) -> list[PromptEntry]:
    """Prompts in file order, including duplicates.

    Raises:
        UsageError: with the line, for a file that cannot be read, holds no prompt, or has an invalid entry. GenEval
            metadata (entries with `include`) must be judgeable.
    """
    path = Path(path)
    name = f"prompts {path}"
    entries = _of_folder(path) if path.is_dir() else list(_entries(path, read_text(path, "prompts"), name))
    if not entries:
        raise UsageError(f"{name} holds no prompt; expected {KINDS}")
    for entry in entries:
        _check(entry, name)
    return entries


def _entries(path: Path, text: str, name: str) -> Iterator[PromptEntry]:
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise UsageError(f"{name}: {suffix} is not a supported type of prompt file; use {KINDS}")
    if suffix in _JSON or (suffix not in _CSV and _LOOKS_LIKE_JSON.match(text)):
        yield from _of_json(parse_json_values(text, name), name)
    elif suffix in _CSV:
        yield from _of_table(text, name)
    else:
        for number, line in enumerate(split_lines(text), start=1):
            if line.strip():
                yield PromptEntry(line.strip(), {}, number)


def _of_json(values: Sequence[tuple[int, Any]], name: str) -> Iterator[PromptEntry]:
    if len(values) == 1 and isinstance(values[0][1], Mapping) and isinstance(values[0][1].get("prompts"), list):
        values = [(values[0][0], item) for item in values[0][1]["prompts"]]
    for number, value in values:
        if isinstance(value, str):
            yield PromptEntry(value.strip(), {}, number)
        elif isinstance(value, Mapping) and isinstance(value.get("prompt"), str):
            yield PromptEntry(
                value["prompt"].strip(), {key: item for key, item in value.items() if key != "prompt"}, number
            )
        else:
            keys = f" (keys: {', '.join(list(value)[:6])})" if isinstance(value, Mapping) else ""
            raise UsageError(f"{name} line {number} has no text under 'prompt'{keys}")


def _of_table(text: str, name: str) -> Iterator[PromptEntry]:
    if not text.strip():
        return
    table = parse_table(text, name)
    if "prompt" not in table.columns:
        raise UsageError(
            f"{name} has no column 'prompt' (columns: {', '.join(table.columns)[:80]}); give it that name in the first "
            "line, or give a .txt with one prompt per line"
        )
    for number, row in table.rows:
        fields = {column: cell.strip() for column, cell in row.items() if column != "prompt" and cell.strip()}
        yield PromptEntry(row["prompt"].strip(), fields, number)


def _of_folder(path: Path) -> list[PromptEntry]:
    files = [file for file in path.iterdir() if file.suffix.lower() == ".txt" and file.is_file()]
    files = sorted((file for file in files if not file.name.startswith(".")), key=lambda file: natural_key(file.stem))
    entries = []
    for number, file in enumerate(files, start=1):
        entries.append(PromptEntry(read_text(file, "prompts").strip(), {"item_id": file.stem}, number))
        if not entries[-1].text:
            raise UsageError(f"prompts {file} is empty")
    return entries


def _check(entry: PromptEntry, name: str) -> None:
    where = f"{name} line {entry.line}"
    if not entry.text:
        raise UsageError(f"{where}: the prompt is empty")
    try:
        entry.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: {entry.text[error.start]!a} is half a character; write the whole character"
        ) from None
    if "include" not in entry.fields:
        near = nearest("include", [key.lower() for key in entry.fields], 0.8)
        if "tag" in entry.fields and near is not None:
            raise UsageError(f"{where}: unknown key {near!r}; GenEval's is 'include'")
        return
    try:
        check_metadata(entry.metadata)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorting key under which numbers in names count as numbers: x-2 before x-10; equal ones by their spelling."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, so that like is compared with like
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name
