"""Which models exist, and how each is loaded. Light data: importing this file imports no torch.

A family is a module with a builder; a model is one `ModelSpec` row that names it. Add a row here, call `register`, or
offer the row by entry point (stagevar.plugins), and the model works in every command.

Source: FoundationVision/Infinity, FoundationVision/VAR, Davinci-XLab/STAR-T2I, mit-han-lab/hart: sizes, file names and default
sampling (facts; 1B is the reference's infinity_layer24, 125M its infinity_layer12 with the d16 tokenizer).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagevar import plugins
from stagevar.errors import UsageError, hint
from stagevar.models.hub import HubFile
from stagevar.models.request import LoadRequest, ModelRequest
from stagevar.models.spec import ModelSpec
from stagevar.schedule.grids import STAR_SIDES, VAR_SIDES, Grid, infinity_grids, square
from stagevar.schedule.published import HART_SETTINGS, INFINITY_SETTINGS, STAR_SETTINGS, PublishedSettings
from stagevar.sections import shown

if TYPE_CHECKING:
    import torch

    from stagevar.models.base import LoadedModel

#: Group of entry points in which packages offer a ModelSpec.
MODELS = "stagevar.models"

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ the table

_INFINITY_REPO = "FoundationVision/Infinity"
#: The commit that added the 125M model: it has the 2B model and all stride-16 tokenizers. The 8B files came later, and
#: their commit is resolved at the first download and recorded.
_INFINITY_2B_COMMIT = "d4c15777e41bd36eb8eef5a854b018d19962b6d9"
FLAN_T5_XL = HubFile("google/flan-t5-xl", "", "7d6315df2c2fb742f0f5b556879d730926ca9001")
_TOKENIZER_D16 = HubFile(_INFINITY_REPO, "infinity_vae_d16.pth", _INFINITY_2B_COMMIT)
_TOKENIZER_D32 = HubFile(_INFINITY_REPO, "infinity_vae_d32reg.pth", _INFINITY_2B_COMMIT)
_TOKENIZER_D14 = HubFile(_INFINITY_REPO, "infinity_vae_d56_f8_14_patchify.pth")

#: Transformer sizes by the reference's model_type: depth, width, heads, chunks.
INFINITY_SIZES: dict[str, tuple[int, int, int, int]] = {
    "infinity_layer12": (12, 768, 8, 4),
    "infinity_layer16": (16, 1152, 12, 4),
    "infinity_layer24": (24, 1536, 16, 4),
    "infinity_layer32": (32, 2080, 20, 4),
    "infinity_layer40": (40, 2688, 24, 4),
    "infinity_layer48": (48, 3360, 28, 4),
    "infinity_2b": (32, 2048, 16, 8),
    "infinity_8b": (40, 3584, 28, 8),
    "infinity_20b": (58, 4608, 36, 2),
}


def infinity_settings(model_type: str, latent_dim: int = 32, patchify: bool = False) -> dict[str, Any]:
    """Constructor arguments of a public size with one of the public tokenizers."""
    depth, width, heads, chunks = INFINITY_SIZES[model_type]
    transformer = {"depth": depth, "width": width, "heads": heads, "chunks": chunks}
    return {"transformer": transformer, "latent_dim": latent_dim, "patchify": patchify}


def _infinity(name: str, summary: str, settings: dict[str, Any], first: str, **fields: Any) -> ModelSpec:
    resolutions = (first, *(r for r in ("1M", "0.60M", "0.25M", "0.06M") if r != first))
    module = "stagevar.models.infinity.loader"
    defaults = {"guidance": 3.0, "temperature": 0.5, "top_p": 0.97, "text": FLAN_T5_XL}
    return ModelSpec(
        name, "infinity", f"{module}:build", summary, resolutions, parts=f"{module}:parts", settings=settings,
        scales=lambda resolution: infinity_grids(resolution)[0], published=INFINITY_SETTINGS, **{**defaults, **fields},
    )  # fmt: skip


_VAR_REPO = "FoundationVision/var"
_TOKENIZER_VQ = HubFile(_VAR_REPO, "vae_ch160v4096z32.pth")
_STAR_REPO, _STAR_COMMIT = "taocrayon/STAR", "23fab671cb225c27a85321309129994498185338"
#: Stable Diffusion 2.1's text model and tokenizer, as STAR's repository keeps them.
_STAR_CLIP = HubFile(_STAR_REPO, "CLIP/", _STAR_COMMIT)
#: What `var-tiny` and `star-tiny` make small.
_TINY_VQ = {"codebook": {"vocabulary": 256, "code_dim": 8}, "base_ch": 32}
_TINY = {"depth": 4, "width": 128, "heads": 4}


def _vq(name: str, family: str, summary: str, pixels: int, transformer: dict[str, Any], **fields: Any) -> ModelSpec:
    """A row of VAR or STAR, with the references' sampling: VAR's cfg 1.5 as for its FID, STAR's 4 as for GenEval."""
    module = "stagevar.models.vq.loader"
    sides = (STAR_SIDES if family == "star" else VAR_SIDES)[pixels]
    guidance, top_k, top_p = (1 + 4.0, 600, 0.8) if family == "star" else (1 + 1.5, 900, 0.96)
    return ModelSpec(
        name, family, f"{module}:build", summary, (str(pixels),), guidance=guidance, temperature=1.0,
        top_k=top_k, top_p=top_p, parts=f"{module}:parts", tokenizer=_TOKENIZER_VQ,
        settings={"transformer": transformer, "sides": sides, **fields.pop("settings", {})},
        scales=lambda _: square(sides), published=STAR_SETTINGS if family == "star" else None, **fields,
    )  # fmt: skip


