"""`stagevar-eval` from the outside: figures, files, exit codes, one line for every wrong input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import ROOT
from tuner.evalkit.command import main
from tuner.metrics import METRIC_NAMES, registry

DOGS = {
    "tag": "counting",
    "include": [{"class": "dog", "count": 2}],
    "exclude": [{"class": "dog", "count": 3}],
    "prompt": "a photo of two dogs",
}
RED = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"}


def dog(score):
    return {"class": "dog", "score": score, "box": [0, 0, 10, 10]}


@pytest.fixture
def detections(tmp_path):
    path = tmp_path / "found.json"
    path.write_text(
        json.dumps(
            [
                {"name": "two", "metadata": DOGS, "detections": [dog(0.95), dog(0.91)]},
                {"name": "unsure", "metadata": DOGS, "detections": [dog(0.95), dog(0.9)]},
                {"name": "three", "metadata": DOGS, "detections": [dog(0.95)] * 3},
                {
                    "name": "cup",
                    "metadata": RED,
                    "detections": [{"class": "cup", "score": 0.4, "box": [0, 0, 9, 9], "color": "red"}],
                },
            ]
        )
    )
    return path


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text(
        "item_id,proposition_id,dependency,tuple,tile,answer\n"
        "z,1,0,entity - whole (z),0,yes\n"
        "a,1,0,entity - whole (cat),0,no\na,2,1,attribute - color (cat),0,yes\n"
        "a,1,0,entity - whole (cat),1,yes\na,2,1,attribute - color (cat),1,yes\n"
    )
    return path


@pytest.fixture
def folder(tmp_path):
    """GenEval's layout with one nano-like image per prompt, and a copy with noise as reference."""
    rng = np.random.default_rng(0)
    for name in ("images", "reference"):
        for index in range(3):
            samples = tmp_path / name / f"{index:05d}" / "samples"
            samples.mkdir(parents=True)
            (samples.parent / "metadata.jsonl").write_text(json.dumps(DOGS if index else RED))
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(samples / "0000.png")
    return tmp_path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def results(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_geneval_from_detections(capsys, detections):
    document = results(capsys, "geneval", "--detections", detections)
    found = document["results"]
    assert [verdict["correct"] for verdict in found["verdicts"]] == [True, False, False, True]
    assert [verdict["reason"] for verdict in found["verdicts"]] == [
        "",
        "expected dog>=2, found 1",
        "expected dog<3, found 3",
        "",
    ]
    assert found["tags"] == {"counting": pytest.approx(1 / 3), "colors": 1.0}
    assert found["overall"] == pytest.approx(2 / 3) and found["correct_images"] == 0.5
    assert len(next(iter(document["inputs"].values()))) == 64 and document["versions"]["numpy"]


def test_geneval_prints_a_table_and_takes_thresholds(capsys, detections, tmp_path):
    code, out, _ = run(
        capsys, "geneval", "--detections", detections, "--counting-threshold", "0.89", "--out", tmp_path / "result.json"
    )
    assert code == 0 and "counting" in out and "66.67%" in out and "0.83333" in out
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["results"]["overall"] == pytest.approx(5 / 6) and saved["schema"] == "stagevar-eval/1"


def test_dpg_from_answers_both_ways(capsys, answers):
    found = results(capsys, "dpg", "--answers", answers)["results"]
    assert found["published"]["score"] == 50.0  # a alone: tiles 0 and 1; z's only question is the lost line
    assert found["corrected"]["score"] == 75.0
    assert found["published"]["l2"]["attribute - color"] == 100.0  # last tile
    assert found["corrected"]["l2"]["attribute - color"] == 50.0
    code, out, _ = run(capsys, "dpg", "--answers", answers, "--mode", "published")
    assert code == 0 and "50.0000" in out and "corrected" not in out and "dropped z" in out


def test_a_missing_parent_leaves_the_published_score(capsys, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("item_id,proposition_id,dependency,tile,answer\nz,1,0,0,yes\na,1,9,0,yes\nb,1,0,0,yes\n")
    found = results(capsys, "dpg", "--answers", path)["results"]
    assert found["published"]["score"] == 100.0 and list(found["published"]["dropped"]) == ["z", "a"]
    assert "depends on 9" in found["corrected"]["refused"]
    code, _, err = run(capsys, "dpg", "--answers", path, "--mode", "corrected")
    assert code == 2 and "depends on 9" in err


def test_the_documented_examples_run_as_they_stand(capsys, tmp_path):
    text = (ROOT / "docs" / "metrics.md").read_text()
    for language, suffix, arguments in (
        ("json", "json", ["geneval", "--detections"]),
        ("csv", "csv", ["dpg", "--answers"]),
    ):
        (tmp_path / f"example.{suffix}").write_text(re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1])
        found = results(capsys, *arguments, tmp_path / f"example.{suffix}")["results"]
        assert found["overall"] == 1.0 if language == "json" else found["corrected"]["score"] == 50.0
    names = set(re.findall(r"^\| `(\w+)` \| (?:prompt|reference|\| higher)", text, re.MULTILINE))
    assert names == set(METRIC_NAMES)


def test_the_list_of_metrics_says_what_each_needs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "missing_packages", lambda name: ["lpips"] if name == "lpips" else [])
    code, out, _ = run(capsys, "--metric", "list")
    header, *rows, star = out.splitlines()
    columns = [header.index(word) for word in ("metric", "unit", "better", "compares", "packages", "weights")]
    cells = [[row[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)] for row in rows]
    assert code == 0 and [row[0] for row in cells] == list(METRIC_NAMES) and star == "* not installed"
    by_name = {row[0]: row[1:] for row in cells}
    assert by_name["lpips"] == ["LPIPS", "lower", "reference", "lpips* torchmetrics torchvision", "244 MB"]
    assert by_name["psnr"] == ["dB", "higher", "reference", "torchmetrics", "none"]
    assert by_name["fid"][2] == "reference set" and by_name["is"][2] == "-"
    listed = results(capsys, "--metric", "list", "--out", tmp_path / "metrics.json")["results"]
    assert [entry["name"] for entry in listed] == list(METRIC_NAMES)
    assert listed == json.loads((tmp_path / "metrics.json").read_text())["results"]
    local = {"geneval_nano", "psnr", "ssim"}
    assert {entry["name"] for entry in listed if entry["weights_bytes"] == 0} == local


