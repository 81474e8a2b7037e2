"""What a visitor reads first says the same as the code: versions, targets, workflows, files that are named."""

import re
from pathlib import Path

import yaml

from stagevar import __version__
from stagevar.errors import EXIT_CODES
from tests import ROOT


def read(name):
    return (ROOT / name).read_text()


def test_changelog_and_citation_are_of_this_version():
    assert re.findall(r"^## \[(\S+)\]", read("CHANGELOG.md"), re.MULTILINE)[0] == __version__
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == __version__
    numbers = {number for entry in citation["references"] for number in re.findall(r"\d{4}\.\d{5}", entry["notes"])}
    named = {"stagevar": "2512.16483", "fastvar": "2503.23367", "skipvar": "2506.08908"}
    for accelerator, number in named.items():
        assert number in numbers and number in read(f"stagevar/accelerators/{accelerator}.py")


def test_make_help_lists_every_target():
    makefile = read("Makefile")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    helped = re.findall(r"^\t@echo 'make (\w+) ", makefile, re.MULTILINE)
    assert sorted(phony) == sorted([*helped, "help"])


def test_make_check_runs_rooms_that_exist_and_starts_no_process():
    rooms = re.search(r"^CHECK := ((?:.*\\\n)*.*)$", read("Makefile"), re.MULTILINE)[1].replace("\\\n", " ").split()
    files = [path for room in rooms for path in (ROOT / "tests" / room).glob("test_*.py")]
    assert len(files) > 20 and all((ROOT / room).is_dir() for room in rooms)
    for path in files:
        source = path.read_text()
        starts = re.search(r"subprocess\.|multiprocessing\.|run_without\(|import ray|ray_cluster", source)
        assert not starts or "@pytest.mark.process" in source, f"{path.name}: mark what starts a process"


def test_workflows_and_templates_are_yaml_and_call_what_exists():
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) >= 7
    targets = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)[1].split()
    for file in files:
        text = file.read_text()
        assert yaml.safe_load(text), file
        assert set(re.findall(r"run: make (\w+)", text)) <= set(targets), file
        for script in re.findall(r"run: (\.ci/\S+)|-f (\S+Dockerfile)", text):
            assert (ROOT / (script[0] or script[1])).is_file(), f"{file} names {script}"


def test_images_copy_only_what_is_there_and_is_sent():
    sent = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    for file in (ROOT / "docker").glob("*.Dockerfile"):
        copied = [
            word for line in re.findall(r"^COPY (.*) \S+$", file.read_text(), re.MULTILINE) for word in line.split()
        ]
        assert copied and set(copied) <= sent, file.name
        assert all((ROOT / word).exists() for word in copied)


def test_assistants_are_told_of_exit_codes_that_exist():
    codes = {int(code) for code in re.findall(r"(?:exit code|answer\*\*;.*?|, )(\d) ", read("AGENTS.md"), re.DOTALL)}
    assert codes and codes <= set(EXIT_CODES)


def test_contributing_names_folders_that_exist():
    for folder in re.findall(r"^\| `(\w+/)`", read("CONTRIBUTING.md"), re.MULTILINE):
        assert Path(ROOT / folder).is_dir(), folder
    rooms = re.search(r"the search: (.*?) \|", read("CONTRIBUTING.md"))[1]
    for room in re.findall(r"`(\w+)`", rooms):
        assert (ROOT / "tuner" / room).is_dir(), room
