"""Strict loading of public and converted weights, straight to the target device and precision; and conversion.

A module is built on the meta device, so it has names and shapes but no memory. Each tensor of the file is then read
once (memory-mapped), cast on the target device and assigned. Nothing is executed from a file: safetensors, or
torch.load with weights_only. Every key must be known, present and of the right shape; the few exceptions are data
(`KeyRules`).

Source: file layouts of FoundationVision/Infinity, FoundationVision/VAR and Davinci-XLab/STAR-T2I (facts). Differs in
that the references load with strict=False and skip unknown keys silently.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from stagevar.errors import WeightsError, reason_of
from stagevar.models.checkpoint.kinds import kind_in_safetensors, kind_of, kind_of_dtype
from stagevar.models.checkpoint.names import bare_names, without_wrappers
from stagevar.models.checkpoint.state_dicts import find_state_dict

#: key -> dtype of that weight on the device; see `block_precision`.
Precision = Callable[[str], torch.dtype]

SHARD_BYTES = 4 * 2**30
#: File names of transformers and diffusers, the preferred first.
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True)
class KeyRules:
    """How a family's files differ from its module.

    nested: where in a checkpoint the state dict may sit, first match wins. dropped: patterns of keys that files carry
    and no model reads. optional: patterns of keys that a file may lack (filled with zeros). rename(key, expected) ->
    the module's name of a file's key. adapt: key -> function(value, wanted shape) for tensors whose length is free.
    """

    nested: tuple[tuple[str, ...], ...] = ()
    dropped: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rename: Callable[[str, Collection[str]], str] = lambda key, expected: key
    adapt: Mapping[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = field(default_factory=dict)


def block_precision(dtype: torch.dtype, prefixes: tuple[str, ...] = ("block_chunks.", "blocks.")) -> Precision:
    """`dtype` inside the transformer blocks, float32 elsewhere (embeddings, text layers, shared AdaLN, head)."""
    return lambda key: dtype if key.startswith(prefixes) else torch.float32


def everywhere(dtype: torch.dtype) -> Precision:
    """The same dtype for every weight."""
    return lambda key: dtype


# -------------------------------------------------------------------------------------------------- key rules


def null_text(shape: tuple[int, ...]) -> Tensor:
    """The reference's untrained null-prompt rows (text_maxlen, text_dim), which pad a shorter trained table."""
    rows = torch.empty(shape)
    nn.init.trunc_normal_(rows, std=1.2, generator=torch.Generator().manual_seed(0))
    return rows / math.sqrt(shape[1])


