"""Measures nano: `python -m training.nano.evaluate [--weights DIR] [--pictures DIR] [--json FILE]`.

With fixed prompts and seeds and the full schedule: GenEval's six scores, their mean first, and our texture score on
held-out prompts; the same on shape-color pairs never trained; without guidance; and with the last scales skipped.
Also what the tokenizer keeps after each late scale, how far images lie from the nearest of the scenes they were trained
on, and pictures: samples, partial images, neighbors.

Source: scoring is stagevar.prompts.geneval; the nearest-neighbor look follows common practice for generative models.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from stagevar.errors import StagevarError, UsageError
from stagevar.images import psnr_db, ssim
from stagevar.models.base import LoadedModel, Sampling
from stagevar.models.nano import drawing, scenes
from stagevar.models.nano.checker import check_batch, detect
from stagevar.models.nano.load import read_preset, shipped_folder
from stagevar.models.registry import load_model
from stagevar.prompts.geneval import judge, summarize
from stagevar.sampling.sampler import Sampler
from stagevar.schedule import StageSchedule, exact, skip_only
from training.nano.clip import NanoClip, compacted
from training.nano.jobs import TransformerJob
from training.nano.train import RECIPES, Recipe

BATCH = 32
# Steps and seed of the shipped transformer's last piece of training, whose scenes can be drawn again (docs/nano.md).
SHIPPED_RECIPE = replace(RECIPES["transformer"], steps=1800, seed=32)
# The step at which the current task weights were introduced; scenes of earlier ones cannot be drawn again.
SHIPPED_FROM = 517


class Evaluation:
    """A loaded nano and its CLIP, ready to draw prompts and judge the images."""

    def __init__(self, folder: Path, guidance: float | None = None, temperature: float | None = None):
        chosen = {k: v for k, v in {"guidance": guidance, "temperature": temperature}.items() if v is not None}
        self.folder = folder
        self.config = read_preset(folder)
        self.model: LoadedModel = load_model("nano", weights=str(folder), device="cpu", **chosen)
        self.sampler = Sampler(self.model)
        self.clip: NanoClip | None = None
        if (folder / "open_clip_model.safetensors").exists():
            self.clip = NanoClip().eval()
            self.clip.load_state_dict(compacted(load_file(folder / "open_clip_model.safetensors")))

    def images(
        self, prompts: list[scenes.Metadata], schedule: StageSchedule | None = None, sampling: Sampling | None = None
    ) -> np.ndarray:
        """Images uint8 (N, H, W, 3); the seed of a prompt is its index."""
        schedule = schedule or exact(len(self.model.grids))
        steps = schedule.expand(self.model.grids, self.sampler.chunks)
        parts = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            texts, seeds = [m["prompt"] for m in batch], [m["index"] for m in batch]
            parts.append(self.sampler.generate(texts, seeds, steps, sampling=sampling))
        return np.concatenate(parts)

    def partial_images(self, prompts: list[scenes.Metadata]) -> np.ndarray:
        """What the code sum decodes to after every scale, uint8 (K, N, H, W, 3)."""
        steps = exact(len(self.model.grids)).expand(self.model.grids, self.sampler.chunks)
        generation = self.sampler.begin([m["prompt"] for m in prompts], [m["index"] for m in prompts], steps=steps)
        found = []
        for step in steps:
            self.sampler.advance(generation, step)
            found.append(self.sampler.decode(generation))
        return np.stack(found)

    @torch.inference_mode()
    def image_features(self, images_BHW3: np.ndarray) -> torch.Tensor:
        """Unit CLIP features (B, D) of uint8 images."""
        assert self.clip is not None
        side = self.clip.visual.conv1.stride[0] * int((self.clip.visual.positional_embedding.shape[0] - 1) ** 0.5)
        pixels = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float() / 127.5 - 1
        if pixels.shape[-1] != side:
            pixels = torch.nn.functional.interpolate(pixels, size=side, mode="area")
        return torch.cat([self.clip.encode_image(part) for part in pixels.split(256)])


def judged(images_BHW3: np.ndarray, prompts: list[scenes.Metadata]) -> np.ndarray:
    """GenEval verdicts (B,) as booleans."""
    pixels = images_BHW3.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return np.array([judge(meta, detect(image)).correct for image, meta in zip(pixels, prompts, strict=True)])


def scores(correct_B: np.ndarray, prompts: list[scenes.Metadata]) -> dict[str, Any]:
    """Mean of the GenEval tasks first, then one score per task and the number of images."""
    rows = [{"tag": m["tag"], "correct": bool(c)} for m, c in zip(prompts, correct_B, strict=True)]
    tags = summarize(rows).tags
    six = [tags[t] for t in scenes.GENEVAL_TASKS if t in tags]
    return {"geneval_mean": float(np.mean(six)), **{t: tags[t] for t in scenes.TASKS if t in tags}, "images": len(rows)}


def trained_scenes(
    folder: Path, count: int, recipe: Recipe = SHIPPED_RECIPE, first: int = SHIPPED_FROM
) -> tuple[np.ndarray, list[str]]:
    """Images the transformer was trained on, uint8 (N, H, W, 3), and captions: the stream of its seed drawn again.

    Evenly from all steps of the recipe from `first` on.
    """
    config = read_preset(folder)
    images, captions = [], []
    per_step = min(recipe.batch // 3, -(-count // (recipe.steps - first)))  # the smallest batches hold a third
    for step in np.linspace(first, recipe.steps - 1, -(-count // per_step)).astype(int):
        rng = np.random.default_rng([recipe.seed, int(step)])
        world, _ = TransformerJob.world(config, rng, recipe.batch, int(step) / recipe.steps)
        pixels = drawing.draw(world, config.image_size)[:per_step]
        images.append((pixels * 255).astype(np.uint8).transpose(0, 2, 3, 1))
        captions += world.captions[:per_step]
    return np.concatenate(images)[:count], captions[:count]


def checker_accuracy(evaluation: Evaluation, count: int, seed: int = 5) -> dict[str, float]:
    """Share of fresh scenes that the checker accepts: as drawn, through the tokenizer, and against another prompt.

    "after_side_S" are reconstructions from the code sum after that scale, with their PSNR in dB; the last is the whole.
    "another_prompt": drawn scenes judged by a different prompt of the same task (some of which they satisfy by chance).
    """
    rng = np.random.default_rng(seed)
    world = scenes.sample(count, rng, split="heldout")
    drawn = drawing.draw(world, evaluation.config.image_size)
    metadata, tokenizer = world.metadata, evaluation.model.tokenizer
    others = []
    for meta in metadata:
        rivals = [m for m in metadata if m["tag"] == meta["tag"] and m["prompt"] != meta["prompt"]]
        others.append(rivals[int(rng.integers(len(rivals)))])
    found = {
        "drawn": float(check_batch(drawn, metadata).mean()),
        "another_prompt": float(check_batch(drawn, others).mean()),
    }
    with torch.inference_mode():
        parts = [tokenizer.partial_sums(tokenizer.encode(x * 2 - 1)) for x in torch.from_numpy(drawn).split(250)]
        for side, code_sum in list(zip(evaluation.config.scales, torch.cat(parts, dim=1), strict=True))[-3:]:
            pixels = (tokenizer.decode(code_sum) / 2 + 0.5).clamp(0, 1).numpy()
            found[f"after_side_{side}"] = float(check_batch(pixels, metadata).mean())
            found[f"psnr_db_after_side_{side}"] = float(-10 * np.log10(((pixels - drawn) ** 2).mean((1, 2, 3))).mean())
    return found


def clip_accuracy(evaluation: Evaluation, images: int, seed: int = 11) -> float:
    """Share of fresh scenes whose caption wins among 64: its own and 63 that the scene does not satisfy."""
    from training.nano.clip import tokenize

    assert evaluation.clip is not None
    rng = np.random.default_rng(seed)
    world = scenes.sample(images, rng, split="heldout")
    pixels = drawing.draw(world, evaluation.config.image_size)
    others = [m for split in ("heldout", "search") for m in scenes.prompts(split, 700, seed)]
    features = evaluation.image_features((pixels * 255).astype(np.uint8).transpose(0, 2, 3, 1))
    with torch.inference_mode():
        texts = [m["prompt"] for m in others]
        candidates = evaluation.clip.encode_text(tokenize(texts))
        own = evaluation.clip.encode_text(tokenize(world.captions))
    hits = 0
    for image in range(images):
        found = detect(pixels[image])
        wrong: list[int] = []
        for j in rng.permutation(len(others)):
            if texts[j] != world.captions[image] and not judge(others[j], found).correct:
                wrong.append(int(j))
            if len(wrong) == 63:
                break
        hits += bool(features[image] @ own[image] > (candidates[wrong] @ features[image]).max())
    return hits / images


# ------------------------------------------------------------------------------------------------------------ pictures


def sheet(images_NHW3: np.ndarray, captions: list[str], columns: int, zoom: int = 3) -> Image.Image:
    """Images in rows with their captions underneath."""
    side = images_NHW3.shape[1] * zoom
    text_height = 34 if any(captions) else 0
    rows = -(-len(images_NHW3) // columns)
    canvas = Image.new("RGB", (columns * (side + 6), rows * (side + text_height + 4)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (image, caption) in enumerate(zip(images_NHW3, captions, strict=True)):
        x, y = (k % columns) * (side + 6), (k // columns) * (side + text_height + 4)
        canvas.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        words, line, lines = caption.replace("a photo of ", "").split(), "", []
        for word in words:
            if pen.textlength(f"{line} {word}") > side:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        pen.multiline_text((x, y + side + 1), "\n".join([*lines, line]), fill="black", spacing=1)
    return canvas


def save_pictures(evaluation: Evaluation, folder: Path, samples: int, training_images: int) -> dict[str, Any]:
    """Writes the sheets and returns the nearest-neighbor figures."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = scenes.prompts("heldout", samples)
    images = evaluation.images(prompts)
    sheet(images, [m["prompt"] for m in prompts], 8).save(folder / "nano_samples.png")
    first = scenes.prompts("heldout", 14, seed=1)
    partial = evaluation.partial_images(first)
    labels = [f"{m['prompt']}" if k == len(partial) - 1 else "" for m in first for k in range(len(partial))]
    by_prompt = partial.transpose(1, 0, 2, 3, 4).reshape(-1, *partial.shape[2:])
    two_wide = np.concatenate([by_prompt.reshape(2, 7, len(partial), *partial.shape[2:])[h] for h in (0, 1)], axis=1)
    two_labels = np.concatenate(list(np.array(labels).reshape(2, 7, len(partial))), axis=1)
    sheet(two_wide.reshape(-1, *partial.shape[2:]), two_labels.reshape(-1).tolist(), 2 * len(partial)).save(
        folder / "nano_scales.png"
    )
    if evaluation.clip is None:
        return {}
    known, captions = trained_scenes(evaluation.folder, training_images)
    similarity = evaluation.image_features(images) @ evaluation.image_features(known).T
    nearest = similarity.argmax(1)
    pairs = np.stack([images, known[nearest.numpy()]], axis=1).reshape(-1, *images.shape[1:])
    words = []
    for meta, k in zip(prompts, nearest.tolist(), strict=True):
        words += [meta["prompt"], "trained: " + captions[k]]
    sheet(pairs, words, 16, zoom=2).save(folder / "nano_nearest.png")
    fresh = drawing.draw(scenes.sample(64, np.random.default_rng(99), split="heldout"), evaluation.config.image_size)
    reference = evaluation.image_features((fresh * 255).astype(np.uint8).transpose(0, 2, 3, 1))
    fresh_nearest = (reference @ evaluation.image_features(known).T).amax(1)
    return {
        "training_images": len(known),
        "nearest_similarity_median": float(similarity.amax(1).median()),
        "nearest_psnr_db_max": float(psnr_db(images, known[nearest.numpy()]).max()),
        "fresh_scene_nearest_similarity_median": float(fresh_nearest.median()),
    }


