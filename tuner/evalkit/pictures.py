"""Reads common picture files as the 8-bit RGB that metrics need; rejects those without an unambiguous conversion.

Pillow's `convert("RGB")` differs: it clips 16-bit gray to white, shows the hidden colors under transparent pixels, and
ignores a CMYK file's ink profile.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from stagevar.errors import UsageError

#: Modes that are already 8-bit RGB or gray, or have only one conversion to it.
_PLAIN = {"1", "L", "RGB", "RGBX", "YCbCr"}
_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}


def read_picture(path: Path) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8, upright by the file's EXIF orientation.

    16-bit gray keeps its high byte, as when Pillow reads 16-bit color. Transparent pixels are put on white. CMYK is converted
    by its embedded profile, or by the plain formula without one. Profiles of RGB files are not applied: metrics and their
    published figures use the numbers as they are.
    Raises UsageError for a file that is unreadable, animated, or has pixels without a known white (32-bit, Lab).
    """
    try:
        with Image.open(path) as image:
            count = getattr(image, "n_frames", 1)
            if count > 1:
                raise UsageError(f"{path}: {count} pictures in one file; save the one to score")
            image.load()
            return np.asarray(_rgb(ImageOps.exif_transpose(image), path))
    except UsageError:
        raise
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        reason = type(error).__name__ if isinstance(error, Image.UnidentifiedImageError) else str(error) or repr(error)
        raise UsageError(f"{path}: not a readable image ({' '.join(reason.split()):.120})") from None


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):  # older Pillows read 16-bit PNG as "I"
        return _high_byte(image).convert("RGB")
    if mode in _WITH_ALPHA or (mode in ("P", *_PLAIN) and "transparency" in image.info):
        return _on_white(image)
    if mode == "P":
        return image.convert("RGB")
    if mode == "CMYK":
        return _of_inks(image, path)
    if mode in _PLAIN:
        return image.convert("RGB")
    raise UsageError(f"{path}: pixels of kind {mode}, for which black and white are not defined; save it as 8-bit RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    values_HW = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    gray = Image.fromarray((values_HW >> 8).clip(0, 255).astype(np.uint8))
    if transparent is None:
        return gray
    white_HW = np.where(values_HW == transparent, 255, np.asarray(gray))
    return Image.fromarray(white_HW.astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    picture = image.convert("RGBA")
    least, _ = picture.getchannel("A").getextrema()
    if least == 255:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _of_inks(image: Image.Image, path: Path) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    from PIL import ImageCms

    try:
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError) as error:
        raise UsageError(
            f"{path}: its CMYK profile cannot be applied ({' '.join(str(error).split()):.80}); save it as RGB"
        ) from None
    if converted is None:
        raise AssertionError("profileToProfile returned no picture")
    return converted
