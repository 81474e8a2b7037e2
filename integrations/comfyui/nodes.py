"""Three nodes in ComfyUI's V3 API: load a profile, draw with it, compare it with the full schedule.

Images are ComfyUI's: float tensors (B, H, W, 3) between 0 and 1, on the CPU.
Source: the interface of comfy_api.latest (ComfyExtension, io.ComfyNode, io.Schema, io.NodeOutput) as ComfyUI publishes it.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io

#: What flows from the loading node to the others: a `stagevar.profile.pipeline.Pipeline`.
PipelineType = io.Custom("STAGEVAR_PIPELINE")
CATEGORY = "stagevar"
#: Seeds that a widget of the browser holds exactly.
LAST_SEED = 2**53 - 1


def _prompt_input() -> io.Input:
    return io.String.Input("prompt", multiline=True, default="a photo of a red circle", tooltip="what to draw")


def _seed_input() -> io.Input:
    return io.Int.Input("seed", default=0, min=0, max=LAST_SEED, control_after_generate=True)


def _to_comfy(images: list) -> torch.Tensor:
    """PIL images of one size as (B, H, W, 3), float32, 0 to 1."""
    return torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images]) / 255)


class StageVarLoadProfile(io.ComfyNode):
    """Loads the model of a profile with its schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageVarLoadProfile",
            display_name="Load StageVAR profile",
            category=CATEGORY,
            description="Loads a next-scale model with the schedule that stagevar-tune proved for it.",
            inputs=[
                io.String.Input("profile", default="profile.yaml", tooltip="path of the profile.yaml of a study"),
                io.Combo.Input("device", options=["auto", "cuda", "cpu"], default="auto"),
                io.String.Input(
                    "weights", default="", optional=True, tooltip="path of the weights; empty: the model's own"
                ),
            ],
            outputs=[
                PipelineType.Output("pipeline", display_name="pipeline"),
                io.String.Output("verdict", display_name="verdict"),
            ],
        )

    @classmethod
    def validate_inputs(cls, profile: str) -> bool | str:
        """The profile is read before anything runs; its errors are shown at the node."""
        from stagevar.errors import StagevarError
        from stagevar.profile import Profile

        try:
            Profile.load(os.path.expanduser(profile))
        except StagevarError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, profile: str, **others: object) -> tuple[object, ...]:
        """The node runs again when the file has changed."""
        try:
            found = os.stat(os.path.expanduser(profile))
        except OSError:
            return (profile, None)
        return (profile, found.st_mtime_ns, found.st_size)

    @classmethod
    def execute(cls, profile: str, device: str = "auto", weights: str = "") -> io.NodeOutput:
        from stagevar.profile import Profile

        loaded = Profile.load(os.path.expanduser(profile))
        options = {"weights": os.path.expanduser(weights)} if weights.strip() else {}
        return io.NodeOutput(loaded.pipeline(device, **options), loaded.verdict)


class StageVarGenerate(io.ComfyNode):
    """Draws images with a profile's schedule; image i has seed + i."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageVarGenerate",
            display_name="Generate with StageVAR",
            category=CATEGORY,
            description="Draws images with the schedule of a profile. The same prompt and seed give the same image.",
            inputs=[
                PipelineType.Input("pipeline"),
                _prompt_input(),
                _seed_input(),
                io.Int.Input("images", default=1, min=1, max=64),
                io.String.Input(
                    "negative", multiline=True, default="", optional=True, tooltip="empty: the model's own"
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image")],
        )

    @classmethod
    def execute(cls, pipeline, prompt: str, seed: int, images: int = 1, negative: str = "") -> io.NodeOutput:
        seeds = list(range(seed, seed + images))
        return io.NodeOutput(_to_comfy(pipeline.generate([prompt] * images, seeds, negative.strip() or None)))


class StageVarCompare(io.ComfyNode):
    """One prompt and seed with the profile's schedule and with the full one, and how long each took."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StageVarCompare",
            display_name="Compare StageVAR with the full schedule",
            category=CATEGORY,
            description="Draws the same prompt and seed with the profile's schedule and with the full one.",
            inputs=[PipelineType.Input("pipeline"), _prompt_input(), _seed_input()],
            outputs=[
                io.Image.Output("tuned", display_name="tuned"),
                io.Image.Output("full", display_name="full"),
                io.String.Output("latency", display_name="latency"),
            ],
        )

    @classmethod
    def execute(cls, pipeline, prompt: str, seed: int) -> io.NodeOutput:
        from PIL import Image

        from stagevar.sampling.sampler import Sampler
        from stagevar.schedule import exact

        model, engine = pipeline.sampler.model, pipeline.sampler.engine.name
        sampler = Sampler(model, engine=engine)
        steps = exact(len(model.grids)).expand(model.grids, len(model.transformer.chunk_layers))

        def draw_full() -> list:
            with pipeline.own_threads():  # as the tuned schedule, or the two latencies could not be compared
                return [Image.fromarray(image) for image in sampler.generate([prompt], [seed], steps)]

        tuned, tuned_ms = _timed(lambda: pipeline.generate([prompt], [seed]))
        full, full_ms = _timed(draw_full)
        sampler.release()
        line = f"tuned {tuned_ms:.0f} ms, full {full_ms:.0f} ms: {full_ms / tuned_ms:.2f}x, one run each after a warm-up run"
        return io.NodeOutput(_to_comfy(tuned), _to_comfy(full), line)


def _timed(draw) -> tuple[list, float]:
    """Images and milliseconds of the second of two runs; the first one compiles and allocates."""
    draw()
    began = time.perf_counter()
    return draw(), (time.perf_counter() - began) * 1e3


class StageVarExtension(ComfyExtension):
    """What ComfyUI gets the nodes from."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [StageVarLoadProfile, StageVarGenerate, StageVarCompare]


async def comfy_entrypoint() -> StageVarExtension:
    """Where ComfyUI enters a folder of custom nodes."""
    return StageVarExtension()
