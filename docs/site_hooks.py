"""Hooks of the documentation site: links to files beside docs/ are shown as paths, JSON Schemas are published."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = (
    "stagevar/data/profile.schema.json",
    "search_spaces/search_space.schema.json",
    "search_spaces/sweep.schema.json",
)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_files(files, config):
    """Adds the schemas under schemas/."""
    for name in SCHEMAS:
        files.append(File.generated(config, f"schemas/{Path(name).name}", content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown, **_):
    """A link to a file beside docs/ works in a repository and has no page here: its text and its path remain."""
    return _OUTSIDE.sub(r"\1 (`\2`)", markdown)