def fit_null_text(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A null-prompt table cut, or padded from the untrained one, to the wanted number of rows."""
    if value.ndim != 2 or value.shape[1] != shape[1]:
        return value
    if value.shape[0] >= shape[0]:
        return value[: shape[0]]
    return torch.cat([value, null_text(shape)[value.shape[0] :].to(value)])


def add_wrappers(key: str, expected: Collection[str]) -> str:
    """Puts back the `.conv` or `.norm` wrapper that some tokenizer files leave out."""
    if key in expected:
        return key
    stem, _, leaf = key.rpartition(".")
    for wrapper in ("conv", "norm"):
        if f"{stem}.{wrapper}.{leaf}" in expected:
            return f"{stem}.{wrapper}.{leaf}"
    return key


_MASKS = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
INFINITY_RULES = KeyRules(
    nested=(("trainer", "gpt_fsdp"), ("trainer", "gpt_wo_ddp"), ("trainer", "gpt_ema_fsdp"), ("gpt_fsdp",)),
    dropped=_MASKS,
    adapt={"cfg_uncond": fit_null_text},
)
#: Quantizer entries hold no weight that decoding from bits reads, so any of them may be there or not.
BSQVAE_RULES = KeyRules(
    nested=(("vae",), ("trainer", "vae"), ("ema",)),
    dropped=("quantizer.*", "quantize.*"),
    optional=("quantizer.lfq.mask", "quantize.lfq.mask"),
    rename=add_wrappers,
)
VAR_RULES = KeyRules(nested=(("trainer", "var_wo_ddp"),), dropped=_MASKS)
STAR_RULES = KeyRules(nested=(("trainer", "var_wo_ddp"),), dropped=_MASKS)


# -------------------------------------------------------------------------------------------------- readers


class TensorFile(ABC):
    """The tensors of one checkpoint, possibly sharded: shapes first, values one at a time.

    Args:
        shapes, kinds: by the name in the file; a kind is as `checkpoint.kinds` says it.
    """

    def __init__(self, files: Iterable[Path], shapes: dict[str, tuple[int, ...]], kinds: Mapping[str, str]):
        self.files, self.shapes, self.kinds = tuple(files), shapes, kinds

    @abstractmethod
    def read(self, key: str, device: torch.device) -> Tensor:
        """The tensor on `device`, in the file's dtype; on the CPU a view of the mapped file."""


class _SafetensorsFile(TensorFile):
    def __init__(self, paths: list[Path], device: torch.device):
        from safetensors import SafetensorError, safe_open

        shapes: dict[str, tuple[int, ...]] = {}
        kinds: dict[str, str] = {}
        self._handles: dict[str, safe_open] = {}
        for path in paths:
            try:
                handle = safe_open(str(path), framework="pt", device=str(device))
                for key in handle.keys():  # noqa: SIM118  the handle is not a mapping
                    entry = handle.get_slice(key)
                    shapes[key], kinds[key] = tuple(entry.get_shape()), kind_in_safetensors(entry.get_dtype())
                    self._handles[key] = handle
            except (SafetensorError, OSError, ValueError) as error:
                raise WeightsError(f"cannot read weights {path}: {_reason(error)}; download it again") from None
        super().__init__(paths, shapes, kinds)

    def read(self, key: str, device: torch.device) -> Tensor:
        return self._handles[key].get_tensor(key).to(device)


class _TorchFile(TensorFile):
    def __init__(self, paths: list[Path], nested: tuple[tuple[str, ...], ...], expected: Collection[str]):
        self._tensors: dict[str, Tensor] = {}
        for path in paths:
            loaded = _load_pickle(path)
            tensors = find_state_dict(loaded, nested, expected)
            if tensors is None:
                keys = ", ".join(map(str, list(loaded)[:6])) if isinstance(loaded, dict) else type(loaded).__name__
                raise WeightsError(
                    f"weights {path} hold no state dict of this model (found: {keys[:200] or 'nothing'})"
                )
            self._tensors.update(tensors)
        kinds = {key: kind_of(value) for key, value in self._tensors.items()}
        shapes = {key: () if kinds[key] == "nested" else tuple(value.shape) for key, value in self._tensors.items()}
        super().__init__(paths, shapes, kinds)

    def read(self, key: str, device: torch.device) -> Tensor:
        return self._tensors[key].to(device)


def _reason(error: BaseException) -> str:
    """The first sentence of a library's message."""
    return reason_of(error, 1000).split(". ")[0].rstrip(".")[:160]


def _load_pickle(path: Path) -> Any:
    """torch.load with weights_only, memory-mapped where the file's format allows."""
    # Trainers store their arguments beside the weights; a Namespace holds attributes and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used with files saved with" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "global" in str(error).lower():
                raise WeightsError(
                    f"weights {path} hold Python objects beside tensors and are not loaded; use a plain state dict"
                ) from None
            raise WeightsError(f"cannot read weights {path}: not a torch file, or corrupt; download it again") from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise WeightsError(f"cannot read weights {path}: {_reason(error)}; download it again") from None


def open_weights(
    path: Path | str,
    nested: tuple[tuple[str, ...], ...] = (),
    device: torch.device | str = "cpu",
    expected: Collection[str] = (),
) -> TensorFile:
    """Opens a .safetensors or torch file, a sharded folder or its index file, without reading tensor data.

    nested, expected: see `find_state_dict`.
    Raises WeightsError when it is missing, truncated, corrupt, unsafe or holds no state dict.
    """
    path, device = Path(path), torch.device(device)
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise WeightsError(f"no weights at {path}; give a file, a folder of shards, or 'random'")
    if path.name.endswith(".index.json"):
        paths, indexed = _shards(path)
    else:
        paths, indexed = [path], None
    if paths[0].suffix.lower() == ".safetensors":
        opened: TensorFile = _SafetensorsFile(paths, device)
    else:
        opened = _TorchFile(paths, nested, expected)
    if indexed is not None and len(opened.shapes) < len(indexed):
        raise WeightsError(f"shards of {path} hold {len(opened.shapes)} of {len(indexed)} tensors; download them again")
    return opened


def weights_in(folder: Path) -> Path:
    """The weights of a folder: an index of shards or a file under a usual name, else the only weights file there is.

    Raises WeightsError.
    """
    indices = [f"{stem}.{suffix}.index.json" for stem in _STEMS for suffix in ("safetensors", "bin")]
    singles = [f"{stem}.{suffix}" for suffix in ("safetensors", "bin") for stem in _STEMS]
    for name in (*indices, *singles):
        if (folder / name).is_file():
            return folder / name
    try:
        others = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES and path.name[0] != "."]
    except OSError as error:
        raise WeightsError(f"folder {folder} cannot be read: {error.strerror or error}") from None
    if len(others) == 1:
        return others[0]
    if others:
        raise WeightsError(
            f"folder {folder} holds {len(others)} weights files ({others[0].name}, ...); name one of them"
        )
    raise WeightsError(f"folder {folder} holds no weights ({', '.join(singles[:4])} or *.pth); name a file")


