"""Public weight files written once as safetensors, which then load memory-mapped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from stagevar.errors import UsageError
from stagevar.models.checkpoint.tensor_files import SHARD_BYTES, save_weights
from stagevar.models.checkpoint.weights import load_into
from stagevar.models.hub import sha256_files
from stagevar.models.loading import MARK, locate
from stagevar.models.registry import model_parts, resolve


def convert(
    model: str,
    out: Path | str,
    *,
    weights: Path | str | None = None,
    tokenizer: Path | str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes a model's files once as safetensors, which then load memory-mapped with `weights=out`.

    Args:
        model: registry name.
        out: a folder that does not exist or is empty; it appears only once everything is written.
        weights, tokenizer: as for `load_model`; None fetches the public files.
        dtype: of the transformer blocks and the tokenizer ("bfloat16" halves the size); None keeps the files'.

    Returns:
        The written files.

    Raises:
        UsageError: if `out` is in use.
        WeightsError: as in loading.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"output {out} already exists; name a new folder")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"output {out}: folder {out.absolute().parent} does not exist")
    request = resolve(model, weights=weights, tokenizer=tokenizer, device="cpu", dtype=dtype)
    if request.random:
        raise UsageError("random weights are made on the fly; there is nothing to convert")
    parts = model_parts(request)
    transformer_path, tokenizer_path, sources = locate(request)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    read: list[Path] = []
    jobs = (("transformer", parts.transformer, transformer_path), ("tokenizer", parts.tokenizer, tokenizer_path))
    try:
        for stem, part, path in jobs:
            precision = part.precision if dtype else None
            read += load_into(part.module, path, what=f"{model} ({stem})", rules=part.rules, precision=precision)
            save_weights(part.module, partial, stem, shard_bytes)
        mark = {"model": model, "dtype": dtype or "as in the files", "sources": sources, "sha256": sha256_files(read)}
        (partial / MARK).write_text(json.dumps(mark, indent=1) + "\n")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return sorted(out.iterdir())
