"""YAML that reads otherwise than it looks is refused with its line; everything else is read as PyYAML reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stagevar.errors import ProfileError
from stagevar.yaml_files import parse_yaml, read_yaml

SPACES = sorted(Path("search_spaces").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' appears twice, first on line 1"),
        ("x:\n  a: 1\n  'a': 2\n", "line 3: key 'a' appears twice, first on line 2"),
        ("x: {a: 1, a: 1}\n", "line 1: key 'a' appears twice"),
        ("- b: 1\n- a: 1\n  a: 2\n", "line 3: key 'a'"),
        ("1: a\n1: b\n", "key 1 appears twice"),
        ("a: 1\nsearch: 016\n", "line 2: '016' is read as a different number"),
        ("search: 1:20\n", "'1:20' is read as a different number"),
        ("search: 0x10\n", "'0x10'"),
        ("search: 0b11\n", "'0b11'"),
        ("search: 1_000\n", "'1_000'"),
        ("rate: 1:20.5\n", "'1:20.5'"),
        ("rate: 1_0.5\n", "'1_0.5'"),
        ("rate: -00.5e+3\n", None),
        ("a:\n  b: no\n", "line 2: 'no' is read as true or false"),
        ("a: Yes\n", "'Yes'"),
        ("a: [on, off]\n", "'on'"),
        ("a: 2026-01-02\n", "'2026-01-02' is read as a date"),
        ("a: 2026-01-02T10:00:00Z\n", "is read as a date"),
        ("base: &b {x: 1}\nc: *b\n", "line 2: aliases are not allowed"),
        ("c: {<<: {x: 1}, y: 2}\n", "merge keys"),
        ("? [a]\n: 1\n", "cannot be a key"),
        ("a: 1\nb:\n\t- 2\n", "line 3: found character"),
        ("a: [1\nb: 2\n", "line 2: "),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("a: !!python/name:os.system x\n", "line 1: could not determine"),
        ("a: !!set x\n", "line 1: "),
    ],
)
def test_surprises_are_refused_with_their_line(text, message):
    if message is None:
        assert isinstance(parse_yaml(text, "space")["rate"], float)
        return
    with pytest.raises(ProfileError) as caught:
        parse_yaml(text, "space s.yaml")
    assert str(caught.value).startswith("space s.yaml is not plain YAML: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_looks_like_what_it_is_is_read():
    text = (
        "a: [1, -2, +3, 0, 0.5, 1.5e-3, .5, 1., .inf, -.inf]\nb: [true, False]\nc: [~, null, ]\n"
        "d: ['no', \"016\", '2026-01-02', 1e3, never, 5e-2, 12:34x]\n"
    )
    assert parse_yaml(text, "") == yaml.safe_load(text)
    assert parse_yaml("a: 1e3", "")["a"] == "1e3"  # text in YAML 1.1, which PyYAML follows
    assert parse_yaml("a: !!str 016", "")["a"] == "016"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None, max_examples=200)
@given(plain)
def test_whatever_this_program_writes_it_reads(value):
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    assert parse_yaml(text, "") == yaml.safe_load(text)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_shipped_spaces_have_no_surprises(path):
    assert read_yaml(path, "search space") == yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("﻿a: 1\r\n".encode(), None),
        ("a: 1\n".encode("utf-16"), None),
        (b"a: \xe9\n", "line 1: byte 0xe9 is not UTF-8"),
        (b"a: 1\n\0", "line 2 has a zero byte"),
        (b"a: " + b"x" * 1_100_000, "larger than"),
    ],
)
def test_files_are_decoded_as_every_text_file(tmp_path, data, message):
    path = tmp_path / "space.yaml"
    path.write_bytes(data)
    if message is None:
        assert read_yaml(path, "search space") == {"a": 1}
        return
    with pytest.raises(ProfileError, match=message):
        read_yaml(path, "search space")
    for absent in (tmp_path / "none.yaml", tmp_path, "a\0b"):
        with pytest.raises(ProfileError, match=r"search space .* cannot be read"):
            read_yaml(absent, "search space")
