"""The user study: the page is blind and whole, votes are mapped back, the statistics say what they should."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from stagevar.errors import UsageError
from tuner.evalkit.image_folder import FolderImage
from tuner.evalkit.user_study import build_study, judge_preference, read_votes


@pytest.fixture
def study(tmp_path):
    """Six pairs: A is red, B blue."""
    images, references = [], {}
    for index in range(6):
        for side, color in (("a", (200, index, 0)), ("b", (0, index, 200))):
            path = tmp_path / f"{side}{index}.jpg"
            Image.fromarray(np.full((8, 8, 3), color, dtype=np.uint8)).save(path)
        images.append(
            FolderImage(
                f"{index}.jpg", tmp_path / f"a{index}.jpg", {"prompt": f"prompt </script> <!-- <script> & {index}"}
            )
        )
        references[f"{index}.jpg"] = tmp_path / f"b{index}.jpg"
    return build_study(images, references, seed=1)


def page_data(page):
    class Finder(HTMLParser):
        text, inside = "", False

        def handle_starttag(self, tag, attributes):
            self.inside = dict(attributes).get("id") == "data"
            assert all(name not in ("src", "href") for name, _ in attributes), "a page without remote assets"

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            self.text += data if self.inside else ""

    finder = Finder()
    finder.feed(page)
    return json.loads(finder.text)


def pixel(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))[0, 0]


def test_prompts_cannot_end_or_comment_out_the_script_that_they_stand_in(study):
    """Browsers read on past </script> after "<!-- <script>"; only data without any "<" is safe."""
    data = re.search(r'id="data">(.*?)</script>', study.page, re.DOTALL)[1]
    assert "<" not in data
    assert [pair["prompt"] for pair in json.loads(data)["pairs"]] == [
        f"prompt </script> <!-- <script> & {study.key['pairs'][pair['id']]['name'][0]}"
        for pair in json.loads(data)["pairs"]
    ]
    assert study.page.count("<script") == study.page.count("</script>") == 2


def test_the_key_says_where_a_is_and_the_page_does_not(study):
    data = page_data(study.page)
    assert {pair["id"] for pair in data["pairs"]} == set(study.key["pairs"])
    for pair in data["pairs"]:
        entry = study.key["pairs"][pair["id"]]
        is_red = {side: bool(pixel(pair[side])[0] > pixel(pair[side])[2]) for side in ("left", "right")}
        assert is_red[entry["a"]] and sum(is_red.values()) == 1
        assert pair["prompt"].endswith(entry["name"].removesuffix(".jpg"))
        assert set(pair) == {"id", "prompt", "left", "right"}
    assert {entry["a"] for entry in study.key["pairs"].values()} == {"left", "right"}
    assert not re.search(r"https?://", study.page)


def test_order_and_sides_come_from_the_seed(study, tmp_path):
    images = [FolderImage(f"{i}.jpg", tmp_path / f"a{i}.jpg", "") for i in range(6)]
    references = {f"{i}.jpg": tmp_path / f"b{i}.jpg" for i in range(6)}
    same, other = (build_study(images, references, seed=seed) for seed in (1, 2))
    assert same.key == study.key and other.key != study.key
    assert len(build_study(images, references, count=2).key["pairs"]) == 2
    with pytest.raises(UsageError, match="6 pairs"):
        build_study(images, references, count=7)


def test_votes_are_mapped_back_to_a_and_b(study, tmp_path):
    wanted = ["A", "B", "tie", "A", "A", "B"]
    answers = []
    for (pair, entry), said in zip(study.key["pairs"].items(), wanted, strict=True):
        other = {"left": "right", "right": "left"}[entry["a"]]
        answers.append({"pair": pair, "choice": {"A": entry["a"], "B": other, "tie": "tie"}[said]})
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"study": study.key["study"], "voter": "v", "answers": answers}))
    votes = read_votes(study.key, [path])
    assert [said for _, _, said in votes] == wanted
    assert read_votes(study.key, [path, path]) == votes
    for content, named in (
        ({"study": "other", "answers": []}, "the key is of"),
        ({"study": study.key["study"], "answers": [{"pair": "x", "choice": "left"}]}, "names no pair"),
        ({"study": study.key["study"], "answers": [{"pair": answers[0]["pair"], "choice": "both"}]}, "no choice"),
        (
            {"study": study.key["study"], "answers": [answers[0] | {"choice": choice} for choice in ("left", "right")]},
            "has two different answers for",
        ),
        ([], "not an answers file"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UsageError, match=named):
            read_votes(study.key, [path])


def ballots(a, b, tie=0, voters=1):
    said = ["A"] * a + ["B"] * b + ["tie"] * tie
    return [(f"v{voter}", str(index), vote) for index, vote in enumerate(said) for voter in range(voters)]


def test_wilson_interval_and_tests_against_known_figures():
    # 60 of 100: Wilson 95 % is 0.5020 .. 0.6906, z = (0.6 - 0.5) / 0.05 = 2.
    result = judge_preference(ballots(60, 40))
    assert (result.low, result.high) == (pytest.approx(0.5020, abs=1e-4), pytest.approx(0.6906, abs=1e-4))
    assert result.p_preference == pytest.approx(0.0455, abs=1e-4)
    assert result.verdict == "A preferred"
    assert judge_preference(ballots(40, 60)).verdict == "B preferred"


def test_no_difference_needs_enough_pairs():
    assert judge_preference(ballots(5, 5)).verdict == "undecided"
    large = judge_preference(ballots(150, 150, tie=100))
    assert large.verdict == "no preference" and large.win_rate == 0.5
    # z = 0.1 / sqrt(0.4 * 0.6 / 400) = 4.08
    assert large.p_equivalence == pytest.approx(2.2e-5, rel=0.1)
    assert judge_preference(ballots(1, 0)).pairs_needed == pytest.approx(215, abs=1)
    assert judge_preference(ballots(108, 107)).verdict == "no preference"


def test_ties_count_half_and_several_voters_are_not_more_pairs():
    assert judge_preference(ballots(2, 0, tie=2)).win_rate == 0.75
    one, many = judge_preference(ballots(6, 4)), judge_preference(ballots(6, 4, voters=5))
    assert (one.low, one.high, one.pairs) == (many.low, many.high, many.pairs)
    assert many.voters == 5 and many.votes == {"A": 30, "B": 20, "tie": 0}


def test_the_interval_covers_and_equivalence_rarely_errs():
    rng = np.random.default_rng(0)
    covered = wrong = 0
    for _ in range(400):
        wins = int(rng.binomial(120, 0.6))  # exactly on the margin: "no preference" must stay rare
        result = judge_preference(ballots(wins, 120 - wins))
        covered += result.low <= 0.6 <= result.high
        wrong += result.p_equivalence < 0.05
    assert covered / 400 > 0.92 and wrong / 400 < 0.08


@pytest.mark.parametrize(("options", "named"), [({"margin": 0.5}, "margin"), ({"level": 1.0}, "level")])
def test_senseless_options_are_refused(options, named):
    with pytest.raises(UsageError, match=named):
        judge_preference(ballots(1, 1), **options)
    with pytest.raises(UsageError, match="no votes"):
        judge_preference([])
