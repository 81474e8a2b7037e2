"""Folders as systems make them: no home, empty variables, full disks, names that systems hide; weights by content."""

import errno
import os
import pwd
from pathlib import Path

import pytest
import torch

from stagevar import files, folders
from stagevar.errors import InfrastructureError, ProfileError, UsageError
from stagevar.models import hub
from stagevar.models.text_encoder import FeatureCache


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No variable that names a folder; a passwd entry with tmp_path as its home."""
    for name in ("STAGEVAR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    entry = type("Entry", (), {"pw_dir": str(tmp_path)})
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    return monkeypatch


def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "{tmp}/.cache/stagevar"),
        ({"HOME": "/h"}, "/h/.cache/stagevar"),
        ({"HOME": ""}, "{tmp}/.cache/stagevar"),
        ({"XDG_CACHE_HOME": ""}, "{tmp}/.cache/stagevar"),
        ({"XDG_CACHE_HOME": "here"}, "{tmp}/.cache/stagevar"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/stagevar"),
        ({"STAGEVAR_CACHE": "/s", "XDG_CACHE_HOME": "/x"}, "/s"),
        ({"STAGEVAR_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/stagevar"),
    ],
)
def test_the_cache_folder(bare, tmp_path, variables, expected):
    for name, value in variables.items():
        bare.setenv(name, value)
    assert folders.cache_dir() == Path(expected.format(tmp=tmp_path))


def test_without_a_home_nothing_is_kept_and_everything_works(bare, tmp_path):
    bare.setattr(pwd, "getpwuid", nobody)
    bare.chdir(tmp_path)
    assert folders.cache_dir() is None
    (tmp_path / "w.bin").write_bytes(b"one")
    assert hub.sha256_file("w.bin").startswith("7692c3ad")
    cache = FeatureCache("encoder")
    assert cache.get("a") is None
    cache.put("a", {"x": torch.ones(2)})
    assert torch.equal(cache.get("a")["x"], torch.ones(2))
    assert os.listdir(tmp_path) == ["w.bin"]


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', "null", "[" * 100_000])
def test_a_damaged_book_of_hashes_is_read_over(monkeypatch, tmp_path, content):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path))
    (tmp_path / "sha256.json").write_text(content)
    (tmp_path / "w.bin").write_bytes(b"one")
    assert hub.sha256_file(tmp_path / "w.bin").startswith("7692c3ad")
    assert hub.sha256_file(tmp_path / "w.bin").startswith("7692c3ad")


def test_hidden_names_are_left_out():
    names = [Path(name) for name in ("a.png", ".DS_Store", "._a.png", ".ipynb_checkpoints", "b.png")]
    assert list(folders.visible(names)) == [Path("a.png"), Path("b.png")]


# ------------------------------------------------------------------------------------------------ writing


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    files.write_text_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_text_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]
    line = files.write_error(None, caught.value)
    assert isinstance(line, InfrastructureError) and "No space left; free some space" in str(line)


def test_links_devices_and_long_names_are_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    files.write_text_atomically(tmp_path / "link.txt", "x")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real" / "a.txt").read_text() == "x"
    files.write_text_atomically("/dev/null", "x")
    assert not os.path.isfile("/dev/null")
    long = tmp_path / ("x" * 251 + ".txt")
    files.write_text_atomically(long, "y")
    assert long.read_text() == "y"
    files.write_text_atomically(tmp_path / "s.txt", "half \ud83d")
    assert (tmp_path / "s.txt").read_text() == "half ?"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "not a valid file name"),
        ("a\0b", "not a valid file name"),
        ("folder", "is a folder"),
        ("new/", "is a folder"),
        ("missing/a.json", "does not exist or cannot be written"),
        ("file/a.json", "does not exist or cannot be written"),
        ("x" * 300 + ".json", "File name too long"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = f"{tmp_path}/{name}" if name else name
    with pytest.raises(UsageError, match=reason) as caught:
        files.check_output(path, "--out")
    assert str(caught.value).startswith("--out ") and len(str(caught.value)) < 500
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_outputs_that_can_be_written_are_left_untouched(tmp_path):
    (tmp_path / "old.json").write_text("kept")
    for name in ("old.json", "new.json"):
        assert files.check_output(tmp_path / name) == tmp_path / name
    assert files.check_output("/dev/null") == Path("/dev/null")
    assert (tmp_path / "old.json").read_text() == "kept" and os.listdir(tmp_path) == ["old.json"]
    assert files.check_output(tmp_path / "a" / "b.json", make_folder=True) and (tmp_path / "a").is_dir()
    files.check_output_folder(tmp_path / "deep" / "new")
    assert not (tmp_path / "deep").exists()
    for bad in (tmp_path / "old.json", tmp_path / "old.json" / "x", tmp_path / ("y" * 300), ""):
        with pytest.raises(UsageError):
            files.check_output_folder(bad)


# ------------------------------------------------------------------------------------------------ weights by content


class Loaded:
    def __init__(self, parts, every=()):
        self.provenance = {"weights": parts, "weight_files": list(every)}


def check(recorded, loaded):
    from types import SimpleNamespace

    from stagevar.profile import Profile

    Profile._check_weights(SimpleNamespace(model=SimpleNamespace(weights=recorded)), loaded)


def test_weights_are_compared_part_by_part_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEVAR_CACHE", str(tmp_path / "cache"))
    here = Loaded({"transformer": "aa", "tokenizer": "bb"}, ["aa", "bb"])
    check({"transformer": "aa", "tokenizer": "bb"}, here)
    # Profiles of before name files: another name for the same bytes is the same weights.
    check({"infinity_2b_reg.pth": "aa", "vae.pth": "bb"}, here)
    for other in ({"transformer": "bb"}, {"tokenizer": "aa"}, {"transformer": "cc"}, {"old.pth": "cc"}):
        with pytest.raises(ProfileError, match="made with other weights"):
            check(other, here)
    for name, content in (("a.bin", b"1"), ("b.bin", b"2")):
        (tmp_path / name).write_bytes(content)
    shards = hub.sha256_part([tmp_path / "a.bin", tmp_path / "b.bin"])
    (tmp_path / "a.bin").rename(tmp_path / "z.bin")
    assert hub.sha256_part([tmp_path / "b.bin", tmp_path / "z.bin"]) == shards
    assert hub.sha256_part([tmp_path / "b.bin"]) == hub.sha256_file(tmp_path / "b.bin") != shards


def test_two_parts_with_the_same_file_name_have_two_hashes(tmp_path):
    """The layout of diffusers: transformer/ and vae/, each with diffusion_pytorch_model.safetensors."""
    from safetensors.torch import save_file

    from stagevar import load_model

    model = load_model("infinity-tiny", weights="random")
    for part, module in (("transformer", model.transformer), ("vae", model.tokenizer)):
        (tmp_path / part).mkdir()
        state = {key: value.contiguous().clone() for key, value in module.state_dict().items()}
        save_file(state, tmp_path / part / "diffusion_pytorch_model.safetensors")
    loaded = load_model("infinity-tiny", weights=tmp_path / "transformer", tokenizer=tmp_path / "vae")
    parts = loaded.provenance["weights"]
    assert parts.keys() == {"transformer", "tokenizer"} and len(set(parts.values())) == 2
