"""The engine benchmark from end to end on nano, and what it refuses."""

import json
import weakref

import pytest

from benchmarks.engine import main
from stagevar.tensors.cache import KVCache

REFERENCE = """
def build(model, pixels, device, dtype):
    assert (model, pixels, device, dtype) == ("nano", (64, 64), "cpu", "float32")
    return lambda: sum(range(1000))
"""


@pytest.fixture
def warm(monkeypatch):
    """Every run counts as warm after one: how many it takes is a matter for the tests of `stagevar.timing`."""

    def once(run, device, at_most):
        run()
        return 1, True

    monkeypatch.setattr("stagevar.timing.warm_up", once)


def test_everything_is_measured_and_written(tmp_path, capsys, warm):
    reference, output = tmp_path / "reference.py", tmp_path / "engine.json"
    reference.write_text(REFERENCE)
    arguments = [
        "--model",
        "nano",
        "--engines",
        "eager,growing",
        "--schedules",
        "exact,conditional+int8",
        "--rounds",
        "1",
    ]
    more = ["--batches", "1,2", "--reference", str(reference), "--device", "cpu", "--output", str(output)]
    assert main([*arguments, *more]) == 0
    figures = json.loads(output.read_text())
    full, coarse = figures["per_scale"]["exact"], figures["per_scale"]["conditional+int8"]
    assert [row["tokens"] for row in full] == [1, 4, 9, 16, 36, 64, 121, 256]
    assert [row["branches"] for row in coarse] == [2, 2, 2, 2, 2, 2, 1, 1]
    for row in full:
        assert set(row["ms"]) == {"eager", "growing"} and row["floor_ms"] > 0 and row["of_roofline"]["eager"] > 0
    # One branch is half the arithmetic; products in 8 bits are a quarter of float32's bytes.
    assert coarse[-1]["tflop"] < 0.6 * full[-1]["tflop"] and coarse[-1]["gib"] < 0.5 * full[-1]["gib"]
    table = figures["end_to_end"]
    assert {"exact eager batch 2", "conditional+int8 growing batch 1", "reference", "decoder"} <= table.keys()
    assert table["exact eager batch 2"]["images_per_s"] == pytest.approx(
        2e3 / table["exact eager batch 2"]["median_ms"]
    )
    assert 0 < table["exact eager batch 1"]["decoder_share"] < 1
    assert figures["memory"]["exact"]["cache_gib"] > figures["memory"]["conditional+int8"]["cache_gib"]
    said = capsys.readouterr().out
    assert "interleaved rounds, ratio to exact eager batch 1" in said and "of it is decoding" in said


def test_two_samplers_are_alive_only_where_the_memory_plan_has_room(tmp_path, monkeypatch, capsys, warm):
    output = tmp_path / "engine.json"
    alive, most = weakref.WeakSet(), []

    class Counting(KVCache):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr("stagevar.sampling.sampler.KVCache", Counting)
    monkeypatch.setattr("benchmarks.engine.available_bytes", lambda device: 2**20)
    arguments = ["--model", "nano", "--device", "cpu", "--rounds", "1", "--output", str(output)]
    assert main([*arguments, "--schedules", "exact,skip-2"]) == 0
    figures = json.loads(output.read_text())
    assert figures["complete"] and figures["alone"] == ["skip-2 eager"] and max(most) == 1
    assert figures["end_to_end"]["skip-2 eager"]["speed_up"][0] > 0
    assert "skip-2 eager: timed alone, no room for exact eager beside it" in capsys.readouterr().out


def test_who_runs_out_of_time_keeps_what_was_measured(tmp_path, monkeypatch):
    def out_of_time(*arguments):
        raise KeyboardInterrupt

    output = tmp_path / "engine.json"
    monkeypatch.setattr("benchmarks.engine._end_to_end", out_of_time)
    with pytest.raises(KeyboardInterrupt):
        main(["--model", "nano", "--device", "cpu", "--rounds", "1", "--schedules", "skip-2", "--output", str(output)])
    figures = json.loads(output.read_text())
    assert not figures["complete"] and len(figures["per_scale"]["skip-2"]) == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engines", "graph"], "engine graph needs a CUDA device"),
        (["--engines", "fast"], "unknown engine 'fast'"),
        (["--batches", "1,0"], "batches 1,0 must be whole numbers"),
        (["--schedules", "exakt"], "'exakt' is not one of"),
        (["--schedules", "exact+int4"], "precision 'int4'"),
        (["--attention", "fast"], "unknown attention 'fast'"),
        (["--kv-cache", "int4"], "unknown kv cache 'int4'"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys):
    assert main(["--model", "nano", "--device", "cpu", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line


def test_a_reference_without_build_is_refused(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("")
    arguments = ["--model", "nano", "--device", "cpu", "--rounds", "1", "--schedules", "skip-2"]
    assert main([*arguments, "--reference", str(tmp_path / "empty.py")]) == 2
    assert "defines no build(" in capsys.readouterr().err
    assert main([*arguments, "--reference", str(tmp_path / "absent.py")]) == 2
    assert "is not a file" in capsys.readouterr().err