def test_a_folder_needs_no_verb(capsys, folder):
    document = results(
        capsys,
        "--images",
        folder / "images",
        "--metric",
        "psnr",
        "--metric",
        "geneval_nano",
        "--reference",
        folder / "reference",
        "--out",
        folder / "result.json",
    )
    metrics = document["results"]["metrics"]
    assert metrics["psnr"]["images"] == 3 and 5 < metrics["psnr"]["summary"]["mean"] < 15
    assert set(metrics["geneval_nano"]["summary"]["tags"]) == {"colors", "counting"}
    assert metrics["psnr"]["rows"][0]["image"].startswith("00000")
    assert (folder / "result.json.rows.jsonl").is_file()
    assert document["versions"]["torch"]
    code, out, _ = run(capsys, "--images", folder / "images", "--metric", "psnr", "--reference", folder / "images")
    assert code == 0 and "100.00000" in out


def test_prompts_are_generated_and_subset(capsys, tmp_path):
    found = results(capsys, "prompts", "--count", 30, "--seed", 4, "--to", tmp_path / "p.jsonl")["results"]
    assert set(found["tags"].values()) == {5}
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 30
    subset = results(capsys, "prompts", "--from", tmp_path / "p.jsonl", "--count", 12)["results"]
    assert set(subset["tags"].values()) == {2} and len(subset["indices"]) == 12


