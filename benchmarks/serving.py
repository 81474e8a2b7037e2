"""What serving costs and withstands: overhead against Pipeline.generate, throughput, a soak that checks every image.

    python -m benchmarks.serving --requests 1000 --out outputs/serving.json

Starts `stagevar serve` on the loopback with a profile of nano (or --profile FILE), as a separate process. Overhead: a request
and a local call with the same prompt and seed in turn, one thread each. Soak: concurrent seeded requests; every response is
compared with the image of `Pipeline.generate`, and the server's memory is read after a tenth of the requests and at the end.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.environment import environment, write_json
from stagevar.models.registry import load_model
from stagevar.profile import Profile, present_envelope, steps_to_data
from stagevar.profile.pipeline import Pipeline
from stagevar.sampling.bench import bench_prompts
from stagevar.schedule import preset
from stagevar.serving.load import measure_server
from stagevar.statistics import median_bounds

#: Different (prompt, seed) pairs of a soak.
PAIRS = 250


def made_profile(folder: Path, batch: int) -> Path:
    """A profile of nano with StageVAR's published schedule for a batch size; not verified."""
    model = load_model("nano", device="cpu")
    schedule = preset("stagevar-paper", model.grids)
    steps = schedule.expand(model.grids, len(model.transformer.chunk_layers))
    profile = Profile(
        model={"name": "nano", "weights": model.provenance["weights"], "load": model.provenance["load"]},  # type: ignore[arg-type]
        schedule=schedule,
        steps=steps_to_data(steps),
        sampling={},  # type: ignore[arg-type]
        envelope=present_envelope(model, batch=batch, threads=1),
        verified=False,
        verdict="not verified: made by benchmarks.serving",
    )
    profile.save(folder / "profile.yaml")
    return folder / "profile.yaml"


@contextlib.contextmanager
def running(profile: Path, log: Path) -> Iterator[str]:
    """The address of a ready server, which is stopped gracefully at the end."""
    command = [sys.executable, "-m", "stagevar.cli.command", "serve", "--profile", str(profile), "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            while True:
                try:
                    urllib.request.urlopen(f"{url}/ready").close()
                    break
                except urllib.error.HTTPError:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            print(f"server stopped with {process.wait(60)}")


def ask(url: str, prompt: str, seed: int) -> tuple[int, np.ndarray | None, float]:
    """Status and pixels of one request, and how many of its milliseconds were drawing."""
    body = json.dumps({"prompt": prompt, "seed": seed}).encode()
    request = urllib.request.Request(f"{url}/v1/images/generations", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            one = json.load(response)["data"][0]
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))))
            return response.status, pixels, one["text_ms"] + sum(one["scale_ms"]) + one["decode_ms"]
    except urllib.error.HTTPError as error:
        return error.code, None, 0.0


def metric(url: str, name: str) -> float:
    """A value of the server's metrics."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def resident_mib(url: str) -> float:
    """The server's resident memory."""
    return metric(url, "process_resident_memory_bytes") / 2**20


def overhead(url: str, pipeline: Pipeline, prompts: list[str], rounds: int) -> dict[str, float]:
    """Medians in milliseconds of a local call, of a request, and of their difference round by round.

    "outside_ms" is the part of a request that is not text, scales or decoding: HTTP, the queue, threads, PNG, base64, on both
    sides; other processes disturb it less than the difference. "local_cpu_ms" and "served_cpu_ms" are mean processor times, of
    this process in a local call and of the server in a request; other processes hardly change them.
    """
    local_ms, served_ms, outside_ms, local_cpu_s, server_cpu_s = [], [], [], 0.0, 0.0
    for index in range(-3, rounds):
        pair = prompts[index % len(prompts)], index + 3
        if index == 0:
            server_cpu_s = metric(url, "process_cpu_seconds_total")
        for kind in ("local", "served") if index % 2 else ("served", "local"):
            began, began_cpu_s = time.perf_counter(), time.process_time()
            if kind == "local":
                pipeline.generate([pair[0]], [pair[1]])
            else:
                drawing_ms = ask(url, *pair)[2]
            elapsed_ms = (time.perf_counter() - began) * 1e3
            if index >= 0:
                (local_ms if kind == "local" else served_ms).append(elapsed_ms)
                if kind == "local":
                    local_cpu_s += time.process_time() - began_cpu_s
                else:
                    outside_ms.append(elapsed_ms - drawing_ms)
    server_cpu_s = metric(url, "process_cpu_seconds_total") - server_cpu_s
    difference_ms = np.asarray(served_ms) - np.asarray(local_ms)
    low_ms, high_ms = median_bounds(difference_ms)
    return {
        "rounds": rounds,
        "local_ms": float(np.median(local_ms)),
        "served_ms": float(np.median(served_ms)),
        "local_cpu_ms": local_cpu_s / rounds * 1e3,
        "served_cpu_ms": server_cpu_s / rounds * 1e3,
        "outside_ms": float(np.median(outside_ms)),
        "outside_p90_ms": float(np.percentile(outside_ms, 90)),
        "difference_ms": float(np.median(difference_ms)),
        "difference_low_ms": low_ms,
        "difference_high_ms": high_ms,
    }


