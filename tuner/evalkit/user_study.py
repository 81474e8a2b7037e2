"""A blind A/B study: a voting page, a key kept apart from it, and what the votes say.

The page is one HTML file without remote assets. It knows pairs by opaque ids and images as "left" and "right"; only the
key file says which side is A. Both images are re-encoded as PNG, so neither format nor metadata gives a side away.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from stagevar.errors import UsageError
from stagevar.sections import shown
from stagevar.text_files import read_json
from tuner.evalkit.image_folder import FolderImage
from tuner.metrics.base import prompt_text

CHOICES = ("left", "right", "tie")


class PairKey(TypedDict):
    """A pair's image by name, and the side that A is on."""

    name: str
    a: str


class StudyKey(TypedDict):
    """What is needed to turn answers into votes: the study's id, the seed, and the pairs by id."""

    study: str
    seed: int
    pairs: dict[str, PairKey]


@dataclass(frozen=True)
class Study:
    """The page's HTML and the key: study id, and per pair id the image's name and the side that A is on."""

    page: str
    key: StudyKey


@dataclass(frozen=True)
class Preference:
    """What the votes say about A versus B.

    Votes are averaged per pair (A 1, tie 1/2, B 0), and pairs are the observations: several voters on one pair still count
    as one.

    Attributes:
        win_rate: mean over pairs.
        low, high: its two-sided interval at `level`.
        p_preference: two-sided test of win_rate 1/2.
        p_equivalence: two one-sided tests against 1/2 -+ margin.
        verdict: "A preferred", "B preferred", "no preference" (supported by the equivalence test) or "undecided".
        pairs_needed: about how many pairs would support "no preference" with 80 % power if there is none.
    """

    win_rate: float
    low: float
    high: float
    level: float
    margin: float
    p_preference: float
    p_equivalence: float
    verdict: str
    pairs: int
    pairs_needed: int
    votes: dict[str, int]
    voters: int


def build_study(
    images_a: Sequence[FolderImage],
    images_b: Mapping[str, Path],
    *,
    count: int | None = None,
    seed: int = 0,
    question: str = "Which image is better?",
) -> Study:
    """Page and key for a study.

    Args:
        images_a: images of A with prompts.
        images_b: B's files by the same names.
        count: number of pairs, all by default.
        seed: of the choice of pairs, their order and their sides.
        question: heading of the page.

    Raises:
        UsageError: for unreadable images.
    """
    rng = random.Random(f"user study {seed}")
    chosen = list(images_a)
    if count is not None:
        if not 1 <= count <= len(chosen):
            raise UsageError(f"--count {count}: there are {len(chosen)} pairs")
        chosen = rng.sample(chosen, count)
    rng.shuffle(chosen)
    pairs: list[dict[str, str]] = []
    key: dict[str, PairKey] = {}
    for image in chosen:
        sides = {"A": _png(image), "B": _png(FolderImage(image.name, images_b[image.name], ""))}
        a_side = rng.choice(("left", "right"))
        identity = f"{rng.getrandbits(48):012x}"
        key[identity] = {"name": image.name, "a": a_side}
        left, right = (sides["A"], sides["B"]) if a_side == "left" else (sides["B"], sides["A"])
        pairs.append({"id": identity, "prompt": prompt_text(image.prompt), "left": left, "right": right})
    study_id = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    # Inside <script>, a prompt's "<!--" or "<script" would keep the element from ending, so every "<" is escaped.
    data = json.dumps({"study": study_id, "pairs": pairs}).replace("<", "\\u003c")
    before, between, after = _PAGE.replace("@QUESTION@", "@DATA@").split("@DATA@")
    page = before + html.escape(question) + between + data + after
    return Study(page, {"study": study_id, "seed": seed, "pairs": key})


def read_votes(key: StudyKey, paths: Sequence[str | Path]) -> list[tuple[str, str, str]]:
    """(voter, pair name, "A" | "B" | "tie") from answers files. Raises UsageError for foreign or damaged ones."""
    if not isinstance(key, Mapping) or not isinstance(key.get("pairs"), Mapping) or "study" not in key:
        raise UsageError("--key: not a key file of `stagevar-eval pairs`")
    for identity, pair in key["pairs"].items():
        if not isinstance(pair, Mapping) or pair.get("a") not in CHOICES[:2] or not isinstance(pair.get("name"), str):
            raise UsageError(f"--key: pair {shown(identity)} lacks its name or the side of A; make the page again")
    votes: dict[tuple[str, str], str] = {}
    for path in paths:
        content = read_json(path)
        answers = content.get("answers") if isinstance(content, Mapping) else None
        if not isinstance(answers, list):
            raise UsageError(f"{path}: not an answers file of the study page")
        if content.get("study") != key["study"]:
            raise UsageError(
                f"{path} is of study {shown(content.get('study'))}, but the key is of {shown(key['study'])}"
            )
        voter = str(content.get("voter") or path)
        for answer in answers:
            asked = key["pairs"].get(str(answer.get("pair"))) if isinstance(answer, Mapping) else None
            if asked is None or answer.get("choice") not in CHOICES:
                raise UsageError(f"{path}: answer {answer!r:.80} names no pair of the key or no choice")
            choice = answer["choice"]
            said = "tie" if choice == "tie" else "A" if choice == asked["a"] else "B"
            if votes.setdefault((voter, asked["name"]), said) != said:
                raise UsageError(f"{path}: voter {shown(voter)} has two different answers for {asked['name']}")
    return [(voter, name, said) for (voter, name), said in votes.items()]