def _shards(index: Path) -> tuple[list[Path], set[str]]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        paths = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"cannot read shard index {index}: {_reason(error)}; download it again") from None
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(f"shard {missing[0]} that {index} lists is missing; download it again")
    if not names:
        raise WeightsError(f"shard index {index} lists no weights; download it again")
    return paths, set(weight_map)


# -------------------------------------------------------------------------------------------------- checking


def _some(keys: Collection[str], limit: int = 3) -> str:
    listed = sorted(keys)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A guess at whose weights these are, for error messages."""

    def blocks() -> int:
        return sum(1 for key in shapes if key.endswith(("sa.proj.weight", "attn.proj.weight")))

    if "cfg_uncond" in shapes and "word_embed.weight" in shapes:
        width, bits = shapes["word_embed.weight"]
        return f"an Infinity transformer of depth {blocks()}, width {width}, {bits} bits per token"
    if any(key.startswith("decoder.") for key in shapes):
        first = shapes.get("decoder.conv_in.conv.weight") or shapes.get("decoder.conv_in.weight")
        return f"an image tokenizer with {first[1]} latent channels" if first else "an image tokenizer"
    if "class_emb.weight" in shapes and "word_embed.weight" in shapes:
        family = "STAR" if "encoder_proj.weight" in shapes else "VAR"
        return f"a {family} transformer of depth {blocks()}, width {shapes['word_embed.weight'][0]}"
    return "not a model known here"


def check_keys(
    file: TensorFile,
    expected: Mapping[str, tuple[int, ...]],
    rules: KeyRules,
    what: str,
    kinds: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], set[str]]:
    """Matches a file's keys to a module's: ({module key: file key}, module keys to fill with zeros).

    Parts of names that wrappers add do not count. kinds: of the module's tensors, see `checkpoint.kinds`.
    Raises WeightsError in one line naming missing, unknown and mis-shaped keys, and tensors that cannot be weights.
    """
    kinds = kinds or {}
    own = {without_wrappers(key): key for key in expected}
    source: dict[str, str] = {}
    unknown, twice = set(), set()
    bare = bare_names(file.shapes, own)
    for key, short in bare.items():
        name = own.get(rules.rename(short, own.keys()))
        if name is not None:
            twice |= {name} & source.keys()
            source[name] = key
        elif file.shapes[key] != () and not _matches(short, rules.dropped):
            unknown.add(key)  # counters of trainers have no dimensions
    absent = set(expected) - set(source)
    zeros = {key for key in absent if _matches(key, rules.optional)}
    missing = absent - zeros
    misshaped = {
        f"{key} {list(file.shapes[source[key]])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in source
        and file.shapes[source[key]] != tuple(shape)
        and not _adaptable(rules, key, file, source, shape)
    }
    unusable = {
        f"{key} is {file.kinds[name]}, not {kind}"
        for key, kind in kinds.items()
        if (name := source.get(key)) is not None and file.kinds[name] != kind
    }
    problems = [
        f"{len(keys)} {label} ({_some(keys)})"
        for label, keys in (
            ("missing", missing),
            ("unknown", unknown),
            ("mis-shaped", misshaped),
            ("of another kind", unusable),
            ("there twice", twice),
        )
        if keys
    ]
    if problems:
        whose = looks_like({bare[key]: shape for key, shape in file.shapes.items()})
        guess = f"; the file looks like {whose}" if len(missing) + len(misshaped) > 3 else ""
        raise WeightsError(f"weights {file.files[0]} do not fit {what}: {', '.join(problems)}{guess}")
    return source, zeros


def _adaptable(rules: KeyRules, key: str, file: TensorFile, source: Mapping[str, str], shape: tuple[int, ...]) -> bool:
    if key not in rules.adapt:
        return False
    on_meta = torch.empty(file.shapes[source[key]], device="meta")
    return tuple(rules.adapt[key](on_meta, tuple(shape)).shape) == tuple(shape)


# -------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Fit:
    """A file that was found to fit a module, key by key, and has not been read yet. Made by `fit`."""

    module: nn.Module
    file: TensorFile
    source: Mapping[str, str]
    zeros: Collection[str]
    rules: KeyRules
    device: torch.device

    def load(self, precision: Precision | None = None) -> tuple[Path, ...]:
        """Gives the module its weights, and returns the files that were read.

        precision: dtype per key for floating-point weights; None keeps the file's. On the CPU a weight that keeps its
        precision is a view of the mapped file. Raises WeightsError for a file that cannot be read after all.
        """
        loaded: dict[str, Tensor] = {}
        for key, value in self.module.state_dict().items():
            dtype = precision(key) if precision and value.is_floating_point() else None
            if key in self.zeros:
                loaded[key] = torch.zeros(value.shape, dtype=dtype or value.dtype, device=self.device)
                continue
            try:
                tensor = self.file.read(self.source[key], self.device)
            except Exception as error:
                raise WeightsError(
                    f"cannot read {self.source[key]} of {self.file.files[0]}: {_reason(error)}"
                ) from None
            if key in self.rules.adapt:
                tensor = self.rules.adapt[key](tensor, tuple(value.shape))
            loaded[key] = tensor.to(dtype or tensor.dtype).contiguous()
        _assign(self.module, loaded)
        return self.file.files


def fit(
    module: nn.Module,
    path: Path | str,
    *,
    what: str,
    rules: KeyRules | None = None,
    device: torch.device | str = "cpu",
) -> Fit:
    """Opens a file and checks it against a module (usually built on the meta device); reads no weights yet.

    what: the model's name, for messages. Raises WeightsError, see `open_weights` and `check_keys`.
    """
    rules, device = rules or KeyRules(), torch.device(device)
    state = module.state_dict()
    file = open_weights(path, rules.nested, device, state.keys())
    expected = {key: tuple(value.shape) for key, value in state.items()}
    kinds = {key: kind_of_dtype(value.dtype) for key, value in state.items()}
    source, zeros = check_keys(file, expected, rules, what, kinds)
    return Fit(module, file, source, zeros, rules, device)


def load_into(
    module: nn.Module,
    path: Path | str,
    *,
    what: str,
    rules: KeyRules | None = None,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
) -> tuple[Path, ...]:
    """`fit` and then `load`."""
    return fit(module, path, what=what, rules=rules, device=device).load(precision)


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False).eval()
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    assert not left, f"{type(module).__name__} keeps {left[:3]} outside its state dict on the meta device"


def randomize(
    module: nn.Module, seed: int, *, device: torch.device | str = "cpu", precision: Precision | None = None
) -> None:
    """Seeded random weights for a module built on the meta device: real sizes, for latency work only.

    Every tensor has its own stream, keyed by (seed, key), so weights do not depend on the order of keys. Scales are
    those that keep activations finite through deep models: fan-in for matrices, one for norms, small biases and gates.
    Integer buffers are zero. Values differ between device types.
    """
    device = torch.device(device)
    tensors: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            tensors[key] = torch.zeros(value.shape, dtype=value.dtype, device=device)
            continue
        dtype = precision(key) if precision else value.dtype
        generator = torch.Generator(device).manual_seed(zlib.crc32(key.encode()) ^ (seed * 0x9E3779B1 & 0x7FFFFFFF))
        mean, spread = _random_scale(key, tuple(value.shape))
        tensors[key] = torch.empty(value.shape, device=device, dtype=dtype).normal_(mean, spread, generator=generator)
    _assign(module, tensors)


def _random_scale(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a random weight, by the last part of its name."""
    last = key.rpartition(".")[2]
    if last == "zero_k_bias":
        return 0.0, 0.0
    if last.startswith("scale_mul"):
        return math.log(4.0), 0.1
    if last == "weight":
        return (1.0, 0.1) if len(shape) == 1 else (0.0, 1.0 / math.sqrt(math.prod(shape[1:])))
    if last.endswith("bias"):
        return 0.0, 0.05
    return 0.0, 0.2


# -------------------------------------------------------------------------------------------------- converting


def save_weights(module: nn.Module, folder: Path, stem: str, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes a module as `stem`.safetensors, or as shards plus `stem`.safetensors.index.json above `shard_bytes`.

    One shard at a time is copied to memory. Returns the files to open (the index first when there is one).
    """
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in module.state_dict().items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        # Clones, since two names may share storage (the tokenizer's quantizer is registered twice).
        save_file({key: value.detach().cpu().clone() for key, value in shard.items()}, folder / name)
    paths = [folder / name for name in names]
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = folder / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}, indent=1))
        paths.insert(0, index)
    return paths