# ----------------------------------------------------------------------------------------------------------- the report


def evaluate(evaluation: Evaluation, count: int, unseen: int, clip_images: int, checker_scenes: int) -> dict[str, Any]:
    """All figures except the pictures'."""
    model = evaluation.model
    report: dict[str, Any] = {
        "preset": evaluation.config.name,
        "guidance_per_scale": model.sampling.guidance,
        "temperature_per_scale": model.sampling.temperature,
        "transformer_parameters": sum(p.numel() for p in model.transformer.parameters()),
    }
    heldout = scenes.prompts("heldout", count)
    start = time.monotonic()
    full = evaluation.images(heldout)
    report["seconds_per_image"] = (time.monotonic() - start) / count
    report["full"] = scores(judged(full, heldout), heldout)
    report["training_texts"] = scores(judged(evaluation.images(known := scenes.prompts("train", count)), known), known)
    other = scenes.prompts("unseen", unseen)
    report["unseen_pairs"] = scores(judged(evaluation.images(other), other), other)
    plain = replace(model.sampling, guidance=(1.0,) * len(model.grids))
    report["guidance_1"] = scores(judged(evaluation.images(heldout, sampling=plain), heldout), heldout)
    for name, left_out in (("skip_last_scale", 1), ("skip_last_two_scales", 2)):
        skipped = evaluation.images(heldout, skip_only(model.grids, left_out))
        report[name] = scores(judged(skipped, heldout), heldout)
        report[name]["psnr_db_to_full"] = float(psnr_db(skipped, full).mean())
        report[name]["ssim_to_full"] = float(ssim(skipped, full).mean())
        if evaluation.clip is not None:
            similarity = (evaluation.image_features(skipped) * evaluation.image_features(full)).sum(1)
            report[name]["clip_image_similarity_to_full"] = float(similarity.mean())
    if evaluation.clip is not None:
        report["clip_right_of_64"] = clip_accuracy(evaluation, clip_images)
    report["checker"] = checker_accuracy(evaluation, checker_scenes)
    return report


