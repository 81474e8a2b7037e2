"""Weights of third-party models: local files or a hub, tensors only, and one clear error if they are unavailable."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stagevar.errors import UsageError, WeightsError, reason_of


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or of a pickle that holds tensors only (also under "state_dict").

    Raises WeightsError if the file is missing, damaged or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist; give the path of a .safetensors or .pt file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers and readers raise anything on hostile bytes
        raise WeightsError(f"weights file {path} cannot be read as tensors ({type(error).__name__})") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise WeightsError(f"weights file {path} holds no dictionary of tensors")
    return content


def url_state_dict(url: str, what: str) -> dict[str, torch.Tensor]:
    """Tensors from torch's own download cache, fetched if missing; tensors only."""
    with refuse_missing(what):
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, weights_only=True)


@contextlib.contextmanager
def refuse_missing(what: str, option: str = "weights") -> Iterator[None]:
    """Turns whatever a library raises when a model is unavailable into one line that says what to do."""
    _stop_asking_if_offline()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # hubs log every attempt; the error below says it once
    try:
        yield
    except UsageError:
        raise
    except (
        Exception
    ) as error:  # depending on the version, hubs raise OSError, URLError, HTTPError, ValueError, their own
        raise UsageError(
            f"{what} cannot be loaded ({reason_of(error, 120)}); "
            f"download it on a machine with a network and give its path as {option}"
        ) from None
    finally:
        logging.disable(disabled)


@functools.cache
def _stop_asking_if_offline() -> None:
    """Puts huggingface_hub in offline mode if its host does not resolve: it would try five times over half a minute.

    Behind a proxy names need not resolve locally, so nothing is changed then.
    """
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def hub_file(source: str, what: str, option: str = "weights") -> str:
    """A local path, unchanged; for `hub:organization/repository/file`, optionally with @revision, the path in the hub's cache.

    Raises UsageError, in one line that names the option, if the file is unavailable.
    """
    if not source.startswith("hub:"):
        return source
    repository, revision = pinned(source.removeprefix("hub:"))
    organization, name, path = repository.split("/", 2)
    from huggingface_hub import hf_hub_download

    with refuse_missing(f"{what} {path}", option):
        return hf_hub_download(f"{organization}/{name}", path, revision=revision.get("revision"))


def pinned(source: str) -> tuple[str, dict[str, str]]:
    """A hub name without its @revision, and the revision as a hub option; local folders stay unchanged."""
    if os.path.isdir(source) or "@" not in source:
        return source, {}
    name, _, revision = source.rpartition("@")
    return name, {"revision": revision}


def from_pretrained(factory: Any, source: str, what: str, option: str = "model", **options: Any) -> Any:
    """A transformers processor, tokenizer or config from a local folder or the hub, there at @revision if given.

    `option` is the metric's option that takes a path instead.
    """
    name, revision = pinned(source)
    with refuse_missing(f"{what} {source}", option):
        return factory.from_pretrained(name, local_files_only=os.path.isdir(name), **revision, **options)


def pretrained_model(
    factory: Any,
    source: str,
    what: str,
    *,
    device: str,
    optional: tuple[str, ...] = (),
    dtype: torch.dtype | str = torch.float32,
) -> Any:
    """A frozen transformers model on `device`, from a local folder or the hub; dtype "auto" keeps the checkpoint's own.

    Strict: transformers fills missing weights with noise and continues; here that is a WeightsError, except for names that
    start with one of `optional`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = from_pretrained(factory, source, what, output_loading_info=True, dtype=dtype)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(optional or "\0"))
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    if missing or mismatched:
        raise WeightsError(
            f"{what} {source} lacks {len(missing + mismatched)} weights of {type(model).__name__}, such "
            f"as {(missing + mismatched)[0]}; give a complete checkpoint of that architecture"
        )
    return model.eval().requires_grad_(False).to(device)