def soak(url: str, pipeline: Pipeline, prompts: list[str], requests: int, clients: int) -> dict[str, object]:
    """Seeded requests by concurrent clients: statuses, differing images, memory, latency."""
    pairs = [(prompts[number % len(prompts)], number) for number in range(min(PAIRS, requests))]
    numbers, lock = iter(range(requests)), threading.Lock()
    latency_ms: list[float] = []
    statuses: Counter[int] = Counter()
    images: dict[int, list[np.ndarray]] = {}
    memory_mib: list[float] = []

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            began = time.perf_counter()
            status, image, _ = ask(url, *pairs[number % len(pairs)])
            elapsed_ms = (time.perf_counter() - began) * 1e3
            with lock:
                latency_ms.append(elapsed_ms)
                statuses[status] += 1
                if image is not None:
                    images.setdefault(number % len(pairs), []).append(image)
                if len(latency_ms) % (requests // 10) == 0:
                    memory_mib.append(resident_mib(url))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    equal = wrong = farthest = 0
    for index, answers in images.items():
        prompt, seed = pairs[index]
        expected = np.asarray(pipeline.generate([prompt], [seed])[0]).astype(int)
        for image in answers:
            difference = int(np.abs(image - expected).max())
            farthest, equal, wrong = max(farthest, difference), equal + (difference == 0), wrong + (difference > 2)
    return {
        "requests": requests,
        "clients": clients,
        "seconds": seconds,
        "statuses": {str(status): count for status, count in statuses.items()},
        "equal_bit_for_bit": equal,
        "largest_difference_of_255": farthest,
        "wrong_images": wrong,
        "p50_ms": float(np.percentile(latency_ms, 50)),
        "p99_ms": float(np.percentile(latency_ms, 99)),
        "resident_mib": memory_mib,
    }


def main() -> None:
    """Prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="instead of nano with StageVAR's published schedule")
    parser.add_argument("--batch", type=int, default=8, help="of the profile that is made (default: 8)")
    parser.add_argument("--rounds", type=int, default=60, help="of the overhead (default: 60)")
    parser.add_argument("--requests", type=int, default=1000, help="of the soak (default: 1000)")
    parser.add_argument("--concurrency", default="1,2,4,8", help="levels of the throughput (default: 1,2,4,8)")
    parser.add_argument("--out", type=Path, default=Path("outputs/serving.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.profile or made_profile(Path(folder), options.batch)
        pipeline = Profile.load(path).pipeline("cpu", batch=1, threads=1)
        prompts = bench_prompts(pipeline.sampler.model, 100)
        log = options.out.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with running(path, log) as url:
            figures: dict[str, object] = {
                "environment": environment(),
                "overhead": overhead(url, pipeline, prompts, options.rounds),
            }
            print(json.dumps(figures["overhead"]))
            levels = measure_server(url, [int(word) for word in options.concurrency.split(",")], 64, prompts)
            figures["throughput"] = [level.row() for level in levels]
            print(*map(json.dumps, figures["throughput"]), sep="\n")  # type: ignore[call-overload]
            figures["soak"] = soak(url, pipeline, prompts, options.requests, clients=8)
            print(json.dumps(figures["soak"]))
        figures["traceback_in_log"] = "Traceback" in log.read_text()
    write_json(options.out, figures)


if __name__ == "__main__":
    main()
