"""`stagevar-tune doctor`: whether this machine is fit for tuning, and how far its timings can be trusted."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from stagevar import extras, plugins
from stagevar.cli.arguments import Parser, name_value, path_value
from stagevar.errors import StagevarError, UsageError
from stagevar.models.request import ModelRequest

if TYPE_CHECKING:
    import torch

REQUIRED = {"torch": (2, 11), "numpy": (2, 0), "optuna": (5, 0), "scipy": (1, 13), "pandas": (2, 2), "rich": (13, 7)}
_OPTIONAL = {
    "open_clip_torch": "CLIP score",
    "ray": "--executor ray",
    "transformers": "Infinity's text encoder",
    "torchmetrics": "LPIPS, DISTS, PSNR, SSIM",
    "huggingface_hub": "fetching public weights",
}
#: Spread of timings (p90 over median) above which comparisons need many rounds.
NOISY = 1.15


@dataclass(frozen=True)
class Finding:
    """One check; its `state` is "ok", "warn" (works, at a cost) or "fail" (a study cannot run)."""

    state: str
    text: str


def run_checks(out: Path, model: ModelRequest | None = None, space: Path | None = None) -> list[Finding]:
    """All checks, in the order a user wants to read them.

    Args:
        out: where runs would be written.
        model: if given, also checks what this model needs here and what is missing.
        space: file of the search space whose metrics are checked; None for the model's.
    """
    findings = [*_python(), *_packages(), *check_device(), _timings(), _disk(out), *_models(), *check_plugins()]
    if model is not None:
        from stagevar.models import readiness

        findings += [Finding(*found) for found in readiness.check_model(model)]
        findings += [] if model.weights == "random" else check_metrics(model.name, space, model.resolution)
    return findings


def _python() -> list[Finding]:
    version = platform.python_version()
    state = "ok" if sys.version_info >= (3, 11) else "fail"
    return [Finding(state, f"Python {version} on {platform.system()} {platform.machine()}")]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = []
    for name, least in REQUIRED.items():
        version = _version(name)
        wanted = ".".join(map(str, least))
        if version is None:
            findings.append(Finding("fail", f"{name} is missing: {extras.install_command('tune')}"))
            continue
        numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])
        old = numbers < least
        findings.append(
            Finding("fail" if old else "ok", f"{name} {version}" + (f", {wanted} is needed" if old else ""))
        )
    for name, use in _OPTIONAL.items():
        version = _version(name)
        findings.append(Finding("ok" if version else "warn", f"{name} {version or 'is missing'} ({use})"))
    return findings


def check_device() -> list[Finding]:
    """Processors, their load, and every card with its abilities."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings = [Finding("ok", f"{usable} processors usable, {torch.get_num_threads()} torch threads")]
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        state = "warn" if load > 0.5 * usable else "ok"
        findings.append(
            Finding(state, f"load {load:.1f}" + (": other processes will disturb timings" if state == "warn" else ""))
        )
    if not torch.cuda.is_available():
        return [*findings, Finding("ok", "no CUDA device: figures are for one pinned CPU thread")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        findings.append(Finding("ok", f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
        findings.append(_card_state(index))
    return [*findings, *_selftest(torch.device("cuda", torch.cuda.current_device()))]


def _card_state(index: int) -> Finding:
    """Clocks, power and other processes on the card; milliseconds are only as good as these."""
    from stagevar.card_state import disturbed_by, read_card

    state = read_card(f"cuda:{index}")
    if state is None:
        return Finding("warn", f"cuda:{index}: clocks and throttling unknown; pip install nvidia-ml-py")
    text = (
        f"cuda:{index} driver {state.driver}, {state.sm_mhz} MHz, {state.temperature_c} C, "
        f"{state.power_w:.0f} of {state.power_limit_w:.0f} W{', a MIG slice' if state.mig else ''}"
    )
    disturbed = disturbed_by(state, state)
    return Finding("warn" if disturbed else "ok", "; ".join([text, *disturbed]))


def _selftest(device: torch.device) -> list[Finding]:
    """What works on the card, on a tiny model with random weights."""
    from stagevar.models.registry import load_model
    from stagevar.profile.card_selftest import selftest

    model = load_model("infinity-tiny", weights="random", device=str(device))
    return [
        Finding("warn" if check.fault else "ok", f"{device} {check.name}" + (f": {check.fault}" if check.fault else ""))
        for check in selftest(model)
    ]


def _timings() -> Finding:
    """How much the time of a fixed computation varies on one pinned thread."""
    import torch

    from stagevar.timing import pinned

    a = torch.rand(384, 384)
    samples = []
    with pinned(1):
        for _ in range(40):
            start = time.perf_counter()
            for _ in range(4):
                a @ a
            samples.append(time.perf_counter() - start)
    middle = statistics.median(samples)
    spread = sorted(samples)[int(0.9 * len(samples))] / middle
    text = f"timing spread p90/median {spread:.2f} on one pinned thread"
    return Finding("warn", text + ": noisy, expect more rounds") if spread > NOISY else Finding("ok", text)


def _disk(out: Path) -> Finding:
    folder = next((p for p in (out, *out.resolve().parents) if p.is_dir()), Path("."))
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            start = time.perf_counter()
            for _ in range(5):
                handle.write(b"x" * 100)
                handle.flush()
                os.fsync(handle.fileno())
            each_ms = (time.perf_counter() - start) * 200
    except OSError as error:
        return Finding("fail", f"{folder} cannot be written: {error.strerror or error}")
    return Finding("warn" if each_ms > 50 else "ok", f"{folder} is writable, {each_ms:.1f} ms per durable line")


def check_metrics(model: str, file: Path | None = None, resolution: str | int | None = None) -> list[Finding]:
    """Packages and local files that are missing for the metrics of a space, the model's default one for None."""
    from tuner.cli.plan import checked_space
    from tuner.metrics.downloads import missing_files
    from tuner.metrics.registry import check_packages

    findings = []
    try:
        space = checked_space(model, file, None, None, 0, resolution)
    except StagevarError as error:
        return [Finding("fail", str(error))]
    for metric, spec in space.quality.items():
        try:
            check_packages(metric)
        except StagevarError as error:
            findings.append(Finding("fail", str(error)))
        findings += [Finding("fail", line) for line in missing_files(metric, spec.options)]
    return findings


def _models() -> list[Finding]:
    from tuner.config.space_file import load_space, space_names

    findings = []
    for name in space_names():
        try:
            load_space(name)
            findings.append(Finding("ok", f"search space {name}"))
        except StagevarError as error:
            findings.append(Finding("fail", f"search space {name}: {error}"))
    try:
        from stagevar.models.registry import load_model

        model = load_model("nano", device="cpu")
        findings.append(Finding("ok", f"nano loads: {len(model.grids)} scales, {model.pixels[0]} pixels"))
    except StagevarError as error:
        findings.append(Finding("fail", f"cannot load nano: {error}"))
    return findings


def check_plugins() -> list[Finding]:
    """Plug-ins that other packages offer by entry point: each loads, or one line says why not."""
    from stagevar.accelerators.plugged import plugged
    from stagevar.analysis import SIMILARITIES
    from stagevar.models.registry import MODELS, SPECS, find
    from stagevar.schedule import ACCELERATORS, PLUGGED_ACCELERATORS
    from tuner.metrics.registry import METRIC_NAMES, METRICS, metric_class

    findings = []
    rooms: tuple[tuple[str, Collection[str], Callable[[str], object]], ...] = (
        (MODELS, SPECS, find),
        (PLUGGED_ACCELERATORS, ACCELERATORS, plugged),
        (METRICS, METRIC_NAMES, metric_class),
        (SIMILARITIES, (), lambda name: plugins.offered(SIMILARITIES)[name].load()),
    )
    for group, taken, use in rooms:
        for name, plugin in plugins.offered(group, taken).items():
            if plugin.package == extras.DISTRIBUTION:
                continue
            try:
                use(name)
                findings.append(Finding("ok", f"plug-in: {plugin.title}"))
            except StagevarError as error:
                findings.append(Finding("warn", f"plug-in: {error}"))
        findings += [Finding("warn", f"plug-in: {reason}") for reason in plugins.refused(group, taken).values()]
    return findings


def add_options(parser: Parser) -> None:
    """Where runs would go, and a model to check."""
    parser.add_argument(
        "--out", type=path_value, default=Path("outputs"), help="where runs would go (default: outputs)"
    )
    parser.add_argument("--model", type=name_value, help="also check the memory and files that this model needs")
    parser.add_argument("--weights", type=name_value, help="with --model: path, or 'random'")
    parser.add_argument("--device", default="auto", help="with --model: auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--resolution", help="with --model: pixel budget (0.25M, 1M ...) or image side")
    parser.add_argument(
        "--kv-cache", choices=("model", "int8"), help="with --model: 8 bits halve the cache (default: the model's)"
    )
    parser.add_argument(
        "--space", type=path_value, metavar="FILE", help="with --model: search space whose metrics are checked"
    )


def run(args: argparse.Namespace) -> int:
    """Prints one line per check; exit code 1 if a study cannot run here."""
    model = None
    if args.model is not None:
        model = ModelRequest(
            args.model, weights=args.weights, resolution=args.resolution, device=args.device, kv_cache=args.kv_cache
        )
    for option in ("resolution", "kv_cache", "space"):
        if model is None and getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} needs the model that it is for; give --model NAME")
    findings = run_checks(args.out, model, args.space)
    if args.json:
        print(json.dumps([dataclasses.asdict(f) for f in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:<5}{finding.text}")
    return 1 if any(f.state == "fail" for f in findings) else 0