def judge_preference(votes: Sequence[tuple[str, str, str]], *, margin: float = 0.1, level: float = 0.95) -> Preference:
    """Win rate of A with its interval, and whether "no preference" is supported.

    The interval is Wilson's for a proportion of pairs, and both tests are the score tests that it inverts; ties and several
    voters per pair only make them more cautious. Equivalence is claimed at the same error rate as preference (1 - level).
    Raises UsageError without votes or for a margin or level out of range.
    """
    from scipy.stats import norm

    if not votes:
        raise UsageError("no votes in the answers files")
    if not 0 < margin < 0.5:
        raise UsageError(f"--margin {margin}: expected a number between 0 and 0.5")
    if not 0.5 < level < 1:
        raise UsageError(f"--level {level}: expected a number between 0.5 and 1")
    by_pair: dict[str, list[float]] = {}
    for _, name, said in votes:
        by_pair.setdefault(name, []).append({"A": 1.0, "tie": 0.5, "B": 0.0}[said])
    count = len(by_pair)
    rate = sum(sum(scores) / len(scores) for scores in by_pair.values()) / count
    low, high = _wilson(rate, count, float(norm.ppf((1 + level) / 2)))
    deviation = 0.5 / count**0.5
    p_preference = float(2 * norm.sf(abs(rate - 0.5) / deviation))
    edge_deviation = ((0.5 - margin) * (0.5 + margin) / count) ** 0.5
    p_equivalence = float(
        max(norm.sf((rate - (0.5 - margin)) / edge_deviation), norm.sf(((0.5 + margin) - rate) / edge_deviation))
    )
    if p_equivalence < 1 - level:
        verdict = "no preference"  # even if a difference is certain but too small to matter
    elif p_preference < 1 - level:
        verdict = "A preferred" if rate > 0.5 else "B preferred"
    else:
        verdict = "undecided"
    needed = 0.25 * ((norm.ppf(level) + norm.ppf(0.9)) / margin) ** 2
    return Preference(
        win_rate=rate,
        low=low,
        high=high,
        level=level,
        margin=margin,
        p_preference=p_preference,
        p_equivalence=p_equivalence,
        verdict=verdict,
        pairs=count,
        pairs_needed=int(needed) + 1,
        votes={name: sum(said == name for _, _, said in votes) for name in ("A", "B", "tie")},
        voters=len({voter for voter, _, _ in votes}),
    )


def _wilson(rate: float, count: int, z: float) -> tuple[float, float]:
    center = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (rate * (1 - rate) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def _png(image: FolderImage) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.pixels()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Image comparison</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; color: #222;
  background: #fafafa; }
#pair { display: flex; gap: 1rem; } figure { flex: 1; margin: 0; text-align: center; }
img { width: 100%; max-height: 65vh; object-fit: contain; image-rendering: auto; background: #eee; }
button { font: inherit; padding: .4rem 1.2rem; margin: .3rem; } #prompt { font-style: italic; min-height: 1.5em; }
:focus-visible { outline: 3px solid #06c; } [hidden] { display: none !important; }
</style></head><body>
<h1>@QUESTION@</h1>
<p>Keys: <kbd>1</kbd> left, <kbd>2</kbd> right, <kbd>T</kbd> or <kbd>0</kbd> no difference, <kbd>Backspace</kbd> back.
Answers are kept in this browser; at the end, save them to a file.</p>
<p><label>Your name or initials: <input id="voter" autocomplete="off"></label>
<span id="count" aria-live="polite"></span></p>
<main id="vote"><p id="prompt"></p>
<div id="pair">
<figure><img id="left" alt="left image">
<figcaption><button data-choice="left">1: left</button></figcaption></figure>
<figure><img id="right" alt="right image">
<figcaption><button data-choice="right">2: right</button></figcaption></figure>
</div>
<p><button data-choice="tie">T: no difference</button> <button id="back">Back</button></p></main>
<section id="done" hidden><p>Thank you. All pairs are answered.</p></section>
<p><button id="save">Save answers to a file</button></p>
<script type="application/json" id="data">@DATA@</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const store = "study-" + data.study, byId = id => document.getElementById(id);
let answers = [];
try { answers = JSON.parse(localStorage.getItem(store)) || []; } catch (error) { answers = []; }
let shown = Date.now();
function show() {
  const pair = data.pairs[answers.length];
  byId("count").textContent = answers.length + " of " + data.pairs.length + " answered";
  byId("vote").hidden = !pair;
  byId("done").hidden = !!pair;
  if (!pair) return;
  byId("prompt").textContent = pair.prompt;
  byId("left").src = pair.left;
  byId("right").src = pair.right;
  shown = Date.now();
}
function keep() { try { localStorage.setItem(store, JSON.stringify(answers)); } catch (error) { /* private window */ } }
function vote(choice) {
  const pair = data.pairs[answers.length];
  if (!pair) return;
  answers.push({ pair: pair.id, choice: choice, seconds: (Date.now() - shown) / 1000 });
  keep();
  show();
}
function back() { answers.pop(); keep(); show(); }
function save() {
  const content = { study: data.study, voter: byId("voter").value.trim(), answers: answers };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  link.download = "answers-" + data.study + ".json";
  link.click();
}
document.querySelectorAll("[data-choice]").forEach(button => button.addEventListener("click",
  () => vote(button.dataset.choice)));
byId("back").addEventListener("click", back);
byId("save").addEventListener("click", save);
document.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" || event.repeat) return;
  const choice = { "1": "left", "2": "right", "t": "tie", "T": "tie", "0": "tie" }[event.key];
  if (choice) { event.preventDefault(); vote(choice); }
  if (event.key === "Backspace") { event.preventDefault(); back(); }
});
show();
</script></body></html>
"""
