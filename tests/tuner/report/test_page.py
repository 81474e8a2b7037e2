"""report.html: whole and self-contained for every outcome, honest in words, safe against whatever users type."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from stagevar.errors import UsageError
from tests.fakes.sample_study import KINDS, make
from tests.fakes.studies import study
from tuner.config.quality import MetricLimit, quality_limits
from tuner.metrics.quality_spec import QualitySpec
from tuner.report.page import MAX_BYTES, render, write_report
from tuner.report.scatter import place_labels
from tuner.report.sections.marks import mark_of
from tuner.report.svg import ticks
from tuner.report.words import describe, signed
from tuner.results.candidate import Failed, Failure, Finalist, Measured, Sample
from tuner.results.importance import importance
from tuner.results.result import StudyResult

VOID = {"meta", "img", "br", "hr", "link", "input"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Checks nesting while it collects tags, attributes and text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.text, self.sections, self.heading = [], [], "", [], False
        self.feed(html)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.sections.append(dict(attrs)["id"])
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> does not match"

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text += data + " "

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {kind: (make(kind, root / kind), root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pages(runs):
    return {kind: Page(write_report(*runs[kind]).read_text()) for kind in KINDS}


SECTIONS = {
    "full": "schedule trade-off images time-per-scale candidates search parameters failures run",
    "one_trial": "schedule trade-off images time-per-scale candidates search run",
    "infeasible": "schedule trade-off images time-per-scale candidates search parameters run",
    "latency_only": "schedule trade-off time-per-scale candidates search parameters run",
    "all_failed": "schedule time-per-scale candidates failures run",
    "baseline_meets_budget": "schedule trade-off images time-per-scale candidates search parameters run",
    "infinity": "schedule trade-off images time-per-scale candidates search parameters published-figures run",
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_sections_are_there_and_linked(pages, kind):
    page = pages[kind]
    assert page.sections == SECTIONS[kind].split()
    assert [href for href in page.attributes("href") if href.startswith("#")] == [f"#{s}" for s in page.sections]


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_without_scripts_or_remote_assets(runs, pages, kind):
    html = (runs[kind][1] / "report.html").read_text()
    assert len(html.encode()) <= MAX_BYTES
    assert "url(" not in html and "@import" not in html and "://" not in re.sub(r"base64,[^\"]*", "", html)
    page = pages[kind]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form"}
    assert all(src.startswith("data:image/") for src in page.attributes("src"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("full", "Tuning helped: nano runs "),
        ("one_trial", "Promising, not proved: nano runs "),
        ("infeasible", "No: none of 29 measured schedules of nano meets 42.6\u00a0ms"),
        ("latency_only", "nano runs "),
        ("all_failed", "No answer: none of the 5 trials"),
        ("baseline_meets_budget", "No tuning needed: "),
    ],
)
def test_the_first_sentence_answers(runs, kind, start):
    result, directory = runs[kind]
    heading = re.search(r"<h1>.*?</span> (.*?)</h1>", render(result, directory)).group(1)
    assert heading.startswith(start)
    assert heading.endswith(".") and "\n" not in heading


def test_the_answer_carries_both_figures_with_intervals(runs):
    result, directory = runs["full"]
    heading = re.search(r"<h1>.*?</h1>", render(result, directory)).group(0)
    ratio, change = result.pick.verification.latency.ratio, result.pick.verification.differences["checker"]
    assert f"{1 / ratio.mean:.2f}× faster (95 % interval {1 / ratio.high:.2f} to {1 / ratio.low:.2f})" in heading
    assert f"{signed(change.mean)} ({signed(change.low)} to {signed(change.high)}) on 16 held-out prompts" in heading


def test_random_weights_show_no_quality(pages):
    text = pages["latency_only"].text
    assert "Random weights" in text and "checker" not in text and "changed by" not in text
    assert "Change of" not in text and not pages["latency_only"].attributes("src")


def test_skipped_scales_are_pointed_out(runs):
    result, directory = runs["full"]
    skipping = next(c for c in result.candidates if c.skipped_scales)
    html = render(dataclasses.replace(result, picks={"pick": skipping.key}), directory)
    assert "This schedule does not run 1 scale" in html


def test_search_figures_of_an_unverified_pick_are_not_called_proved(runs):
    result, directory = runs["full"]
    bare = tuple(c.becomes(Measured) if isinstance(c, Finalist) else c for c in result.candidates)
    html = render(dataclasses.replace(result, candidates=bare, verdict="partial"), directory)
    assert "Stopped before verification" in html and "search prompts" in html
    assert "are proved" not in html


def test_user_text_is_escaped_everywhere(runs):
    result, directory = runs["full"]
    hostile = '"><!-- <script>alert(1)</script><img src=x onerror=alert(2)>'
    samples = tuple(dataclasses.replace(s, prompt=hostile) for s in result.samples)
    result = dataclasses.replace(
        result, model=hostile, command=hostile, reason=hostile, engine=hostile, includes=hostile, budget=hostile,
        stop_reason=hostile, created=hostile, device={"name": hostile, hostile: hostile}, samples=samples,
        versions={hostile: hostile}, provenance={hostile: {hostile: [hostile]}}, hashes={hostile: hostile},
        limits=(MetricLimit(hostile, 1.0, 0.1, hostile, hostile, 1.0), *result.limits),
        phases_s={hostile: 1.0}, floors={hostile: 0.5},
        failures=(Failure(1, {hostile: hostile}, hostile),),
        candidates=tuple(
            dataclasses.replace(
                c, source=f"enqueued: {hostile}", params={**c.params, hostile: hostile} if c.params else {},
                **({"verdicts": tuple(dataclasses.replace(v, name=f"floor:{hostile}", unit=hostile) for v in c.verdicts)}
                   if isinstance(c, Measured) else {}),
            ) for c in result.candidates
        ),
    )  # fmt: skip
    page = Page(render(result, directory))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not page.attributes("onerror")
    assert page.text.count(hostile) > 10


def test_images_outside_the_run_directory_are_refused(runs, tmp_path):
    result, _ = runs["full"]
    inside, secret = tmp_path / "run", tmp_path / "secret.png"
    inside.mkdir()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(secret)
    stolen = (Sample("p", 0, result.baseline.key, "../secret.png"), Sample("q", 0, result.baseline.key, str(secret)))
    page = Page(render(dataclasses.replace(result, samples=stolen), inside))
    assert not page.attributes("src") and "2 images named in study.json could not be read" in page.text


def test_missing_images_are_counted_not_fatal(runs, tmp_path):
    result, _ = runs["full"]
    page = Page(render(result, tmp_path))
    assert not page.attributes("src")
    assert "6 images named in study.json could not be read" in page.text


def test_image_rows_are_full_tuned_and_difference(runs, pages):
    alts = pages["full"].attributes("alt")
    assert [alt.partition(":")[0] for alt in alts[:3]] == ["full schedule", "tuned", "difference"]
    assert len(alts) == 18


def test_images_shrink_until_the_page_fits(runs, monkeypatch):
    result, directory = runs["infinity"]
    whole = render(result, directory)
    without = len(render(dataclasses.replace(result, samples=()), directory).encode())
    limit = without + (len(whole.encode()) - without) // 2
    monkeypatch.setattr("tuner.report.page.MAX_BYTES", limit)
    smaller = render(result, directory)
    assert len(smaller.encode()) <= limit and Page(smaller).attributes("src")
    monkeypatch.setattr("tuner.report.page.MAX_BYTES", without + 100)
    assert not Page(render(result, directory)).attributes("src")


def test_report_is_rebuilt_from_the_run_directory(runs):
    result, directory = runs["full"]
    assert render(StudyResult.load(directory), directory) == render(result, directory)


def test_scale_bars_say_what_they_show(runs, pages):
    assert "Median time of each scale" in pages["full"].text
    result, directory = runs["full"]

    def untimed(candidate):
        if isinstance(candidate, Finalist):
            check = candidate.verification
            check = dataclasses.replace(check, latency=dataclasses.replace(check.latency, scale_ms=()))
            candidate = dataclasses.replace(candidate, verification=check)
        if isinstance(candidate, Measured):
            candidate = dataclasses.replace(candidate, latency=dataclasses.replace(candidate.latency, scale_ms=()))
        return candidate

    bare = dataclasses.replace(result, candidates=tuple(map(untimed, result.candidates)))
    assert "not timed one by one" in Page(render(bare, directory)).text


def test_a_busy_machine_is_pointed_out(runs):
    result, directory = runs["full"]
    assert "machine was not quiet" not in render(result, directory)
    check = result.baseline.verification
    slow = dataclasses.replace(check.latency, median_ms=1.3 * result.baseline.latency.median_ms)
    baseline = dataclasses.replace(result.baseline, verification=dataclasses.replace(check, latency=slow))
    html = render(dataclasses.replace(result, baseline=baseline), directory)
    assert "was 30% slower when it was verified" in html
    # The sentence on top stays consistent: milliseconds on either side are ratios of one reference.
    heading = re.search(r"<h1>.*?</h1>", html).group(0)
    assert heading == re.search(r"<h1>.*?</h1>", render(result, directory)).group(0)


def test_an_estimate_beyond_its_limit_is_not_called_promising(runs):
    result, directory = runs["one_trial"]
    verdicts = tuple(dataclasses.replace(v, value=2 * v.limit) for v in result.pick.verification.verdicts)
    check = dataclasses.replace(result.pick.verification, verdicts=verdicts)
    pick = dataclasses.replace(result.pick, verification=check)
    candidates = tuple(pick if c.key == pick.key else c for c in result.candidates)
    html = render(dataclasses.replace(result, candidates=candidates, picks={}, nearest=(pick.key,)), directory)
    assert "Not proved: nano runs" in html and "Promising" not in html and "Undecided" in html


def test_published_rows_only_for_the_papers_models(pages):
    assert "Published figures" not in pages["full"].text
    text = pages["infinity"].text
    assert "SDXL" in text and "FastVAR, paper" in text and "its quality is on another scale" in text


@pytest.mark.parametrize(
    ("kind", "metrics", "said"),
    [
        ("full", ("geneval_nano", "ssim"), []),
        ("full", ("geneval",), ["17.7 %"]),
        ("infinity", ("geneval", "lpips"), ["17.7 %", "0.69"]),
        ("infinity", ("lpips", "fid"), ["fid of 64 images mostly measures"]),
        ("full", ("fid", "is", "geneval"), ["17.7 %", "fid and is of 64 images mostly measure how"]),
    ],
)
def test_metrics_are_warned_of_once_where_a_study_uses_them(runs, kind, metrics, said):
    result, directory = runs[kind]
    limits = quality_limits(dict.fromkeys(metrics, QualitySpec()))
    study = dataclasses.replace(result, limits=limits, heldout_prompts=("a dog",) * 64)
    page = Page(render(study, directory))
    assert ("reading-the-metrics" in page.sections) == bool(said)
    notes = ["17.7 %", "0.69", "mostly measure"]
    assert [page.text.count(note) for note in notes] == [sum(note in one for one in said) for note in notes]
    assert all(note in page.text for note in said)
    unknown = dataclasses.replace(study, random_weights=True)
    assert "reading-the-metrics" not in Page(render(unknown, directory)).sections


def test_failed_baseline_still_reports(runs):
    result, directory = runs["all_failed"]
    dead = result.baseline.becomes(Failed, error="x", latency=None)
    page = Page(render(dataclasses.replace(result, baseline=dead, budget_ms=float("nan"), front=()), directory))
    assert page.sections == ["schedule", "time-per-scale", "failures", "run"] and "nan " not in page.text


def test_unwritable_folder_is_one_line(runs, tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(runs["full"][0], tmp_path / "absent")


def test_describe_names_what_a_schedule_saves():
    both, alone = ["cond", "uncond"], ["uncond"]
    steps = [
        {"scale": 0, "grid": [1, 1], "branches": both},
        {"scale": 1, "grid": [4, 2], "branches": alone, "reduction": {"kind": "low_rank", "ranks": [2, 4]}},
        {"scale": 2, "grid": [8, 8], "branches": alone, "reduction": {"kind": "pivotal", "kept": 16}},
        {"scale": 3, "grid": [9, 9], "skipped": True},
    ]
    assert describe(steps[:1]) == "guidance and every token at every scale"
    decision = {"rule": "some-rule", "outcomes": ["full", "skip1"]}
    deciding = [{"scale": 5, "grid": [24, 24], "branches": both, "decision": decision}]
    assert describe(deciding) == "each image decides after side 24 how to continue (some-rule)"
    assert describe(steps) == (
        "only the unconditional branch from side 4×2 on; 25% to 38% of the tokens at sides 4×2, 8; side 9 not run"
    )


def test_importance_finds_the_parameter_that_matters():
    rng = np.random.default_rng(1)
    strong, idle = rng.uniform(size=60).tolist(), rng.choice(["a", "b"], 60).tolist()
    outcome = [3 * s + 0.3 * e for s, e in zip(strong, rng.normal(size=60), strict=True)]
    found, nothing = importance("strong", strong, outcome), importance("idle", idle, outcome)
    assert found.share > 0.6 and found.p < 0.01 and found.n == 60
    assert nothing.share < 0.1 and nothing.p > 0.05
    constant = importance("constant", [1] * 60, outcome)
    assert (constant.share, constant.p) == (0.0, 1.0)
    each_its_own = importance("unique", [f"v{i}" for i in range(60)], outcome)
    assert each_its_own.share == 0.0


def test_ticks_are_round_and_inside():
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.031, 0.012, 6) == [-0.03, -0.02, -0.01, 0.0, 0.01]
    assert ticks(5, 5, 4) == [5]


def test_labels_do_not_overlap():
    frame = (0, 0, 400, 300)
    anchors = [(200.0, 150.0, "some label", True), (203.0, 151.0, "another label", True), (198.0, 149.0, "third", True)]
    places = place_labels(anchors, [], frame)
    boxes = [(x, y - 11, x + 6.3 * len(a[2]), y + 3) for (x, y), a in zip(places, anchors, strict=True)]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    walls = [frame]
    assert place_labels([(200.0, 150.0, "optional", False)], walls, frame) == [None]
    assert place_labels([(200.0, 150.0, "needed", True)], walls, frame)[0] is not None


PROBE = """<script>
const seen = e => e.getClientRects().length > 0, all = q => [...document.querySelectorAll(q)];
const cut = e => e.scrollWidth > e.clientWidth + 1;
parent.postMessage({name, report: {
  width: innerWidth, overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  page: getComputedStyle(document.body).backgroundColor,
  broken: [...document.images].filter(i => !i.naturalWidth).length, images: document.images.length,
  small: all('svg text').filter(seen).filter(t => t.getBoundingClientRect().height < 9).length,
  charts: all('svg').filter(seen).length, cut: all('h1, h2, .tiles div, .trust li').filter(cut).length,
}}, '*');
</script>"""
COLLECT = """<script>
const found = {};
onmessage = e => { found[e.data.name] = e.data.report; document.title = JSON.stringify(found); };
</script>"""


def browse(runs, kinds, folder, *flags):
    """(kind, width) -> layout as a browser sees it. Frames, because headless windows may refuse to be narrow."""
    frames = COLLECT
    for kind in kinds:
        result, directory = runs[kind]
        html = render(result, directory).replace('loading="lazy"', "").replace("</body>", PROBE + "</body>")
        (folder / f"{kind}.html").write_text(html)
        for width in (390, 1280):
            size = f"width:{width}px;height:900px;border:0"
            frames += f'<iframe name="{kind} {width}" src="{kind}.html" style="{size}"></iframe>'
    (folder / "frames.html").write_text(f"<!doctype html><title></title>{frames}")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", *flags, "--dump-dom", (folder / "frames.html").as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    shown = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert shown.returncode == 0, shown.stderr[-2000:]
    found = json.loads(unescape(re.search(r"<title>(.*?)</title>", shown.stdout).group(1)))
    return {(name.split()[0], int(name.split()[1])): report for name, report in found.items()}


if BROWSER:  # without one the structural tests above stand alone

    def test_a_real_browser_lays_it_out(runs, tmp_path):
        found = browse(runs, ("full", "one_trial", "infeasible", "latency_only"), tmp_path)
        assert len(found) == 8
        for (kind, width), seen in found.items():
            assert seen["width"] == width
            assert (seen["overflow"], seen["cut"], seen["broken"], seen["small"]) == (0, 0, 0, 0), (kind, width, seen)
            assert seen["images"] == (0 if kind == "latency_only" else 18)
            assert seen["charts"] >= 4
            assert seen["page"] == "rgb(252, 252, 250)"

    def test_a_real_browser_follows_dark_mode(runs, tmp_path):
        found = browse(runs, ("full",), tmp_path, "--blink-settings=preferredColorScheme=0")
        assert {seen["page"] for seen in found.values()} == {"rgb(18, 20, 24)"}


def test_a_finalist_that_broke_a_limit_is_marked_as_outside_though_the_search_had_it_within(tmp_path):
    result = study(tmp_path, {"drop": lambda steps: 0.0}, trials=6).run()
    finalist = next(c for c in result.candidates if isinstance(c, Finalist) and c.key not in result.picks.values())
    assert finalist.feasible and mark_of(result, finalist)[0] == "feasible"
    check = dataclasses.replace(finalist.verification, status="broken")
    assert mark_of(result, dataclasses.replace(finalist, verification=check))[0] == "infeasible"


@pytest.mark.parametrize(
    ("count", "pruned", "dropped"),
    [
        (1, "1 was clearly worse", "1 more proposal was predicted"),
        (2, "2 were clearly worse", "2 more proposals were predicted"),
    ],
)
def test_counts_agree_with_their_verbs(runs, count, pruned, dropped):
    result, directory = runs["full"]
    facts = {**result.search, "stopped_early": count, "dropped": count}
    text = Page(render(dataclasses.replace(result, search=facts), directory)).text
    assert pruned in text and dropped in text
