"""What /metrics shows, in Prometheus' text format; docs/serving.md says what to watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagevar.serving.desk import Desk, Drawn

#: Upper ends of the latency histograms, in seconds: from nano on a CPU to a queue in front of the largest model.
LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """The measurements of one server, in a registry of their own.

    Args:
        desk: its queue depth and state are read at every scrape.
    """

    def __init__(self, desk: Desk):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        registry = CollectorRegistry()
        self._registry, self._desk = registry, desk
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "stagevar_requests",
            "Requests for images by status; 499: the client disconnected.",
            ["status"],
            registry=registry,
        )
        self._images = Counter("stagevar_images", "Images drawn.", registry=registry)
        self._phases = Histogram(
            "stagevar_phase_seconds",
            "Where the time goes. Per request: queue, encode, total; per batch: text, scales, decode.",
            ["phase"],
            buckets=LATENCY_S,
            registry=registry,
        )
        self._batches = Histogram("stagevar_batch_images", "Images drawn together.", buckets=BATCHES, registry=registry)
        self._images_per_request = Counter("stagevar_images_asked", "Images asked for.", registry=registry)
        Gauge("stagevar_queue_images", "Images waiting.", registry=registry).set_function(lambda: desk.waiting)
        Gauge("stagevar_ready", "1 while requests are accepted.", registry=registry).set_function(
            lambda: float(desk.state == "ready")
        )
        self._memory = Gauge(
            "stagevar_device_memory_bytes", "Memory of the GPU by kind; absent on a CPU.", ["kind"], registry=registry
        )

    def answered(self, status: int, seconds: float) -> None:
        """A request for images was answered."""
        self._requests.labels(str(status)).inc()
        self._phases.labels("total").observe(seconds)

    def asked(self, images: int) -> None:
        """A request was accepted."""
        self._images_per_request.inc(images)

    def phase(self, name: str, seconds: float) -> None:
        """A phase of a request."""
        self._phases.labels(name).observe(seconds)

    def batch(self, drawn: Sequence[Drawn]) -> None:
        """A batch was drawn."""
        self._batches.observe(len(drawn))
        self._images.inc(len(drawn))
        first = drawn[0]
        for name, ms in (("text", first.text_ms), ("scales", sum(first.scale_ms)), ("decode", first.decode_ms)):
            self._phases.labels(name).observe(ms / 1e3)

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        self._read_memory()
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _read_memory(self) -> None:
        device = getattr(getattr(self._desk.artist, "model", None), "device", None)
        if device is None or device.type != "cuda":
            return
        import torch

        self._memory.labels("allocated").set(torch.cuda.memory_allocated(device))
        self._memory.labels("reserved").set(torch.cuda.memory_reserved(device))
        self._memory.labels("peak").set(torch.cuda.max_memory_allocated(device))
