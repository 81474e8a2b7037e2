"""Where a study's prompts come from: named sources on the command line and in a space."""

import contextlib
from collections import Counter

import pytest

from stagevar.errors import UsageError
from tuner.cli.plan import with_prompts
from tuner.config.prompts import load_prompts, set_sizes, warn_of_short_files
from tuner.config.space import PromptSource
from tuner.config.space_file import load_space, parse_space

GENEVAL = PromptSource("geneval", search=60, heldout=240, micro_batch=8)


def test_geneval_prompts_are_distinct_balanced_and_seeded():
    sets = load_prompts(GENEVAL, seed=3)
    search, heldout = sets["search"], sets["heldout"]
    assert (len(search), len(heldout)) == (60, 240)
    assert not set(search.texts) & set(heldout.texts) and len({*search.texts, *heldout.texts}) == 300
    for part, each in ((search, 10), (heldout, 40)):
        assert set(Counter(item["tag"] for item in part.items).values()) == {each}
    assert load_prompts(GENEVAL, seed=3)["heldout"].digest == heldout.digest
    assert load_prompts(GENEVAL, seed=4)["heldout"].digest != heldout.digest


def test_the_rare_task_is_spread_over_a_large_held_out_set():
    """COCO has 80 single objects; past them the others go on, and every stretch keeps the whole's proportions."""
    items = load_prompts(PromptSource("geneval", 64, 936, 8))["heldout"].items
    firsts = [sum(item["tag"] == "single_object" for item in items[i : i + 312]) for i in (0, 312, 624)]
    assert max(firsts) - min(firsts) <= 1 and sum(firsts) > 70


@pytest.mark.parametrize(
    ("text", "source", "search"),
    [
        ("geneval", "geneval", 64),
        ("geneval:128", "geneval", 128),
        ("imagenet:10", "imagenet", 10),
        ("nano", "nano", 64),
        ("32", "nano", 32),
    ],
)
def test_prompts_on_the_command_line(text, source, search):
    prompts = with_prompts(load_space("nano"), text, None).prompts
    assert (prompts.source, prompts.search, prompts.heldout) == (source, search, 1536)


@pytest.mark.parametrize(
    "text", ["geneval:", "geneval:0", "geneval:many", "geneval:-3", "geneval:1:2", "genevall", "²"]
)
def test_prompts_that_are_none_are_one_line(text):
    with pytest.raises(UsageError) as caught:
        with_prompts(load_space("nano"), text, None)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_may_have_a_sources_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "geneval").write_text("a cat\n")
    assert with_prompts(load_space("nano"), "./geneval", None).prompts.source == "./geneval"


def test_a_space_names_geneval():
    data = {"model": "nano", "objectives": {"latency": "ms", "quality": {"clip_score": 1.0}},
            "parameters": {"structure_end": {"low": 1, "high": 2}}, "prompts": {"source": "geneval"}}  # fmt: skip
    assert parse_space(data).prompts.source == "geneval"


@pytest.mark.parametrize(
    ("lines", "sizes"), [(24, (12, 12)), (65, (32, 33)), (2, (1, 1)), (200, (64, 136)), (3000, (64, 1024))]
)
def test_a_short_file_makes_both_sets_smaller(tmp_path, lines, sizes):
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(lines)))
    source = PromptSource(str(tmp_path / "p.txt"), 64, 1024, 8)
    said = pytest.warns(UserWarning, match=f"holds {lines} prompts: {sizes[0]} for the search, {sizes[1]} held")
    with said if sizes[0] < 64 else contextlib.nullcontext():
        warn_of_short_files(source)
    sets = load_prompts(source)
    assert (len(sets["search"]), len(sets["heldout"])) == set_sizes(source) == sizes
    assert not set(sets["search"].texts) & set(sets["heldout"].texts)


def test_one_prompt_is_no_study(tmp_path):
    (tmp_path / "p.txt").write_text("the same\nthe same\n")
    for ask in (load_prompts, set_sizes):
        with pytest.raises(UsageError, match=r"holds 1 prompt; add more"):
            ask(PromptSource(str(tmp_path / "p.txt"), 64, 64, 8))
