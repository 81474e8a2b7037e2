"""Strict loading of public and converted weights, directly to the target device and precision.

A module is built on the meta device, so it has names and shapes but no memory. Each tensor of the file is then read
once (memory-mapped), cast on the target device and assigned. Every key must be known, present and of the right shape;
the few exceptions are data (`KeyRules`).

Source: file layouts of FoundationVision/Infinity, FoundationVision/VAR and Davinci-XLab/STAR-T2I (facts). Differs in
that the references load with strict=False and skip unknown keys silently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from stagevar.errors import WeightsError
from stagevar.models.checkpoint.key_rules import KeyRules
from stagevar.models.checkpoint.kinds import kind_of_dtype
from stagevar.models.checkpoint.names import bare_names, without_wrappers
from stagevar.models.checkpoint.tensor_files import TensorFile, open_weights, read_error

#: key -> dtype of that weight on the device; see `block_precision`.
Precision = Callable[[str], torch.dtype]


def block_precision(dtype: torch.dtype, prefixes: tuple[str, ...] = ("block_chunks.", "blocks.")) -> Precision:
    """`dtype` inside the transformer blocks, float32 elsewhere (embeddings, text layers, shared AdaLN, head)."""
    return lambda key: dtype if key.startswith(prefixes) else torch.float32


def everywhere(dtype: torch.dtype) -> Precision:
    """The same dtype for every weight."""
    return lambda key: dtype


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
    return "not a known model"


def check_keys(
    file: TensorFile,
    expected: Mapping[str, tuple[int, ...]],
    rules: KeyRules,
    what: str,
    kinds: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], set[str]]:
    """Matches a file's keys to a module's: ({module key: file key}, module keys to fill with zeros).

    Parts of names that wrappers add are ignored.

    Args:
        kinds: of the module's tensors, see `checkpoint.kinds`.

    Raises:
        WeightsError: one line with missing, unknown and mis-shaped keys, and tensors that cannot be weights.
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
            ("of the wrong kind", unusable),
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

        On the CPU a weight that keeps its precision is a view of the mapped file.

        Args:
            precision: dtype per key for floating-point weights; None keeps the file's.

        Raises:
            WeightsError: for a file that turns out to be unreadable.
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
                    f"cannot read {self.source[key]} of {self.file.files[0]}: {read_error(error)}"
                ) from None
            if key in self.rules.adapt:
                tensor = self.rules.adapt[key](tensor, tuple(value.shape))
            loaded[key] = tensor.to(dtype or tensor.dtype).contiguous()
        assign(self.module, loaded)
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

    Args:
        what: the model's name, for messages.

    Raises:
        WeightsError: see `open_weights` and `check_keys`.
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


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module its whole state dict, without copying, and readies it for inference."""
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False).eval()
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    assert not left, f"{type(module).__name__} keeps {left[:3]} outside its state dict on the meta device"
