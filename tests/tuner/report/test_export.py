"""profile.yaml, pareto.yaml and trials.csv say what the study found, and nothing that it did not prove."""

import csv
import dataclasses
import io
import os

import pytest
import yaml

from stagevar.card_state import CardState
from stagevar.errors import UsageError
from stagevar.profile import Profile, steps_to_data
from stagevar.profile.sections import CardSection, QualitySection
from tests.fakes.sample_study import KINDS, make
from tuner.report.export import export, profile_of
from tuner.report.page import _timing_line
from tuner.report.sections.run import _engine_facts
from tuner.results.candidate import Measured
from tuner.study.finalist_times import latency_stats


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {kind: (make(kind, root / kind), root / kind) for kind in KINDS}


def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.parametrize("kind", KINDS)
def test_every_outcome_exports(runs, kind):
    result, directory = runs[kind]
    names = [path.name for path in export(result, directory)]
    assert names[-2:] == ["pareto.yaml", "trials.csv"]
    assert ("profile.yaml" in names) == (result.pick is not None) == (directory / "profile.yaml").exists()


def test_profile_holds_the_pick_as_the_runtime_expands_it(runs):
    result, directory = runs["full"]
    export(result, directory)
    profile = Profile.load(directory / "profile.yaml")
    pick = result.pick
    assert profile.schedule.to_dict() == pick.schedule
    assert profile.steps == steps_to_data(profile.schedule.expand(result.grids, result.chunks))
    assert profile.verified
    assert profile.reproduce == result.command
    assert profile.latency.ms == pytest.approx(pick.verification.latency.drift_corrected_ms, rel=1e-5)
    ratio = pick.verification.latency.ratio
    assert list(profile.baseline.speedup.interval) == pytest.approx([1 / ratio.high, 1 / ratio.low], rel=1e-5)
    difference = pick.verification.differences["quality"]
    stored = profile.quality.difference_from_full["quality"]
    assert (stored.mean, stored.n) == (pytest.approx(difference.mean, rel=1e-5), difference.n)
    assert profile.quality.prompt_set == "held-out prompts"
    assert [v.name for v in profile.constraints.verdicts] == ["latency", "drop:checker"]
    assert profile.envelope.device == "cpu" and profile.envelope.threads == 1 and profile.envelope.torch == "2.15.0"


def test_gpu_profiles_name_the_gpu_and_no_threads(runs):
    result, _ = runs["full"]
    device = {"name": "NVIDIA X", "kind": "cuda", "dtype": "bfloat16"}
    envelope = profile_of(dataclasses.replace(result, device=device), result.pick).envelope
    assert (envelope.device, envelope.threads, envelope.dtype) == ("NVIDIA X", None, "bfloat16")


STATE = CardState("580.1", 1980, 2619, 61, 650.0, 700.0, ("power cap",), 0, False)


def test_what_the_card_did_is_in_the_record_the_envelope_and_the_report(runs):
    result, _ = runs["full"]
    cool = dataclasses.replace(STATE, temperature_c=40, throttles=())
    stats = latency_stats([80.0] * 9, [100.0] * 9, 100.0, 3, True, ("throttled: power cap",), (cool, STATE))
    pick = dataclasses.replace(result.pick, verification=dataclasses.replace(result.pick.verification, latency=stats))
    others = tuple(pick if c.key == pick.key else c for c in result.candidates)
    throttled = dataclasses.replace(result, candidates=others)
    assert type(result).from_json(throttled.to_json()) == throttled
    assert '"card"' not in result.to_json(), "a CPU has none"
    profile = profile_of(throttled, pick)
    assert profile.envelope.card == CardSection("580.1", 700.0, False, 1980, 2619, 61)
    assert profile.latency.disturbed == ("throttled: power cap",)
    mark, line = _timing_line(stats)
    assert mark == "no" and "disturbed, even when timed again (throttled: power cap)" in line
    assert profile_of(result, result.pick).envelope.card is None


def test_profiles_name_the_engine_that_drew_the_judged_images(runs, tmp_path):
    result, _ = runs["full"]
    on_graphs = dataclasses.replace(result, engine="graph", heldout_engine="graph")
    profile_of(on_graphs, result.pick).save(tmp_path / "profile.yaml")
    assert Profile.load(tmp_path / "profile.yaml").quality.engine == "graph"
    searched = result.pick.becomes(Measured)
    assert profile_of(on_graphs, searched).quality.engine == "eager", "search images are drawn eagerly"
    assert profile_of(result, result.pick).quality.engine is None, "a result of before does not say"
    assert type(result).from_json(on_graphs.to_json()) == on_graphs and "heldout_engine" not in result.to_json()
    assert ("held-out images drawn by", "engine graph") in _engine_facts(on_graphs)


