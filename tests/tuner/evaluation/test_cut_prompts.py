"""Prompts that a CLIP text tower cuts are counted and said, by the evaluation and before a search."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from stagevar.models import registry
from tuner.config.prompts import PromptSet
from tuner.evalkit import command as eval_cli
from tuner.evaluation.model_evaluator import ModelEvaluator
from tuner.metrics.clip import ClipModel, ClipScore
from tuner.metrics.quality_spec import QualitySpec

SHORT = "a photo of a red circle"
LONG = SHORT + " and a blue ring" * 12


@pytest.fixture(scope="module")
def clip():
    return ClipModel("nano")


def test_a_text_is_cut_where_its_features_no_longer_depend_on_its_end(clip):
    words = [
        "a",
        "photo",
        "of",
        "a",
        "red",
        "ring",
        "left",
        "of",
        "a",
        "blue",
        "star",
        "beside",
        "a",
        "green",
        "circle",
        "and",
        "a",
        "pink",
        "cross",
    ]
    texts = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
    cut = clip.is_cut(texts)
    same = [bool((clip.text_features([text]) == clip.text_features([f"{text} dotted"])).all()) for text in texts]
    assert True in cut and False in cut
    # A text that is cut says the same with another word behind it; one that has room for that word does not.
    assert all(equal for equal, beyond in zip(same, cut, strict=True) if beyond)
    assert not same[0]


def test_the_count_is_of_distinct_prompts(clip):
    score = ClipScore(model="nano")
    assert score.remarks([SHORT, {"prompt": SHORT}]) == []
    (remark,) = score.remarks([SHORT, LONG, LONG, {"prompt": LONG + " end"}])
    assert remark.startswith("2 of 3 prompts are longer than the ")


def test_the_evaluation_says_it_once_and_still_scores(tmp_path, capsys):
    for index in range(3):
        Image.fromarray(np.full((16, 16, 3), 80 * index, dtype=np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "p.txt").write_text(f"{SHORT}\n{LONG} left\n{LONG} right\n")
    arguments = ["--images", str(tmp_path), "--prompts", str(tmp_path / "p.txt"), "--metric", "clip_score"]
    arguments += ["--option", "clip_score.model=nano", "--batch-size", "1", "--json"]
    assert eval_cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.err.count("prompts are longer") == 1 and "warning: clip_score: 2 of 3 prompts" in said.err
    assert json.loads(said.out)["results"]["metrics"]["clip_score"]["images"] == 3


def test_a_study_says_it_before_the_search():
    model = registry.load_model("nano", device="cpu")

    def load(texts):
        prompts = {"search": PromptSet(tuple(texts), tuple(range(len(texts))), 2)}
        return ModelEvaluator(model, prompts, {"clip_score": QualitySpec(options={"model": "nano"})})

    with pytest.warns(UserWarning, match="clip_score: 1 of 2 prompts are longer"):
        load([SHORT, LONG])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load([SHORT])