def _var(depth: int, pixels: int, parameters: str) -> ModelSpec:
    transformer = {"depth": depth, "width": 64 * depth, "heads": depth, "shared_adaln": depth == 36}
    return _vq(
        f"var-d{depth}", "var", f"VAR {parameters}, {pixels} px, class-conditional", pixels, transformer,
        weights=HubFile(_VAR_REPO, f"var_d{depth}.pth"),
    )  # fmt: skip


def _star(name: str, pixels: int, file: str) -> ModelSpec:
    return _vq(
        name, "star", f"STAR 1.7B, {pixels} px", pixels, {"depth": 30, "width": 1920, "heads": 30},
        weights=HubFile(_STAR_REPO, f"star_rope_d30_{file}.pth", _STAR_COMMIT), text=_STAR_CLIP,
    )  # fmt: skip


_HART_REPO = "mit-han-lab/hart-0.7b-1024px"


def _hart(name: str, summary: str, pixels: int, transformer: Mapping[str, object], **fields: Any) -> ModelSpec:
    """A row of HART, with the sampling of its scripts: cfg 4.5; from 600 codes, and from 300 on the later scales."""
    module, sides = "stagevar.models.hart.loader", STAR_SIDES[pixels]
    return ModelSpec(
        name, "hart", f"{module}:build", summary, (str(pixels),), guidance=1 + 4.5, temperature=1.0, top_k=600,
        parts=f"{module}:parts", settings={"transformer": transformer, "sides": sides, **fields.pop("settings", {})},
        scales=lambda _: square(sides), published=HART_SETTINGS, **fields,
    )  # fmt: skip


_HART_07B = {"depth": 24, "width": 1536, "heads": 24}
_QWEN = HubFile("mit-han-lab/Qwen2-VL-1.5B-Instruct", "")

