"""Every code block of README and docs runs, or at least parses where it would fetch weights or tune for minutes."""

import json
import re
import shlex

import pytest

from stagevar.cli import command as stagevar_cli
from stagevar.models import registry
from stagevar.models.registry import load_model
from stagevar.testing.tiny import tiny_infinity
from tests import ROOT, links
from tests.fakes.serving import save_profile
from tuner.cli.command import verb_parser
from tuner.cli.tune import build_parser
from tuner.evalkit import command as eval_cli

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def with_blocks(*languages):
    found = [page for page in PAGES if blocks(page, *languages)]
    return pytest.mark.parametrize("page", found, ids=[page.name for page in found])


@pytest.fixture
def demo_run(tmp_path, monkeypatch):
    """A working directory in which outputs/demo/profile.yaml is a profile of nano."""
    nano = load_model("nano", device="cpu")
    folder = tmp_path / "outputs" / "demo"
    folder.mkdir(parents=True)
    save_profile(nano, folder / "profile.yaml", verified=False)
    monkeypatch.chdir(tmp_path)


@with_blocks("python")
def test_python_blocks_run(page, demo_run, monkeypatch):
    monkeypatch.setattr(registry, "SPECS", dict(registry.SPECS))
    names = {}
    for text in blocks(page, "python"):
        if "infinity-" in text:  # public weights cannot be had here: the arguments are checked, a tiny model stands in
            text = text.replace("from stagevar import load_model", "").replace(
                "from stagevar.models.convert import convert", ""
            )
            names |= {"load_model": checked_load, "convert": checked_convert}
        if "StageSchedule(" in text:
            from stagevar.schedule import StageSchedule

            names["StageSchedule"] = StageSchedule
        exec(compile(text, str(page), "exec"), names)


def checked_load(name, **options):
    registry.resolve(name, **options)
    return tiny_infinity()


def checked_convert(name, out, **options):
    import inspect

    from stagevar.models.convert import convert

    inspect.signature(convert).bind(name, out, **options)
    registry.find(name)


def commands():
    for page in PAGES:
        for text in blocks(page, "sh", "bash", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0].startswith("stagevar"):
                    yield pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", commands())
def test_shell_blocks_parse(words, monkeypatch):
    monkeypatch.setattr(
        "stagevar.cli.arguments._existing", lambda path, what: path
    )  # the files of examples are the reader's
    parsers = {"stagevar": stagevar_cli.build_parser, "stagevar-eval": eval_cli.build_parser}
    if words[0] in parsers:
        arguments = words[1:]
        if words[0] == "stagevar-eval" and arguments[0] not in eval_cli.VERBS:
            arguments = ["images", *arguments]  # the verb that need not be said
        parsers[words[0]]().parse(arguments)
    elif words[1].startswith("-"):
        build_parser().parse(words[1:])
    else:
        verb_parser(words[1]).parse(words[2:])


def test_json_blocks_are_json():
    for page in PAGES:
        for text in blocks(page, "json"):
            for line in [text] if text.lstrip().startswith(("{\n", "[")) else text.splitlines():
                if line.strip():
                    json.loads(line)


@pytest.mark.parametrize("page", links.pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert links.wrong(page, page.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "[x](docs/nowhere.md)",
        "[x](../outside.md)",
        "[x](docs/engine.md#no-such-heading)",
        "[x](#no-such-heading)",
        "![x](docs/images/none.png)",
        "[x](http://github.com/a/b)",
        "see https://gihtub.com/a/b.",
    ],
)
def test_a_wrong_link_is_seen(text):
    assert len(links.wrong(ROOT / "README.md", f"# Heading\n\n{text}\n")) == 1


def test_right_links_are_left_alone():
    text = "# A `b` c\n\n[x](#a-b-c) [x](docs/engine.md#8-bits) `[x](none.md)` https://github.com/a/b http://127.0.0.1:1/v1\n"
    assert links.wrong(ROOT / "README.md", text) == []


def test_files_that_pages_name_exist():
    for page in PAGES:
        for target in re.findall(
            r"`((?:docs|stagevar|tuner|tests|benchmarks|search_spaces|examples)/[\w/.-]+\.\w+)`", page.read_text()
        ):
            assert (ROOT / target).exists(), f"{page.name} names {target}"


def test_every_page_is_in_the_site_once():
    nav = re.findall(r"^ +- .*?(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(path.name for path in (ROOT / "docs").rglob("*.md"))
