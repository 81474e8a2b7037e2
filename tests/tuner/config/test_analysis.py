"""--analysis: what `stagevar analyze` wrote becomes boundaries, searched shares and first proposals of the study."""

import json

import pytest
import yaml

from stagevar.analysis import analyze
from stagevar.errors import UsageError
from stagevar.models.registry import scale_grids
from stagevar.schedule import StageSchedule
from stagevar.testing.tiny import tiny_infinity
from tuner.cli import main
from tuner.config.analysis import read_analysis
from tuner.config.space_file import load_space

GRIDS = scale_grids("infinity-tiny")
SIDES = [str(h) for h, _ in GRIDS]
CHUNKS = 8


def analysis_folder(folder, **changes):
    """A folder as `stagevar analyze --model infinity-tiny` leaves it."""
    proposal = StageSchedule(5, 4, cfg_delay=0, branch="cond", rank_ratios=((0.3,) * CHUNKS, (0.2,) * CHUNKS))
    data = {
        "schema": 1, "kind": "stagevar-analysis", "model": "infinity-tiny", "weights": "a1b2",
        "scales": [list(grid) for grid in GRIDS], "chunks": CHUNKS, "proposal": proposal.to_dict(),
    }  # fmt: skip
    table = {e: {side: [share] * CHUNKS for side in SIDES} for e, share in (("0.96", 0.42), ("0.70", 0.123))}
    folder.mkdir(exist_ok=True)
    (folder / "analysis.yaml").write_text(yaml.safe_dump({**data, **changes}))
    (folder / "rank_ratio.json").write_text(json.dumps({"ratio": table}))
    return folder


def test_boundaries_shares_and_proposals_come_from_the_analysis(tmp_path):
    findings = read_analysis(analysis_folder(tmp_path / "a"))
    space = load_space("infinity-tiny", findings=findings)
    default = load_space("infinity-tiny")
    assert space.semantic_end == 4 and space.parameters[0].to_data() == {"low": 4, "high": 6}
    searched = {p.name: p for p in space.parameters}["rank_ratio"].values
    assert {0.3, 0.42, 0.123} <= set(searched) and set(searched) >= {0.05, 0.1, 0.177, 1.0}
    assert space.known == ("analysis", "analysis-0.96", "analysis-0.70", *default.enqueue)
    ranked = space.known_schedule("analysis-0.96", GRIDS)
    assert ranked.rank_ratios == ((0.42,) * CHUNKS,) * 2 and ranked.branch == "cond" and ranked.structure_end == 5
    expanded = {space.known_schedule(name, GRIDS).expand(GRIDS, CHUNKS) for name in space.known}
    assert len(expanded) == len(space.known)
    # The sampler files the proposal at its own share.
    assert space.nearest_values(space.known_schedule("analysis", GRIDS), GRIDS)["rank_ratio"] == 0.3


def test_a_file_goes_before_the_analysis(tmp_path):
    findings = read_analysis(analysis_folder(tmp_path / "a"))
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"model": "infinity-tiny", "parameters": {"structure_end": [5]}}))
    space = load_space("infinity-tiny", file, findings=findings)
    assert [p.name for p in space.parameters] == ["structure_end"] and space.known[0] == "analysis"


def test_what_analyze_saves_is_read(tmp_path):
    model = tiny_infinity()
    found = analyze(model, ["a cat", "a dog"], [0, 1], rank_prompts=2, ablation_prompts=0)
    found.save(tmp_path)
    findings = read_analysis(tmp_path / "analysis.yaml")
    assert findings.proposal == found.proposal and findings.grids == tuple(model.grids)
    assert {"analysis", "analysis-0.96", "analysis-0.85", "analysis-0.70"} == set(findings.proposals())


WORDS = ["--model", "infinity-tiny", "--budget", "80%", "--dry-run", "--json"]


