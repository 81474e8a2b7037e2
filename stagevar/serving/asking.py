"""What a client asks for: the JSON body of POST /v1/images/generations, checked field by field. No HTTP here.

Fields of OpenAI's API that are not honored are refused, or accepted and listed in the answer; none is silently ignored.
Source: field names and ranges are those of OpenAI's API reference; seed, negative_prompt and guidance_scale at the top level
are what other servers of image models accept as well (facts).
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from stagevar.errors import did_you_mean
from stagevar.sections import shown
from stagevar.serving.refusal import Refusal

#: Characters of a prompt, images of a request.
LONGEST_PROMPT, MOST_IMAGES = 4000, 10
#: Seeds that a client may name: those that JSON numbers hold exactly in every language.
SEED_BITS = 53
GUIDANCE_RANGE = (1.0, 30.0)
#: Fields that change nothing here; an answer lists those that were given.
IGNORED = ("moderation", "quality", "style", "user")
#: Fields of OpenAI's API with the only values that are honored.
FIXED: dict[str, tuple[object, ...]] = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "output_compression": (100,),
    "background": ("auto", "opaque"),
    "stream": (False,),
    "partial_images": (0,),
}
FIELDS = ("prompt", "model", "n", "size", "seed", "negative_prompt", "guidance_scale", *FIXED, *IGNORED)


@dataclass(frozen=True)
class Offer:
    """What clients can ask a server for.

    Attributes:
        models: served ids, the default first.
        sizes: (width, height), the default first.
        guidance: the only guidance scale available, or None if any is.
        negative: whether negative prompts are supported.
    """

    models: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    guidance: float | None = None
    negative: bool = True


@dataclass(frozen=True)
class Asked:
    """A request that can be drawn.

    Attributes:
        size: (width, height) in pixels.
        seeds: one per image.
        negative: None for the model's null text.
        ignored: fields without effect.
    """

    prompt: str
    model: str
    size: tuple[int, int]
    seeds: tuple[int, ...]
    negative: str | None = None
    guidance: float | None = None
    ignored: tuple[str, ...] = ()


def size_text(size: tuple[int, int]) -> str:
    """ "WIDTHxHEIGHT"."""
    return f"{size[0]}x{size[1]}"


def read_body(body: bytes) -> Mapping[str, object]:
    """A JSON object. Raises Refusal for anything else: bytes that are not UTF-8, endless numbers, duplicate keys."""
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_pairs_twice)
    except Refusal:
        raise
    except UnicodeDecodeError as error:
        raise Refusal(
            f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}", code="bad_json"
        ) from None
    except RecursionError:
        raise Refusal("the body is nested too deeply; send one flat JSON object", code="bad_json") from None
    except ValueError as error:
        reason = f"{error}" if isinstance(error, json.JSONDecodeError) else "a number has too many digits"
        raise Refusal(f"the body is not JSON: {reason}", code="bad_json") from None
    if not isinstance(data, dict):
        raise Refusal(f"the body must be a JSON object, not {_json_kind(data)}", code="bad_json")
    return data


def _json_kind(value: object) -> str:
    kinds: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return kinds.get(type(value), "a number")


def _no_constant(word: str) -> NoReturn:
    raise Refusal(f"the body is not JSON: {word} is not a valid JSON number", code="bad_json")


def _no_pairs_twice(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refusal(f"the key {shown(twice)} appears twice in the body; remove one", code="bad_json")
    return data


def read_request(data: Mapping[str, object], offer: Offer, draw_seed: Callable[[], int] | None = None) -> Asked:
    """Turns a body into something that can be drawn. A null field counts as absent.

    Args:
        draw_seed: gives the first seed if the body has none; by default at random, so that two requests differ.

    Raises:
        Refusal: one line with the field, its value and what is accepted.
    """
    given = {name: value for name, value in data.items() if value is not None}
    for name in data:
        if name not in FIELDS:
            hint = did_you_mean(name, FIELDS)
            raise Refusal(
                f"unknown field {shown(name)}{hint or '; leave it out'}", code="unknown_field", param=name[:64]
            )
    for name, values in FIXED.items():
        if name in given and not any(given[name] == v and type(given[name]) is type(v) for v in values):
            allowed = " or ".join(json.dumps(value) for value in values)
            raise Refusal(f"{name} {shown(given[name])} is not supported here; use {allowed}", param=name)
    prompt = _text(given, "prompt")
    if prompt is None:
        raise Refusal("prompt is missing; send the text to draw", code="missing_field", param="prompt")
    if not prompt.strip():
        raise Refusal("prompt is empty; send the text to draw", param="prompt")
    return Asked(
        prompt,
        _model(given, offer),
        _size(given, offer),
        _seeds(given, draw_seed or (lambda: secrets.randbits(32))),
        _negative(given, offer),
        _guidance(given, offer),
        tuple(name for name in IGNORED if name in given),
    )


def _text(given: Mapping[str, object], name: str) -> str | None:
    """A prompt. Messages say where it is wrong without quoting it, since they are logged."""
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Refusal(f"{name} must be text, not {_json_kind(value)}", code="invalid_type", param=name)
    if len(value) > LONGEST_PROMPT:
        raise Refusal(f"{name} has {len(value)} characters; at most {LONGEST_PROMPT}", code="too_long", param=name)
    half = next((place for place, letter in enumerate(value, 1) if "\ud800" <= letter <= "\udfff"), None)
    if half is not None:
        raise Refusal(f"{name} holds half a character (a lone surrogate) at place {half}; remove it", param=name)
    if "\0" in value:
        place = value.index("\0") + 1
        raise Refusal(f"{name} holds a null character at place {place}; remove it", param=name)
    return value


def _model(given: Mapping[str, object], offer: Offer) -> str:
    value = given.get("model", offer.models[0])
    if not isinstance(value, str):
        raise Refusal(f"model {shown(value)} must be text", code="invalid_type", param="model")
    if value not in offer.models:
        hint = did_you_mean(value, offer.models) or f"; this server has {', '.join(offer.models)}"
        raise Refusal(f"model {shown(value)} is not served here{hint}", 404, code="model_not_found", param="model")
    return value


def _size(given: Mapping[str, object], offer: Offer) -> tuple[int, int]:
    value = given.get("size", "auto")
    if not isinstance(value, str):
        raise Refusal(
            f'size {shown(value)} must be text such as "{size_text(offer.sizes[0])}"', code="invalid_type", param="size"
        )
    if value == "auto":
        return offer.sizes[0]
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value)
    size = (int(match[1]), int(match[2])) if match else None
    if size not in offer.sizes:
        allowed = ", ".join(map(size_text, offer.sizes))
        raise Refusal(f"size {shown(value)} is not served here; use {allowed}", code="invalid_size", param="size")
    return size


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refusal(f"{name} {shown(value)} must be a whole number", code="invalid_type", param=name)
    return value


def _seeds(given: Mapping[str, object], draw_seed: Callable[[], int]) -> tuple[int, ...]:
    count = _whole(given.get("n", 1), "n")
    if not 1 <= count <= MOST_IMAGES:
        raise Refusal(f"n {shown(count)} must be between 1 and {MOST_IMAGES}", param="n")
    first = _whole(given["seed"], "seed") if "seed" in given else draw_seed()
    if not 0 <= first < 2**SEED_BITS:
        raise Refusal(f"seed {shown(first)} must be between 0 and 2^{SEED_BITS} - 1", param="seed")
    return tuple(range(first, first + count))


def _negative(given: Mapping[str, object], offer: Offer) -> str | None:
    value = _text(given, "negative_prompt")
    if value is None or not value.strip():  # many clients always send the field
        return None
    if not offer.negative:
        raise Refusal("negative_prompt is not supported by this model; leave it out", param="negative_prompt")
    return value


def _guidance(given: Mapping[str, object], offer: Offer) -> float | None:
    value = given.get("guidance_scale")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal(f"guidance_scale {shown(value)} must be a number", code="invalid_type", param="guidance_scale")
    low, high = GUIDANCE_RANGE
    if not math.isfinite(value) or not low <= value <= high:
        raise Refusal(f"guidance_scale {shown(value)} must be between {low:g} and {high:g}", param="guidance_scale")
    if offer.guidance is not None and value != offer.guidance:
        raise Refusal(
            f"guidance_scale {shown(value)} would need its own graphs; this engine supports only {offer.guidance:g}",
            param="guidance_scale",
        )
    return float(value)
