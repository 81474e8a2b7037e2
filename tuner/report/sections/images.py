"""Images of the full schedule and the picks side by side."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from tuner.report.sections.marks import nearest_word
from tuner.report.words import (
    PICK_ORDER,
    find,
    name_of,
    roles_of,
)
from tuner.results.candidate import Sample
from tuner.results.result import StudyResult

DIFFERENCE_GAIN = 4


def images_section(result: StudyResult, run_dir: Path, pixels: int, rows: int) -> str:
    """Full schedule, one tuned schedule and their difference, per prompt."""
    if result.random_weights or not rows:
        return ""
    by_key: dict[str, dict[tuple[str, int], Sample]] = {}
    for sample in result.samples:
        by_key.setdefault(sample.key, {})[(sample.prompt, sample.seed)] = sample
    full = by_key.get(result.baseline.key, {})
    wanted = [*(result.picks[r] for r in PICK_ORDER if r in result.picks), *result.nearest, *by_key]
    other = next((k for k in wanted if k != result.baseline.key and by_key.get(k)), None)
    if not full:
        return ""
    out: list[str] = []
    missing = 0
    for identity, sample in full.items():
        if len(out) == rows:
            break
        before = _open(run_dir, sample.path)
        tuned = by_key[other].get(identity) if other else None
        after = _open(run_dir, tuned.path) if tuned else None
        if before is None or (other is not None and after is None):
            missing += 1
            continue
        cells = [("full schedule", before)]
        psnr = ""
        if after is not None and after.shape == before.shape:
            change = after.astype(np.int16) - before
            cells += [
                ("tuned", after),
                ("difference", np.clip(128 + DIFFERENCE_GAIN * change, 0, 255).astype(np.uint8)),
            ]
            error = float((change.astype(np.float64) ** 2).mean())
            psnr = "identical" if error == 0 else f"PSNR {10 * math.log10(255**2 / error):.1f} dB"
        figures = "".join(
            f'<img src="{_embed(image, pixels)}" alt="{escape(what)}: {escape(sample.prompt)}" loading="lazy"'
            f"{' class=pixels' if max(image.shape[:2]) < 128 else ''}>"
            for what, image in cells
        )
        small = " · ".join(filter(None, [f"seed {sample.seed}", psnr]))
        out.append(
            f'<figure class="trio n{len(cells)}"><figcaption>{escape(sample.prompt)}<small>{small}</small></figcaption>'
            f"{figures}</figure>"
        )
    if not out:
        return f'<p class="note">{missing} images named in study.json could not be read.</p>' if missing else ""
    who = ""
    if other is not None:
        candidate = find(result, other)
        roles = ", ".join(roles_of(result, other)) or (nearest_word(result) if other in result.nearest else "")
        name = name_of(result, candidate) if candidate else other
        who = (
            f"Left: the full schedule; middle: {escape(name)}{f' ({escape(roles)})' if roles else ''}; right: their "
            f"difference, amplified {DIFFERENCE_GAIN} times around gray. Same prompt, same seed."
        )
    else:
        who = "Images of the full schedule; there is no other schedule to compare with."
    lost = f" {missing} more could not be read." if missing else ""
    return f'<p class="note">{who}{lost}</p><div class="gallery">{"".join(out)}</div>'


def _open(run_dir: Path, name: str) -> np.ndarray | None:
    """Pixels (H, W, 3) uint8 of a file inside the run directory; None if it is elsewhere, missing or not an image."""
    path = (run_dir / name).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        return None
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _embed(pixels_HW3: np.ndarray, side: int) -> str:
    """A data URI: small images exact (PNG), large ones reduced to `side` (JPEG)."""
    image = Image.fromarray(pixels_HW3)
    exact = max(image.size) <= min(side, 128)
    if not exact:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if exact else "JPEG", **({"optimize": True} if exact else {"quality": 86}))
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