def test_the_plan_shows_it_and_the_command_finds_it_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    analysis_folder(tmp_path / "a")
    assert main([*WORDS, "--analysis", "a"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["enqueued"][:3] == ["the full schedule", "analysis", "analysis-0.96"]
    assert plan["space"]["semantic_end"] == 4 and plan["space"]["proposals"]["analysis"]["structure_end"] == 5
    # What is printed reads back as a file, proposals included.
    said = {section: value for section, value in plan["space"].items() if section != "source"}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    findings = read_analysis("a")
    assert load_space("infinity-tiny", tmp_path / "space.yaml") == load_space("infinity-tiny", findings=findings)

    from tuner.cli.plan import plan as checked
    from tuner.cli.tune import build_parser

    words = [*WORDS, "--analysis", "a"]
    assert f"--analysis {tmp_path / 'a'}" in checked(build_parser().parse(words), words).command


@pytest.mark.parametrize(
    ("words", "changes", "says"),
    [
        ([], {"model": "var-tiny"}, "is of model 'var-tiny', not 'infinity-tiny'"),
        ([], {"weights": "random"}, "is of random weights"),
        (["--resolution", "512"], {}, "has 7 scales of side 1 2 4 6 8 12 16, but infinity-tiny has 10 scales"),
        ([], {"kind": "profile"}, "is not an analysis.yaml"),
        ([], {"schema": 7}, "schema 7, not 1"),
        ([], {"scales": "many"}, "scales 'many' must be at least two pairs"),
        ([], {"scales": [[1, 1], [0, 2]]}, "must be at least two pairs"),
        ([], {"chunks": "8"}, "chunks '8'"),
        ([], {"proposal": [1]}, "proposal: a schedule must be a mapping"),
        ([], {"proposal": {"structure_end": 99}}, "proposal: structure_end 99"),
        ([], {"proposal": {"structure_edn": 5}}, "did you mean structure_end"),
    ],
)
def test_an_analysis_of_something_else_is_one_line(tmp_path, capsys, words, changes, says):
    analysis_folder(tmp_path / "a", **changes)
    assert main([*WORDS, "--analysis", str(tmp_path / "a"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error, error


@pytest.mark.parametrize(
    "table",
    ["{", "[]", '{"ratio": []}', '{"ratio": {"0.96": {"16": [0.5]}}}', '{"ratio": {"0.96": {"1": ["a"]}}}', "\0"],
)
def test_a_damaged_table_is_one_line(tmp_path, table):
    folder = analysis_folder(tmp_path / "a")
    (folder / "rank_ratio.json").write_text(table)
    with pytest.raises(UsageError) as caught:
        read_analysis(folder)
    assert "rank_ratio.json" in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_table_the_proposal_alone_is_taken(tmp_path):
    folder = analysis_folder(tmp_path / "a")
    (folder / "rank_ratio.json").unlink()
    assert list(read_analysis(folder).proposals()) == ["analysis"]
    with pytest.raises(UsageError, match="cannot be read"):
        read_analysis(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("proposals", "says"),
    [
        ("fast", "must be schedules by name"),
        ({"stagevar-paper": {"structure_end": 3}}, "must have a name of its own"),
        ({"mine": {"structure_end": "x"}}, "proposal mine"),
        ({"mine": 3}, "proposal mine"),
        ({"mine": {"structure_end": 12}}, "proposal mine begins at scale 12"),
    ],
)
def test_proposals_of_a_file_are_checked(tmp_path, proposals, says):
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"model": "infinity-tiny", "proposals": proposals}))
    with pytest.raises(UsageError) as caught:
        load_space("infinity-tiny", file)
    assert says in str(caught.value)


def test_a_study_evaluates_proposals_before_presets_and_knows_them_when_resumed(tmp_path):
    from tests.fakes.studies import study

    mine = StageSchedule(4, 2, cfg_delay=0, rank_ratios=((0.3, 0.4, 0.5), (0.2, 0.2, 0.2)))
    space = {"proposals": {"analysis": mine.to_dict()}}
    result = study(tmp_path, space=space, trials=3).run()
    proposed = [c for c in result.candidates if c.source == "enqueued: analysis"]
    assert len(proposed) == 1 and StageSchedule.from_dict(proposed[0].schedule) == mine
    assert proposed[0].trial == min(c.trial for c in result.candidates if c.trial is not None)
    with pytest.raises(UsageError, match=r"space\.proposals"):
        study(tmp_path, trials=3).check_identity()
    study(tmp_path, space=space, trials=3).check_identity()