_SPECS = (
    ModelSpec(
        "nano", "nano", "stagevar.models.nano.load:build", "the shipped model: colored shapes, made to run on two CPU cores",
        ("default",), guidance=3.0, temperature=(1.0, 1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2),
    ),
    _infinity(
        "infinity-tiny", "a few layers of Infinity on its real scales; random weights only, for trying the tools",
        {
            "transformer": {"depth": 8, "width": 256, "heads": 8, "chunks": 8, "text_dim": 256},
            "latent_dim": 8, "patchify": False, "base_ch": 32,
        },
        "0.06M", text=None,
    ),
    _infinity(
        "infinity-125m", "Infinity 125M, 256 px", infinity_settings("infinity_layer12", 16), "0.06M", guidance=4.0,
        weights=HubFile(_INFINITY_REPO, "infinity_125M_256x256.pth", _INFINITY_2B_COMMIT), tokenizer=_TOKENIZER_D16,
    ),
    _infinity(
        "infinity-1b", "Infinity 1B; architecture only, no public weights", infinity_settings("infinity_layer24"), "1M",
        tokenizer=_TOKENIZER_D32,
    ),
    _infinity(
        "infinity-2b", "Infinity 2B, 1024 px", infinity_settings("infinity_2b"), "1M",
        weights=HubFile(_INFINITY_REPO, "infinity_2b_reg.pth", _INFINITY_2B_COMMIT), tokenizer=_TOKENIZER_D32,
    ),
    _infinity(
        "infinity-8b", "Infinity 8B, 1024 px", infinity_settings("infinity_8b", 14, True), "1M", temperature=1.0,
        weights=HubFile(_INFINITY_REPO, "infinity_8b_weights/"), tokenizer=_TOKENIZER_D14,
    ),
    _infinity(
        "infinity-8b-512", "Infinity 8B, 512 px", infinity_settings("infinity_8b", 14, True), "0.25M", temperature=1.0,
        weights=HubFile(_INFINITY_REPO, "infinity_8b_512x512_weights/"), tokenizer=_TOKENIZER_D14,
    ),
    _infinity(
        "infinity-20b", "Infinity 20B; architecture only, no public weights", infinity_settings("infinity_20b"), "1M",
        tokenizer=_TOKENIZER_D32,
    ),
    _star("star-1.7b", 1024, "1024_drop_3-ar-ckpt-ep1-iter21000"),
    _star("star-1.7b-512", 512, "512-ar-ckpt-ep1-iter30000"),
    _star("star-1.7b-256", 256, "256-ar-ckpt-ep3-iter20000"),
    _vq(
        "star-tiny", "star", "a few layers of STAR on its 256 px scales; random weights only, for trying the tools",
        256, {**_TINY, "text_dim": 64}, settings=_TINY_VQ,
    ),
    _hart(
        "hart-0.7b", "HART 0.7B, 1024 px", 1024, _HART_07B, weights=HubFile(_HART_REPO, "llm/ema_model.bin"),
        tokenizer=HubFile(_HART_REPO, "tokenizer/"), text=_QWEN,
    ),
    _hart(
        "hart-0.7b-512", "HART 0.7B, 512 px; architecture only, no public weights", 512, _HART_07B,
        tokenizer=HubFile(_HART_REPO, "tokenizer/"), text=_QWEN,
    ),
    _hart(
        "hart-tiny", "a few layers of HART on its 256 px scales; random weights only, for trying the tools", 256,
        # As large as infinity-tiny: with fewer layers the decoder would take most of the time, and nothing could be saved.
        {"depth": 8, "width": 256, "heads": 8, "text_dim": 64, "text_tokens": 32, "head_width": 128, "head_depth": 2},
        settings=_TINY_VQ,
    ),
    _var(16, 256, "310M"),
    _var(20, 256, "600M"),
    _var(24, 256, "1.0B"),
    _var(30, 256, "2.0B"),
    _var(36, 512, "2.3B"),
    _vq(
        "var-tiny", "var", "a few layers of VAR on its 256 px scales; random weights only, for trying the tools",
        256, _TINY, settings=_TINY_VQ,
    ),
)  # fmt: skip

SPECS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}

#: pixel budgets by image side, so that `--resolution 1024` works too
_SIDES = {"1024": "1M", "768": "0.60M", "512": "0.25M", "256": "0.06M"}


# ------------------------------------------------------------------------------------------------ using it


def register(spec: ModelSpec) -> None:
    """Adds a model; a name that is taken by another spec is an error."""
    if SPECS.setdefault(spec.name, spec) != spec:
        raise ValueError(f"model {spec.name} is registered twice")


def model_names() -> tuple[str, ...]:
    """Every model's name, in the table's order, then those of plug-ins; imports none of them."""
    return (*SPECS, *plugins.offered(MODELS, SPECS))


def list_models() -> tuple[ModelSpec, ...]:
    """Every model, in the table's order, then those of plug-ins; one that cannot be loaded is left out with a warning."""
    found = list(SPECS.values())
    for plugin in plugins.offered(MODELS, SPECS).values():
        try:
            found.append(_plugged(plugin))
        except plugins.PluginError as error:
            log.warning("%s", error)
    return tuple(found)


def find(name: str) -> ModelSpec:
    """A model by name. Raises UsageError naming the nearest one, or the plug-in that cannot be loaded."""
    if name in SPECS:
        return SPECS[name]
    plugin = plugins.find(MODELS, name, SPECS)
    if plugin is not None:
        return _plugged(plugin)
    known = model_names()
    raise UsageError(f"unknown model {name!r:.60}{hint(name, known)}")


def _plugged(plugin: plugins.Plugin) -> ModelSpec:
    """The row that a package offers. Raises PluginError unless it is one and bears the plug-in's name."""
    spec = plugin.load()
    if not isinstance(spec, ModelSpec):
        raise plugin.wrong(f"must be a ModelSpec, not {type(spec).__name__}")
    if spec.name != plugin.name:
        raise plugin.wrong(f"is named {spec.name}; both names must be the same")
    return spec


def published(name: str) -> PublishedSettings | None:
    """The published settings of a model's family; None if there are none, and for models that are not registered."""
    return find(name).published if name in model_names() else None


def scale_grids(name: str, resolution: str | int | None = None) -> tuple[Grid, ...]:
    """Token grids of a model at a resolution (default: its first); loads nothing.

    Raises:
        UsageError: for an unknown model or resolution, and if only the loaded model knows its scales.
    """
    spec = find(name)
    if spec.scales is None:
        raise UsageError(f"the scales of {name} are not known before it is loaded")
    return spec.scales(resolution_of(name, resolution))


