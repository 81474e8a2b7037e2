"""What is sent back: images, models, and the description of a request, as OpenAI's clients read them."""

from __future__ import annotations

import io
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stagevar.serving.asking import FIELDS, IGNORED, LONGEST_PROMPT, MOST_IMAGES, Asked, size_text

if TYPE_CHECKING:
    import numpy as np

    from stagevar.serving.desk import Drawn
    from stagevar.serving.drawing import ModelArtist


def png_text(pixels_HWC: np.ndarray) -> str:
    """An image as PNG in base64; lightly compressed: half the time, a sixth more bytes (for a megapixel)."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG", compress_level=1)
    return b64encode(file.getvalue()).decode()


def models_data(artist: ModelArtist) -> dict[str, dict[str, object]]:
    """The served ids as OpenAI lists models, with what is known about each."""
    return {
        one.id: {
            "id": one.id,
            "object": "model",
            "created": 0,
            "owned_by": "stagevar",
            "stagevar": {
                "model": artist.model.name,
                "schedule": one.schedule_hash,
                "verdict": one.verdict,
                "verified": one.verified,
                "inside_envelope": not one.differences,
                "outside_envelope": list(one.differences),
                "sizes": [size_text(size) for size in artist.sizes],
                "batch": artist.batch,
                "engine": artist.engine,
                "engine_fell_back": artist.fell_back,
            },
        }
        for one in artist.served
    }


def answer_data(
    artist: ModelArtist, asked: Asked, drawn: Sequence[Drawn], images: Sequence[str], times_ms: Mapping[str, float]
) -> dict[str, object]:
    """What OpenAI's clients read and, under "stagevar", what they do not know about."""
    served = next(one for one in artist.served if one.id == asked.model)
    changed = list(served.differences)
    if asked.guidance not in (None, artist.guidance):
        changed.append(f"guidance_scale {asked.guidance:g} instead of {artist.guidance:g}")
    if asked.negative is not None:
        changed.append("negative_prompt instead of the model's null text")
    if asked.size != next(iter(artist.sizes)):
        changed.append(f"size {size_text(asked.size)} instead of {size_text(next(iter(artist.sizes)))}")
    return {
        "created": int(time.time()),
        "data": [
            {
                "b64_json": image,
                "seed": seed,
                "batch": one.batch,
                "text_ms": round(one.text_ms, 3),
                "scale_ms": [round(ms, 3) for ms in one.scale_ms],
                "decode_ms": round(one.decode_ms, 3),
            }
            for image, seed, one in zip(images, asked.seeds, drawn, strict=True)
        ],
        "output_format": "png",
        "size": size_text(asked.size),
        "stagevar": {
            "profile": served.id,
            "schedule": served.schedule_hash,
            "verdict": served.verdict,
            "verified": served.verified and not changed,
            "outside_profile": changed,
            "ignored": list(asked.ignored),
            **times_ms,
        },
    }


def request_schema() -> dict[str, object]:
    """The request body for /openapi.json; `read_request` is what checks it."""
    text, number, whole = {"type": "string"}, {"type": "number"}, {"type": "integer"}
    kinds: dict[str, Mapping[str, object]] = {
        "prompt": {**text, "maxLength": LONGEST_PROMPT},
        "negative_prompt": {**text, "maxLength": LONGEST_PROMPT},
        "n": {**whole, "minimum": 1, "maximum": MOST_IMAGES},
        "seed": {**whole, "minimum": 0},
        "guidance_scale": number,
        "output_compression": whole,
        "partial_images": whole,
        "stream": {"type": "boolean"},
        **{name: {**text, "description": "accepted, without effect"} for name in IGNORED},
    }
    properties = {name: kinds.get(name, text) for name in FIELDS}
    schema = {"type": "object", "required": ["prompt"], "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