def test_prompts_check_ranks_systems(capsys, tmp_path):
    prompts = results(capsys, "prompts", "--count", 30, "--to", tmp_path / "p.jsonl")["results"]["prompts"]
    paths = []
    for system in range(4):
        rows = [{"value": float(index % 4 >= system)} for index in range(len(prompts))]
        paths.append(tmp_path / f"{system}.json")
        paths[-1].write_text(json.dumps({"results": {"metrics": {"geneval": {"rows": rows}}}}))
    found = results(capsys, "prompts", "--from", tmp_path / "p.jsonl", "--count", 24, "--check", *paths)["results"]
    assert 0.8 < found["subset"]["spearman_mean"] <= 1.0 and found["subset"]["best_found"] > 0.9


def test_a_study_from_page_to_verdict(capsys, folder):
    page = folder / "study.html"
    code, out, _ = run(capsys, "pairs", "--a", folder / "images", "--b", folder / "reference", "--page", page)
    assert code == 0 and "3 pairs" in out
    key = json.loads((folder / "study.key.json").read_text())
    given = [{"pair": pair, "choice": entry["a"], "seconds": 1} for pair, entry in key["pairs"].items()]
    (folder / "answers.json").write_text(json.dumps({"study": key["study"], "voter": "x", "answers": given}))
    found = results(capsys, "preference", "--key", folder / "study.key.json", "--answers", folder / "answers.json")
    assert found["results"]["win_rate"] == 1.0 and found["results"]["votes"] == {"A": 3, "B": 0, "tie": 0}


@pytest.mark.parametrize(
    "arguments",
    [
        ["geneval"],
        ["geneval", "--detections", "none.json"],
        ["geneval", "--detections", "{detections}", "--threshold", "high"],
        ["geneval", "--detections", "{detections}", "--out", "/no/such/folder/x.json"],
        ["dpg", "--answers", "none.csv"],
        ["dpg", "--answers", "{detections}"],
        ["dpg", "--answers", "{answers}", "--mode", "right"],
        ["--images", "none", "--metric", "psnr"],
        ["--images", "{folder}/images"],
        ["--images", "{folder}/images", "--metric", "pnsr"],
        ["--images", "{folder}/images", "--metric", "psnr"],
        ["--images", "{folder}/images", "--metric", "psnr", "--option", "ssim.x=1"],
        ["--images", "{folder}/images", "--metric", "psnr", "--reference", "{folder}"],
        ["prompts", "--count", "-1"],
        ["prompts", "--count", "81", "--tags", "single_object"],
        ["prompts", "--count", "5", "--tags", "poetry"],
        ["prompts", "--count", "5", "--from", "none.jsonl"],
        ["pairs", "--a", "{folder}/images", "--b", "{folder}", "--page", "{folder}/x.html"],
        ["preference", "--key", "{detections}", "--answers", "{detections}"],
        ["frobnicate"],
        ["geneval", "--detections", "{folder}"],
        ["geneval", "--detections", "{detections}", "--threshold", "97"],
        ["geneval", "--detections", "{detections}", "--max-per-class", "0"],
        ["--images", "{detections}", "--metric", "psnr"],
        ["--images", "{folder}/images", "--metric", "psnr", "--reference", "{folder}/images", "--batch-size", "0"],
        [
            "--images",
            "{folder}/images",
            "--metric",
            "lpips",
            "--reference",
            "{folder}/images",
            "--option",
            "lpips.net=3",
        ],
        ["prompts"],
        ["prompts", "--count", "5", "--tags", ","],
        ["prompts", "--count", "5", "--seed", "1.5"],
        ["prompts", "--from", "{detections}", "--tags", "colors"],
        ["prompts", "--count", "5", "--check", "{detections}"],
        ["preference", "--key", "{detections}", "--answers", "{detections}", "--margin", "0.5"],
        ["preference", "--key", "{detections}", "--answers", "{detections}", "--level", "95"],
        ["preference", "--key", "{detections}", "--answers", "{detections}", "--margin", "nan"],
    ],
)
def test_wrong_input_is_one_line_and_exit_2(capsys, detections, answers, folder, arguments):
    filled = [argument.format(detections=detections, answers=answers, folder=folder) for argument in arguments]
    code, out, err = run(capsys, *filled)
    assert code == 2 and out == ""
    assert err.startswith("stagevar-eval: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["geneval", "--detections", "{detections}", "--out", "{detections}"], "also the file of --detections"),
        (
            ["geneval", "--detections", "{detections}", "--out", "{folder}/./found.json"],
            "also the file of --detections",
        ),
        (["geneval", "--detections", "{detections}", "--out", "{folder}/none/x.json"], "folder .* does not exist"),
        (["geneval", "--detections", "{detections}", "--out", "{folder}"], "is a folder; name a file in it"),
        (["geneval", "--detections", "{detections}", "--out", "{folder}/" + "x" * 300], "File name too long"),
        (["dpg", "--answers", "{answers}", "--out", "/proc/x.json"], "cannot be written"),
        (["prompts", "--count", "3", "--to", "{folder}/p", "--out", "{folder}/p"], "also the file of --to"),
        (["prompts", "--from", "{folder}/p", "--to", "{folder}/p"], "also the file of --from"),
        (
            [
                "pairs",
                "--a",
                "{folder}/images",
                "--b",
                "{folder}/images",
                "--page",
                "{folder}/k",
                "--key",
                "{folder}/k",
            ],
            "--key .* is also the file of --page",
        ),
        (
            ["--images", "{folder}/images", "--metric", "psnr", "--out", "{folder}/" + "x" * 250],
            "File name too long",
        ),
    ],
)
def test_outputs_are_checked_before_anything_is_computed(
    capsys, monkeypatch, detections, answers, folder, arguments, says
):
    readers = (
        "metrics.detections.read_detections",
        "metrics.answers_file.read_answers",
        "evalkit.image_folder.read_folder",
    )
    for place in (*readers, "metrics.prompt_sets.generate"):
        monkeypatch.setattr(f"tuner.{place}", lambda *a, **k: pytest.fail("work began"))
    (folder / "p").write_text("a dog\n")
    filled = [argument.format(detections=detections, answers=answers, folder=folder) for argument in arguments]
    code, out, err = run(capsys, *filled)
    assert code == 2 and out == "" and re.search(says, err), err
    assert (folder / "p").read_text() == "a dog\n" and json.loads(detections.read_text())


