"""The runtime's command line: what it makes, and one line with exit code 2 for what it cannot use."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from stagevar.cli.command import main
from stagevar.models.registry import load_model
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.schedule import paper


@pytest.fixture(scope="module")
def nano():
    return load_model("nano", device="cpu")


@pytest.fixture(scope="module")
def profile_path(nano, tmp_path_factory):
    schedule = paper(nano.grids)
    chunks = len(nano.transformer.chunk_layers)
    path = tmp_path_factory.mktemp("profile") / "profile.yaml"
    Profile(
        model={"name": "nano", "weights": nano.provenance["weights"], "load": nano.provenance["load"]},
        schedule=schedule,
        steps=steps_to_data(schedule.expand(nano.grids, chunks)),
        sampling={},
        envelope=present_envelope(nano, batch=1, threads=1),
        verified=False,
        verdict="made by a test",
    ).save(path)
    return path


def fails(capsys, *argv):
    """The one line on stderr of a command that exits with 2."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1, (code, lines)
    return lines[0]


def test_generate_with_a_profile(profile_path, tmp_path, capsys):
    target = tmp_path / "x.png"
    assert main(["generate", "--profile", str(profile_path), "a photo of a red circle", "-o", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    first = np.asarray(Image.open(target))
    assert first.shape == (64, 64, 3)
    assert main(["generate", "--profile", str(profile_path), "a photo of a red circle", "-o", str(target)]) == 0
    assert np.array_equal(first, np.asarray(Image.open(target))), "same prompt and seed, same image"


@pytest.mark.parametrize("verb", ["generate", "serve"])
@pytest.mark.parametrize("weights", [[], ["--weights", "random"]])
def test_a_profile_of_random_weights_asks_for_real_ones_at_once(verb, weights, profile_path, tmp_path, capsys):
    data = yaml.safe_load(profile_path.read_text())
    data["model"] = {"name": "infinity-tiny", "random_weights": True}
    path = tmp_path / "random.yaml"
    path.write_text(yaml.safe_dump(data))
    line = fails(capsys, verb, "--profile", path, *weights, *(["a"] if verb == "generate" else []))
    assert "measured on random weights of infinity-tiny, which draw no images" in line
    assert "give --weights PATH of real weights" in line and "or --weights random" not in line


def test_a_profile_of_trained_weights_is_not_drawn_with_random_ones(profile_path, capsys):
    line = fails(capsys, "generate", "--profile", profile_path, "--weights", "random", "a")
    assert "random weights draw noise, not images" in line and "measured on" not in line


def test_generate_counts_seeds_and_files(tmp_path, capsys):
    target = tmp_path / "many.png"
    prompts = ["a photo of a blue star", "a photo of two red rings"]
    assert main(["generate", "--model", "nano", *prompts, "--images", "2", "--seed", "5", "-o", str(target)]) == 0
    names = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.split()]
    assert names == ["many-0.png", "many-1.png", "many-2.png", "many-3.png"]
    images = [np.asarray(Image.open(tmp_path / name)) for name in names]
    assert not np.array_equal(images[0], images[1])
    assert main(["generate", "--model", "nano", prompts[0], "--seed", "6", "-o", str(target)]) == 0
    assert np.array_equal(np.asarray(Image.open(target)), images[1]), "seed 6 alone is the second image"


def test_unusable_input(profile_path, tmp_path, capsys):
    assert "unknown model 'nanoo', did you mean nano?" in fails(capsys, "generate", "--model", "nanoo", "x")
    assert "--profile FILE or --model NAME" in fails(capsys, "generate", "x")
    line = fails(capsys, "generate", "--model", "nano", "x", "--sede", "1")
    assert "unknown option '--sede', did you mean --seed? (see stagevar generate --help)" in line
    assert "did you mean --profile?" in fails(capsys, "bench", "--profil", "p.yaml"), "options are not abbreviated"
    assert "unknown verb 'generat', did you mean generate? (see stagevar --help)" in fails(capsys, "generat")
    assert "folder" in fails(capsys, "generate", "--model", "nano", "x", "-o", tmp_path / "no" / "x.png")
    assert "unknown image type '.gif'" in fails(capsys, "generate", "--model", "nano", "x", "-o", tmp_path / "x.gif")
    assert "draws noise" in fails(capsys, "generate", "--model", "nano", "--weights", "random", "x")
    assert "cannot be read" in fails(capsys, "generate", "--profile", tmp_path / "none.yaml", "x")
    assert "'0' must be a whole number" in fails(capsys, "generate", "--model", "nano", "x", "--images", "0")
    hostile = tmp_path / "hostile.yaml"
    hostile.write_text("!!python/object/apply:os.system ['true']\n")
    assert "not plain YAML" in fails(capsys, "generate", "--profile", hostile, "x")
    assert "schedule 'papper'" in fails(capsys, "bench", "--model", "nano", "--compare", "exact,papper")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert "holds no prompt" in fails(capsys, "analyze", "--model", "nano", "--prompts-file", empty)
    assert "target 1.5" in fails(capsys, "refit", "--model", "nano", "--out", tmp_path / "fit.json", "--target", "1.5")


def test_analyze_writes_a_proposal(tmp_path, capsys):
    argv = ["analyze", "--model", "nano", "--prompts", "4", "--ranks", "--out", str(tmp_path / "a")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "structure_end:" in out and "analysis.yaml" in out
    table = json.loads((tmp_path / "a" / "rank_ratio.json").read_text())
    assert {"ratio", "what"} <= table.keys()


def test_bench_prints_rows(profile_path, capsys):
    argv = [
        "bench",
        "--profile",
        str(profile_path),
        "--compare",
        "exact,skip-1",
        "--rounds",
        "1",
        "--prompts",
        "4",
        "--json",
    ]
    assert main(argv) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["exact", "skip-1", f"profile {profile_path}"]
    assert rows[0]["tokens"] > rows[2]["tokens"]


def test_memory_says_what_fits(capsys):
    assert main(["memory", "--model", "infinity-8b", "--compare", "exact,stagevar-paper", "--card", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "exact,",
        "model",
        "exact,",
        "int8",
        "stagevar-paper,",
        "model",
        "stagevar-paper,",
        "int8",
    ]
    (fits,) = (line for line in lines if line.startswith("sampling fits 24 GiB"))
    assert fits.split()[-4:] == ["no", "yes", "yes", "yes"]
    (encoder,) = (line for line in lines if line.startswith("text encoder"))
    assert set(encoder.split()[-4:]) == {"2,814"}, "what a GPU loads, though this machine may have none"
    assert len({len(line) for line in lines[1:]}) == 1, "columns are aligned"
    assert main(["memory", "--model", "infinity-tiny", "--compare", "skip-1", "--kv-cache", "int8"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["skip-1,", "int8"]


@pytest.mark.parametrize(
    "card, drawn, beside", [(24, ["none", "none"], ["none", "none"]), (40, ["1", "1"], ["none", "2"])]
)
def test_memory_says_none_where_a_study_has_no_room(card, drawn, beside, capsys):
    assert main(["memory", "--model", "infinity-8b", "--compare", "exact", "--card", str(card)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start, values in (
        ("images a study draws at once", drawn),
        ("have room beside the full schedule, eager", beside),
    ):
        (line,) = (line for line in lines if line.startswith(start))
        assert line.split()[-2:] == values


def test_an_unknown_kv_cache_is_refused(capsys):
    assert "unknown kv cache 'int4'; use model or int8" in fails(
        capsys, "memory", "--model", "infinity-tiny", "--kv-cache", "int4"
    )


def test_a_profile_keeps_its_kv_cache_and_engine(nano, tmp_path):
    """Loaded with what it was measured with; an engine that this machine lacks is said and replaced."""
    eight_bit = load_model("nano", device="cpu", kv_cache="int8")
    schedule = paper(nano.grids)
    steps = schedule.expand(nano.grids, len(nano.transformer.chunk_layers))
    model = {"name": "nano", "weights": eight_bit.provenance["weights"], "load": eight_bit.provenance["load"]}
    envelope = present_envelope(eight_bit, batch=1, threads=1, engine="graph")
    Profile(model, schedule, steps_to_data(steps), {}, envelope, False, "made by a test").save(tmp_path / "p.yaml")
    with pytest.warns(UserWarning, match="engine graph needs a CUDA device, not cpu.*falling back to engine eager"):
        pipeline = Profile.load(tmp_path / "p.yaml").pipeline(device="cpu")
    assert pipeline.sampler.model.kv_cache == "int8" and pipeline.sampler.engine.name == "eager"
    pipeline.generate(["a photo of a red circle"])
    assert pipeline.sampler._caches[0].eight_bit
