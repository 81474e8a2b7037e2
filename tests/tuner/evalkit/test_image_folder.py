"""Scoring a folder: layouts, prompts, references, and going on after a break."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from stagevar.errors import UsageError
from tuner.evalkit.image_folder import evaluate_folder, match_references, read_folder, reference_set
from tuner.metrics.base import BenchmarkMetric, SetMetric

METADATA = {"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}


def save(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


class Brightness(BenchmarkMetric):
    """Mean pixel; counts the images it was asked about."""

    name = "brightness"

    def __init__(self, version=1):
        self.version, self.seen = version, 0

    def _rows(self, images_uint8_BHW3, prompts):
        self.seen += len(images_uint8_BHW3)
        return [
            {"value": float(image.mean()), "prompt": str(prompt)}
            for image, prompt in zip(images_uint8_BHW3, prompts, strict=True)
        ]

    def describe(self):
        return {"name": self.name, "version": self.version}


class SetMean(SetMetric):
    name = "set_mean"
    needs_reference = True

    def _score(self, images_uint8_BHW3, prompts, reference_images_uint8_BHW3):
        return images_uint8_BHW3.mean((1, 2, 3))

    def score_set(self, batches, reference_batches=None):
        return float(
            np.mean([batch.mean() for batch in batches]) - np.mean([batch.mean() for batch in reference_batches])
        )

    def score_pairs(self, batches, reference_batches):
        means = [np.concatenate([batch.mean((1, 2, 3)) for batch in part]) for part in (batches, reference_batches)]
        apart = means[0] - means[1]
        return float(apart.mean()), float(apart.min()), float(apart.max())


@pytest.fixture
def geneval_folder(tmp_path):
    for index in range(3):
        for sample in range(2):
            save(tmp_path / f"{index:05d}/samples/{sample:04d}.png", value=10 * index + sample)
        (tmp_path / f"{index:05d}/metadata.jsonl").write_text(json.dumps(METADATA | {"prompt": f"p{index}"}))
    save(tmp_path / "00000/grid.png")
    return tmp_path


def test_genevals_layout_reads_samples_only(geneval_folder):
    images = read_folder(geneval_folder)
    assert [image.name for image in images] == [f"{i:05d}/samples/{s:04d}.png" for i in range(3) for s in range(2)]
    assert [image.prompt["prompt"] for image in images] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    (geneval_folder / "00001/metadata.jsonl").write_text("{")
    with pytest.raises(UsageError, match=r"00001/metadata\.jsonl"):
        read_folder(geneval_folder)


def test_any_folder_with_prompts_by_name_or_in_order(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp"):
        save(tmp_path / "images" / name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"file": name, "prompt": name}) for name in ("sub/c.webp", "a.png", "b.JPG"))
    )
    assert [image.prompt["prompt"] for image in read_folder(tmp_path / "images", prompts)] == [
        "a.png",
        "b.JPG",
        "sub/c.webp",
    ]
    plain = tmp_path / "p.txt"
    plain.write_text("one\ntwo\nthree\n")
    assert [image.prompt["prompt"] for image in read_folder(tmp_path / "images", plain)] == ["one", "two", "three"]
    assert [image.prompt for image in read_folder(tmp_path / "images")] == ["", "", ""]
    plain.write_text("one\n")
    with pytest.raises(UsageError, match="1 prompts for 3 images"):
        read_folder(tmp_path / "images", plain)
    prompts.write_text(json.dumps({"file": "x.png", "prompt": "x"}))
    with pytest.raises(UsageError, match=r"no entry for a\.png"):
        read_folder(tmp_path / "images", prompts)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        with pytest.raises(UsageError, match="--images"):
            read_folder(tmp_path / folder)


def test_a_broken_run_goes_on_where_it_stopped(geneval_folder):
    images, progress = read_folder(geneval_folder), geneval_folder / "out.rows.jsonl"
    first = Brightness()
    whole = evaluate_folder(images, {"brightness": first}, progress=progress, batch_size=4)["brightness"]
    assert first.seen == 6 and [row["value"] for row in whole["rows"]] == [0, 1, 10, 11, 20, 21]
    assert whole["summary"]["mean"] == 10.5

    lines = progress.read_text().splitlines()
    progress.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # two rows kept, the third torn
    again = Brightness()
    assert evaluate_folder(images, {"brightness": again}, progress=progress)["brightness"]["rows"] == whole["rows"]
    assert again.seen == 4
    assert len([json.loads(line) for line in progress.read_text().splitlines()]) == 6

    save(geneval_folder / "00001/samples/0000.png", value=99)  # other bytes, another metric: computed again
    changed, other = Brightness(), Brightness(version=2)
    evaluate_folder(images, {"brightness": changed}, progress=progress)
    evaluate_folder(images, {"brightness": other}, progress=progress)
    assert (changed.seen, other.seen) == (1, 6)


def test_images_of_several_sizes_are_batched_apart(tmp_path):
    for index, size in enumerate([(8, 8), (8, 8), (4, 8), (8, 8)]):
        save(tmp_path / f"{index}.png", value=index, size=size)
    images = [type(image)(image.name, image.path, "x") for image in read_folder(tmp_path)]
    rows = evaluate_folder(images, {"brightness": Brightness()})["brightness"]["rows"]
    assert [row["value"] for row in rows] == [0, 1, 2, 3]


def test_references_are_matched_by_name_and_any_suffix(geneval_folder, tmp_path):
    other = tmp_path / "reference"
    images = read_folder(geneval_folder)
    for image in images:
        save((other / image.name).with_suffix(".jpg"), value=5)
    references = match_references(images, other)
    assert references[images[0].name].suffix == ".jpg"
    value = evaluate_folder(images, {"set_mean": SetMean()}, references=references)["set_mean"]
    assert value["summary"]["set_mean"] == pytest.approx(10.5 - 5, abs=0.5) and value["rows"] == []
    assert value["summary"]["set_mean_low"] == pytest.approx(-5, abs=0.5), "every image has a reference of its name"
    assert value["summary"]["set_mean_high"] == pytest.approx(16, abs=0.5)
    assert len(reference_set(other)) == 6
    unpaired = evaluate_folder(images, {"set_mean": SetMean()}, references=reference_set(other))["set_mean"]
    assert set(unpaired["summary"]) == {"set_mean"}, "x.jpg is not x.png: two sets without pairs"
    (other / images[3].name).with_suffix(".jpg").unlink()
    with pytest.raises(UsageError, match=r"no reference for 00001/samples/0001\.png"):
        match_references(images, other)


def test_missing_references_prompts_and_broken_images_are_refused(geneval_folder, tmp_path):
    images = read_folder(geneval_folder)
    with pytest.raises(UsageError, match="--reference"):
        evaluate_folder(images, {"set_mean": SetMean()})
    with pytest.raises(UsageError, match="--prompts"):
        evaluate_folder([type(image)(image.name, image.path, "") for image in images], {"brightness": Brightness()})
    images[1].path.write_bytes(b"not an image")
    with pytest.raises(UsageError, match="not a readable image"):
        evaluate_folder(images, {"brightness": Brightness()})


def test_photographs_lying_on_their_side_are_turned_upright(tmp_path):
    picture = Image.fromarray(np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_folder(tmp_path)[0].pixels().shape == (4, 2, 3)