def test_unproved_picks_are_not_called_verified(runs):
    result, _ = runs["one_trial"]
    assert not profile_of(result, result.pick).verified
    full, _ = runs["full"]
    unchecked = full.pick.becomes(Measured)
    profile = profile_of(full, unchecked)
    assert not profile.verified and not profile.constraints.proved
    assert profile.quality.prompt_set == "search prompts"


def test_profiles_name_the_text_encoder_but_not_its_folder(runs):
    result, _ = runs["full"]
    record = {"path": "/somewhere/text", "sha256": {"model.safetensors": "00"}}
    read = dataclasses.replace(result, provenance={**result.provenance, "text": record})
    assert profile_of(read, result.pick).to_dict()["model"]["text"] == {"sha256": record["sha256"]}
    assert profile_of(result, result.pick).model.text is None


def test_random_weights_leave_no_quality_figure(runs):
    result, directory = runs["latency_only"]
    export(result, directory)
    profile = Profile.load(directory / "profile.yaml")
    assert profile.quality == QualitySection(measured=False, why="random weights")
    assert profile.model.random_weights and not profile.verified


def test_a_stale_profile_is_removed_when_nothing_is_picked(runs):
    result, directory = runs["infeasible"]
    (directory / "profile.yaml").write_text("left by an earlier, looser budget")
    export(result, directory)
    assert not (directory / "profile.yaml").exists()


def test_pareto_lists_front_and_picks_with_their_schedules(runs):
    result, directory = runs["full"]
    export(result, directory)
    data = yaml.safe_load((directory / "pareto.yaml").read_text())
    assert data["front"] == list(result.front)
    assert data["picks"] == result.picks
    assert set(data["members"]) == {*result.front, *result.picks.values()}
    latencies = [data["members"][key]["latency"]["ms"] for key in data["front"] if key not in result.picks.values()]
    assert latencies == sorted(latencies)
    for key, member in data["members"].items():
        assert member["schedule"] == result.candidate(key).schedule
        assert member["verified"] == (key in (*result.picks.values(), result.baseline.key)) or not member["verified"]


def test_trials_table_reads_back(runs):
    result, directory = runs["full"]
    export(result, directory)
    table = rows(directory / "trials.csv")
    assert [row["key"] for row in table] == [result.baseline.key, *(c.key for c in result.candidates)]
    assert table[0]["trial"] == "" and table[1]["trial"] == "0"
    by_key = {row["key"]: row for row in table}
    pick = by_key[result.picks["pick"]]
    assert pick["picks"] == "pick balanced" and pick["verified"] == "verified"
    for candidate in result.candidates:
        row = by_key[candidate.key]
        assert row["state"] == candidate.state
        if candidate.state == "failed":
            assert row["latency_ms"] == "" and "out of memory" in row["error"]
            continue
        assert float(row["latency_ms"]) == pytest.approx(candidate.latency.drift_corrected_ms, rel=1e-5)
        assert float(row["quality"]) == pytest.approx(candidate.differences["quality"].mean, rel=1e-5)
        for name, value in candidate.params.items():
            assert row[f"param.{name}"] == str(value)


def test_failures_without_a_candidate_get_a_row(runs):
    result, directory = runs["full"]
    lost = dataclasses.replace(result, candidates=tuple(c for c in result.candidates if c.state == "complete"))
    export(lost, directory)
    failed = [row for row in rows(directory / "trials.csv") if row["state"] == "failed"]
    assert [row["trial"] for row in failed] == [str(f.trial) for f in result.failures]
    export(result, directory)


def test_unwritable_output_is_one_line(runs, tmp_path):
    result, _ = runs["full"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="cannot be written") as error:
        export(result, blocked / "run")
    assert "\n" not in str(error.value)


def test_export_is_deterministic(runs, tmp_path):
    result, directory = runs["full"]
    export(result, directory)
    before = {name: (directory / name).read_bytes() for name in os.listdir(directory) if name.endswith(("yaml", "csv"))}
    export(type(result).load(directory), directory)
    assert before == {name: (directory / name).read_bytes() for name in before}
