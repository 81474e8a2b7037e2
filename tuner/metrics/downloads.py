"""Files of metrics, by metric and options: what is fetched when they are built, and local files that are not there.

Nothing is imported or fetched here, no host asked.

Sizes are estimates: published numbers of parameters in float32, or the sizes of published files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from stagevar.errors import UsageError
from stagevar.models.downloads import Download
from stagevar.models.hub import HubFile
from tuner.metrics.quality_spec import QualitySpec

_MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
#: Where a metric's default weights come from, and about how many bytes: 69 M parameters of Mask2Former, 428 M of CLIP ViT-L/14.
_DETECTORS = {
    "mask2former": (_MASK2FORMER, 4 * 69_000_000),
    "rtdetr": ("PekingU/rtdetr_r50vd", 4 * 43_000_000),
    "owlv2": ("google/owlv2-base-patch16-ensemble", 4 * 155_000_000),
}
_TRUNKS = {"alex": ("alexnet", 244_408_911), "vgg": ("vgg16", 553_433_881)}
#: Public files at the revision that a metric was written for, and their bytes.
HPSV2 = "xswu/HPSv2/HPS_v2.1_compressed.pt@697403c78157020a1ae59d23f111aa58ced35b0a"
IMAGE_REWARD = "zai-org/ImageReward/ImageReward.pt@5736be03b2652728fb87788c9797b0570450ab72"
IMAGE_REWARD_TOKENIZER = "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594"
PICKSCORE = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c"
HPSV3 = "MizzenAI/HPSv3/HPSv3.safetensors@4f81e3e09edd82fe3c5f636444c721b592a735ca"
HPSV3_BASE = "Qwen/Qwen2-VL-7B-Instruct"  # only its configuration and processor
#: The model that GenEval 2's authors use; they name no revision.
GENEVAL2_MODEL = "Qwen/Qwen3-VL-8B-Instruct"
#: Metric -> option that takes a path or another model, its default on the hub, bytes. Parameters in millions: BLIP-VQA 385,
#: DINO ViT-S/16 22, DINOv2 ViT-L/14 304, Qwen3-VL 8767 in half precision.
_SINGLE = {
    "hpsv2": ("weights", HPSV2, 1_972_490_005),
    "image_reward": ("weights", IMAGE_REWARD, 1_786_880_927),
    "pickscore": ("model", PICKSCORE, 3_944_552_236),
    "hpsv3": ("weights", HPSV3, 2 * 8_291_000_000),
    "geneval2": ("model", GENEVAL2_MODEL, 2 * 8_767_000_000),
    "dpg": ("model", "Salesforce/blip-vqa-capfilt-large", 4 * 385_000_000),
    "dino": ("model", "facebook/dino-vits16", 4 * 22_000_000),
    "fid_dinov2": ("model", "facebook/dinov2-large", 4 * 304_000_000),
}
#: The FID papers' Inception as torch-fidelity publishes it: 24 M parameters.
_INCEPTION = ("torch-fidelity pt_inception-2015-12-05", 4 * 24_000_000)
_CLIP_BYTES = {"ViT-L-14": 4 * 428_000_000, "ViT-L-14-336": 4 * 428_000_000}
#: Metric -> its options that name a CLIP model and the model's tag.
_CLIP = {
    "clip_score": ("model", "pretrained"),
    "clip_image_similarity": ("model", "pretrained"),
    "geneval": ("clip_model", "clip_pretrained"),
    "cmmd": ("model", "pretrained"),
}
_DEFAULT_CLIP = {"cmmd": "ViT-L-14-336"}

#: How paths begin, and how files of weights and of questions end; names on a hub, tags and architectures do neither.
_PATH_STARTS = ("/", "./", "../", "~")
_FILE_ENDS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json", ".jsonl", ".csv", ".tsv", ".txt")
_LOCAL_DIR = "local-dir:"


def missing_files(metric: str, options: Mapping[str, object]) -> list[str]:
    """A line for each path among a metric's options, also one of a plug-in, where there is neither file nor folder."""
    paths = {name: path for name, value in options.items() if (path := _path_of(value)) is not None}
    return [
        f"metric {metric}: {name} {path:.200} does not exist; give a file or folder that does, or leave out the option"
        for name, path in paths.items()
        if not os.path.exists(path)
    ]


def check_files(metric: str, options: Mapping[str, object]) -> None:
    """Raises UsageError for the first path among a metric's options that does not exist."""
    for line in missing_files(metric, options):
        raise UsageError(line)


def _path_of(value: object) -> str | None:
    """The path that an option names, None for anything else; so for `hub:` and `hf-hub:`."""
    if not isinstance(value, str):
        return None
    if value.startswith(_LOCAL_DIR):
        return value.removeprefix(_LOCAL_DIR)
    scheme = value.partition("/")[0]
    return value if ":" not in scheme and (value.startswith(_PATH_STARTS) or value.endswith(_FILE_ENDS)) else None


def metric_downloads(quality: Mapping[str, QualitySpec]) -> list[Download]:
    """What the metrics of a space fetch, each once; local files and folders are left out."""
    found: dict[str, Download] = {}
    for metric, spec in quality.items():
        for download in _of(metric, spec.options):
            found.setdefault(download.source, download)
    return list(found.values())


def _of(metric: str, options: Mapping[str, Any]) -> list[Download]:
    found = []
    if metric == "geneval":
        kind, given = options.get("detector", "mask2former"), options.get("detector_model")
        if given is None and kind in _DETECTORS:
            repo, size = _DETECTORS[kind]
            found.append(Download("detector of geneval", repo, size, _cached(repo)))
    if metric in _CLIP:
        model, tag = (options.get(name) for name in _CLIP[metric])
        model, tag = model or _DEFAULT_CLIP.get(metric, "ViT-L-14"), tag or "openai"
        if model != "nano" and not model.startswith(_LOCAL_DIR) and "/" not in tag:
            found.append(
                Download("CLIP model of the metrics", f"open_clip {model} {tag}", _CLIP_BYTES.get(model), None)
            )
    if metric in ("lpips", "dists") and options.get("weights") is None:
        name, size = _TRUNKS["vgg" if metric == "dists" else options.get("net", "alex")]
        found.append(Download(f"network of {metric}", f"torchvision {name}", size, None))
    if metric in _SINGLE:
        option, repo, size = _SINGLE[metric]
        if options.get(option) is None:
            found.append(Download(f"model of {metric}", repo, size, _cached(repo)))
    inception = metric in ("fid", "kid", "is") and options.get("extractor", "inception") == "inception"
    if inception and options.get("weights") is None:
        found.append(Download(f"network of {metric}", *_INCEPTION, None))
    return found


def _cached(source: str) -> bool | None:
    """Whether `source` is cached: organization/repository, then optionally /file and @revision."""
    from stagevar.models.downloads import is_cached

    name, _, revision = source.partition("@")
    organization, repository, *path = name.split("/", 2)
    return is_cached(HubFile(f"{organization}/{repository}", "".join(path), revision or "main"))