def table(report: dict[str, Any]) -> str:
    """The scores as text, one row per condition."""
    names = ("geneval_mean", *scenes.TASKS)
    lines = [f"{'':22}" + "".join(f"{name:>15}" for name in names)]
    for row in ("full", "training_texts", "unseen_pairs", "guidance_1", "skip_last_scale", "skip_last_two_scales"):
        cells = "".join(f"{report[row][name]:15.3f}" if name in report[row] else f"{'-':>15}" for name in names)
        lines.append(f"{row:22}" + cells)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m training.nano.evaluate", description=__doc__.splitlines()[0])
    p.add_argument("--weights", type=Path, default=None, help="folder of weights (default: the shipped ones)")
    p.add_argument("--prompts", type=int, default=512, help="held-out prompts")
    p.add_argument("--unseen", type=int, default=200, help="prompts that name an unseen pair")
    p.add_argument("--clip-images", type=int, default=300, help="fresh scenes for CLIP's accuracy")
    p.add_argument("--checker-scenes", type=int, default=1000, help="fresh scenes for the checker's accuracy")
    p.add_argument("--guidance", type=float)
    p.add_argument("--temperature", type=float)
    p.add_argument("--pictures", type=Path, help="folder for the sheets of images")
    p.add_argument("--samples", type=int, default=64, help="images on the sheet of samples")
    p.add_argument("--training-images", type=int, default=20000, help="trained scenes searched for neighbors")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args(argv)
    try:
        for name in ("prompts", "unseen"):
            if getattr(args, name) < len(scenes.TASKS):
                raise UsageError(f"--{name} {getattr(args, name)} must be at least {len(scenes.TASKS)}, one per task")
        evaluation = Evaluation(args.weights or shipped_folder(), args.guidance, args.temperature)
        report = evaluate(evaluation, args.prompts, args.unseen, args.clip_images, args.checker_scenes)
        print(table(report))
        if args.pictures:
            report["neighbors"] = save_pictures(evaluation, args.pictures, args.samples, args.training_images)
        text = json.dumps(report, indent=1)
        print(text)
        if args.json:
            args.json.write_text(text + "\n")
    except StagevarError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
