"""`stagevar-tune doctor` with the options of the study that is planned."""

import json

import pytest

from tests.tuner.metrics.test_missing_metrics import space_file
from tuner.cli import doctor, main


@pytest.fixture(autouse=True)
def machine_is_fine(monkeypatch):
    for name in ("_python", "_packages", "check_device", "_models", "check_plugins"):
        monkeypatch.setattr(doctor, name, list)
    monkeypatch.setattr(doctor, "_timings", lambda: doctor.Finding("ok", "timings"))


def findings(capsys, folder, *options):
    code = main(["doctor", "--json", "--out", str(folder), "--device", "cpu", *options])
    found = json.loads(capsys.readouterr().out)
    assert code == any(one["state"] == "fail" for one in found)
    return [(one["state"], one["text"]) for one in found]


def mebibytes(found, name):
    return next(int(text.split()[-2].replace(",", "")) for _, text in found if text.strip().startswith(name))


def test_memory_is_that_of_the_resolution_and_cache_that_are_asked_for(tmp_path, capsys):
    model = ("--model", "infinity-2b", "--weights", "random")
    whole = findings(capsys, tmp_path, *model)
    eight_bits = findings(capsys, tmp_path, *model, "--kv-cache", "int8")
    small = findings(capsys, tmp_path, *model, "--resolution", "0.25M")
    assert mebibytes(eight_bits, "KV cache") < 0.6 * mebibytes(whole, "KV cache")
    assert mebibytes(small, "KV cache") < 0.5 * mebibytes(whole, "KV cache")
    assert mebibytes(small, "peak") < mebibytes(whole, "peak")
    side = findings(capsys, tmp_path, *model, "--resolution", "512")
    assert mebibytes(side, "peak") == mebibytes(small, "peak")


def test_the_metrics_are_those_of_the_space_that_is_asked_for(tmp_path, capsys):
    file = space_file(tmp_path, pretrained="/models/clip.pt")
    found = findings(capsys, tmp_path, "--model", "nano", "--space", str(file))
    assert [text.partition(";")[0] for state, text in found if state == "fail"] == [
        "metric clip_score: pretrained /models/clip.pt does not exist"
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--kv-cache", "int8"), "--kv-cache needs the model that it is for; give --model NAME"),
        (("--space", "space.yaml"), "--space needs the model that it is for; give --model NAME"),
        (("--model", "nano", "--resolution", "512"), "nano has no resolution '512'; it has default"),
    ],
)
def test_options_that_cannot_be_checked_are_bad_input(options, says, tmp_path, capsys):
    assert main(["doctor", "--out", str(tmp_path), *options]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