def resolution_of(name: str, resolution: str | int | None) -> str:
    """A model's resolution by its name or by an image side; its first one for None. Raises UsageError."""
    spec = find(name)
    chosen = spec.resolutions[0] if resolution is None else str(resolution)
    chosen = chosen if chosen in spec.resolutions else _SIDES.get(chosen, chosen)
    if chosen not in spec.resolutions:
        raise UsageError(f"{name} has no resolution {resolution!r:.60}; it has {', '.join(spec.resolutions)}")
    return chosen


def resolve(model: str | ModelRequest, **options: Any) -> LoadRequest:
    """Checks a request and fills in defaults, without loading anything. Arguments and errors as for `load_model`."""
    import torch

    from stagevar.tensors.cache import KV_CACHES

    asked = ModelRequest(model, **options) if isinstance(model, str) else dataclasses.replace(model, **options)
    ratio = 1.0 if asked.ratio is None else asked.ratio
    kv_cache = "model" if asked.kv_cache is None else asked.kv_cache
    spec = find(asked.name)
    chosen = resolution_of(asked.name, asked.resolution)
    if not 0 < ratio < math.inf:
        raise UsageError(f"aspect ratio {ratio!r} must be height / width, above 0")
    if asked.batch < 1:
        raise UsageError(f"batch {asked.batch} must be at least 1")
    if kv_cache not in KV_CACHES:
        raise UsageError(f"unknown kv cache {kv_cache!r:.60}; use {' or '.join(KV_CACHES)}")
    place = resolve_device(asked.device)
    dtype = asked.dtype
    return LoadRequest(
        spec=spec,
        resolution=chosen,
        ratio=float(ratio),
        device=place,
        dtype=dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype, place),
        weights=None if asked.weights is None else str(asked.weights),
        tokenizer=None if asked.tokenizer is None else Path(asked.tokenizer),
        text=None if asked.text is None else Path(asked.text),
        seed=asked.seed,
        guidance=_per_scale("guidance", asked.guidance),
        temperature=_per_scale("temperature", asked.temperature),
        batch=asked.batch,
        kv_cache=kv_cache,
        schedule=asked.schedule,
    )


def _per_scale(name: str, value: Any) -> float | tuple[float, ...] | None:
    """A setting of the sampling: a number or one per scale, of any kind. Raises UsageError for what cannot be drawn with."""
    if value is None:
        return None
    given = value.tolist() if hasattr(value, "tolist") else value  # numpy's and torch's numbers and arrays
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]
    usable = all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one < math.inf for one in numbers)
    if not numbers or not usable:
        raise UsageError(f"{name} {shown(value)} must be a finite number of at least 0, or a list with one per scale")
    if name == "temperature" and 0 in numbers:
        raise UsageError(f"temperature {shown(value)} must be above 0: the logits are divided by it")
    return tuple(map(float, numbers)) if isinstance(given, Sequence) else float(given)


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N". Raises UsageError for a device that does not exist."""
    import torch

    if isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, ValueError, OverflowError, TypeError):
        raise UsageError(f"unknown device {device!r:.60}; use auto, cpu, cuda or cuda:N") from None
    if place.type not in ("cpu", "cuda") or (place.type == "cpu" and place.index):
        raise UsageError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r} does not exist: {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return place


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The precision of a name, the device's usual one if none is asked for. Raises UsageError for an unknown name."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None or dtype == "auto":
        return _card_dtype(device) if device.type == "cuda" else torch.float32
    if dtype not in known:
        raise UsageError(f"unknown dtype {dtype!r:.60}; use auto, {', '.join(known)}")
    return known[dtype]


def _card_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float16 on cards before compute capability 8.0, whose tensor cores and fused attention lack the other."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def load_model(model: str | ModelRequest, **options: Any) -> LoadedModel:
    """A model ready for the sampler.

    Args:
        model: the name of one of `list_models()`, or a whole request.
        options: fields of `ModelRequest`: weights, resolution, device, dtype and the others.

    Raises:
        UsageError: unknown name or option value, or a model that cannot fit on the device.
        WeightsError: files that are missing, damaged or another model's.
    """
    request = resolve(model, **options)
    return pkgutil.resolve_name(request.spec.builder)(request)


def model_parts(request: LoadRequest) -> Any:
    """The model's modules on the meta device (stagevar.models.loading.Parts). Raises UsageError if it has none."""
    if not request.spec.parts:
        raise UsageError(f"{request.spec.name} ships in the package: there are no weight files to convert or measure")
    return pkgutil.resolve_name(request.spec.parts)(request)
