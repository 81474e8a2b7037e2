"""Options that several verbs share: which model, how it runs, which prompts; and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stagevar.choices import ENGINE_OPTIONS, check_engine, check_threads, check_weights
from stagevar.cli.arguments import (
    finite_number,
    name_value,
    path_value,
    positive_int,
    whole_number,
)
from stagevar.errors import UsageError, did_you_mean
from stagevar.models.request import ModelRequest
from stagevar.prompts.requests import check_prompts
from stagevar.sections import shown

if TYPE_CHECKING:
    from stagevar.profile import Profile

#: What `ArgumentParser.add_subparsers` returns; each verb's `add` puts itself in.
Verbs = argparse._SubParsersAction


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Options that say which model runs where."""
    parser.add_argument(
        "--model", type=name_value, required=required, help="model name, e.g. nano, infinity-2b, infinity-8b"
    )
    parser.add_argument(
        "--weights", type=name_value, help="path, or 'random' for seeded random weights (latency work only)"
    )
    parser.add_argument("--tokenizer", type=name_value, help="tokenizer file, if it is not next to the weights")
    parser.add_argument("--text", type=name_value, help="folder of the text encoder, if it is not next to the weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: bfloat16 on a GPU, else float32)")
    parser.add_argument(
        "--resolution", help="pixel budget (0.06M, 0.25M, 0.60M, 1M) or image side, if the model has several"
    )
    parser.add_argument("--kv-cache", help="model (default), or int8 for about half the memory of keys and values")
    parser.add_argument(
        "--ratio", type=finite_number, help="height / width, snapped to one of the model's (default: 1)"
    )


def add_running_options(parser: argparse.ArgumentParser, batch: str, threads: str) -> None:
    """Options that say how steps reach the device."""
    parser.add_argument(
        "--engine",
        choices=ENGINE_OPTIONS,
        default="auto",
        help="default: auto, the profile's, or else the fastest that draws the same images",
    )
    parser.add_argument("--batch", type=positive_int, help=f"images per run (default: {batch})")
    parser.add_argument("--threads", type=positive_int, help=f"CPU threads (default: {threads})")


def add_prompt_options(parser: argparse.ArgumentParser, count: int) -> None:
    """Options that say which prompts and seeds are used."""
    parser.add_argument("--prompts", type=positive_int, default=count, help=f"how many prompts (default: {count})")
    parser.add_argument(
        "--prompts-file", type=path_value, help="prompts (.txt, .jsonl, .json, .csv) instead of built-in ones"
    )
    parser.add_argument("--seed", type=whole_number, default=0, help="seed of the first prompt (default: 0)")


def model_request(args: argparse.Namespace, profile: Profile | None = None) -> ModelRequest:
    """The model that the options ask for; a profile's model and options fill in what they leave open."""
    asked = ModelRequest(
        args.model if profile is None else profile.model.name,
        weights=args.weights,
        tokenizer=args.tokenizer,
        text=args.text,
        resolution=args.resolution,
        ratio=args.ratio,
        device=args.device,
        dtype=args.dtype,
        kv_cache=args.kv_cache,
    )
    return asked if profile is None else asked.over(profile.model.request)


def drawing_request(args: argparse.Namespace, profile: Profile | None = None) -> ModelRequest:
    """`model_request` of a command that draws images, checked before anything is loaded.

    Raises UsageError for what `check_running` refuses, and for weights that would be random.
    """
    request = model_request(args, profile)
    if profile is not None:
        profile.check_drawing(request)
    elif request.weights == "random":
        raise UsageError("--weights random draws noise, not images; it is for latency work only")
    check_running(request, args.engine, args.threads)
    return request


def prompts_of_file(args: argparse.Namespace) -> list[str] | None:
    """The prompts of --prompts-file, None without one. Raises UsageError."""
    if args.prompts_file is None:
        return None
    from stagevar.prompts.prompt_files import read_prompt_file

    return check_prompts([entry.text for entry in read_prompt_file(args.prompts_file)][: args.prompts])


def check_loading(request: ModelRequest) -> str:
    """The kind of device ("cpu", "cuda") that a model will be on.

    Raises:
        UsageError: before anything is loaded, for an unavailable model, option or device, and for paths without files.
    """
    from stagevar.models.registry import resolve

    check_weights(request.weights, request.tokenizer, request.text)
    return resolve(request).device.type


def check_running(request: ModelRequest, engine: str, threads: int | None) -> None:
    """Raises UsageError, before anything is loaded, for an engine or threads that this device does not have."""
    device = check_loading(request)
    check_engine(engine, device)
    if threads is not None:
        check_threads(threads, device)


def presets(text: str) -> list[str]:
    """Comma-separated names of presets, each once. Raises UsageError for an unknown one."""
    from stagevar.schedule import PRESETS

    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in names:
        if word not in PRESETS:
            hint = did_you_mean(word, PRESETS) or f"; use {', '.join(PRESETS)}"
            raise UsageError(f"--compare: unknown schedule {shown(word)}{hint}")
    return names


def shared(what: str, values: Sequence[Any]) -> Any:
    """What all profiles agree on; None without any profile. Raises UsageError if they disagree."""
    different = list(dict.fromkeys(values))
    if len(different) > 1:
        raise UsageError(f"the profiles differ in {what} ({', '.join(map(str, different))}); give --{what}")
    return different[0] if different else None