def test_prompts_of_a_folder_are_taken_in_natural_order_with_the_folders_hash(capsys, tmp_path):
    (tmp_path / "dpg").mkdir()
    for name in ("x-10", "x-2", ".x-3"):
        (tmp_path / "dpg" / f"{name}.txt").write_text(f"prompt of {name}\n")
    document = results(capsys, "prompts", "--from", tmp_path / "dpg", "--to", tmp_path / "p.jsonl")
    assert [prompt["item_id"] for prompt in document["results"]["prompts"]] == ["x-2", "x-10"]
    assert [json.loads(row)["prompt"] for row in (tmp_path / "p.jsonl").read_text().splitlines()] == [
        "prompt of x-2",
        "prompt of x-10",
    ]
    before = next(iter(document["inputs"].values()))
    (tmp_path / "dpg" / "x-2.txt").write_text("another\n")
    assert before != next(iter(results(capsys, "prompts", "--from", tmp_path / "dpg")["inputs"].values()))


def test_a_device_takes_the_results_and_gets_no_neighbors(capsys, folder):
    arguments = ("--images", folder / "images", "--metric", "geneval_nano", "--out", "/dev/null")
    assert run(capsys, *arguments)[0] == 0
    assert not Path("/dev/null.rows.jsonl").exists()


def test_help_loads_no_model_library():
    code = (
        "import sys, tuner.evalkit.command as cli\n"
        "for arguments in (['--help'], ['geneval', '--help'], ['dpg', '--help'], ['images', '--help']):\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "print('torch' in sys.modules, 'open_clip' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False False"
    assert "box_xywh" in done.stdout and "proposition_id" in done.stdout
