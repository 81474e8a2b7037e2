"""Pictures of any kind read as what a viewer shows, or refused; folders paired with prompts as people number them."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from stagevar.errors import UsageError
from tuner.evalkit.image_folder import match_references, read_folder
from tuner.evalkit.pictures import read_picture

GRAY_HW = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)


def test_16_bit_gray_is_the_same_picture_in_8_bits(tmp_path):
    for factor in (256, 257):  # both ways in which programs widen 8 bits
        Image.fromarray(GRAY_HW.astype(np.uint16) * factor).save(tmp_path / "wide.png")
        assert np.array_equal(read_picture(tmp_path / "wide.png"), np.stack([GRAY_HW] * 3, axis=-1))


def test_16_bit_color_is_the_same_picture_in_8_bits(tmp_path):
    rows = b"".join(
        b"\0" + row.astype(">u2").tobytes() for row in np.repeat(GRAY_HW[..., None].astype(int), 3, -1) * 257
    )
    write_png(tmp_path / "wide.png", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0), rows)
    assert np.array_equal(read_picture(tmp_path / "wide.png"), np.stack([GRAY_HW] * 3, axis=-1))


def write_png(path, header, rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_transparent_pixels_lie_on_white(tmp_path):
    red, clear = (200, 10, 10), (1, 2, 3)
    picture = Image.new("RGBA", (2, 1))
    picture.putpixel((0, 0), (*red, 255))
    picture.putpixel((1, 0), (*clear, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([*red, *clear])
    palette.putpixel((1, 0), 1)
    gray = Image.new("LA", (2, 1), (9, 0))
    gray.putpixel((0, 0), (77, 255))
    keyed = Image.new("RGB", (2, 1), red)
    keyed.putpixel((1, 0), clear)
    picture.save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png", transparency=1)
    gray.save(tmp_path / "la.png")
    keyed.save(tmp_path / "keyed.png", transparency=clear)
    for name in ("rgba", "palette", "keyed"):
        assert read_picture(tmp_path / f"{name}.png").tolist() == [[list(red), [255, 255, 255]]], name
    assert read_picture(tmp_path / "la.png").tolist() == [[[77] * 3, [255] * 3]]
    picture.putalpha(255)
    picture.save(tmp_path / "opaque.png")
    assert read_picture(tmp_path / "opaque.png").tolist() == [[list(red), list(clear)]]


def test_cmyk_is_converted_by_its_profile_or_refused(tmp_path):
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    picture.save(tmp_path / "plain.jpg", quality=100)
    assert np.abs(read_picture(tmp_path / "plain.jpg").astype(int) - [255, 0, 0]).max() <= 3
    rgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / "broken.jpg", icc_profile=rgb_profile)  # a profile of another kind of picture
    with pytest.raises(UsageError, match=r"broken\.jpg: its CMYK profile cannot be applied"):
        read_picture(tmp_path / "broken.jpg")


def test_what_has_no_certain_pixels_is_refused(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(UsageError, match="2 pictures in one file"):
        read_picture(tmp_path / "moving.webp")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    shutil.move(tmp_path / "float.tiff", tmp_path / "float.png")
    with pytest.raises(UsageError, match="pixels of kind F"):
        read_picture(tmp_path / "float.png")


def test_damaged_pictures_are_one_line(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for number in range(60):
        broken = bytearray(data[: rng.integers(1, len(data))] if number % 2 else data)
        broken[rng.integers(0, min(len(broken), 60))] ^= 0xFF
        path = tmp_path / "broken.png"
        path.write_bytes(bytes(broken))
        try:
            assert read_picture(path).shape[2] == 3
        except UsageError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > 30


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    "name", ["x-{}.png", "{}.png", "a/x{}.png", "{}/picture.png", "Image ({}).png", "{}_seed3.png"]
)
def test_numbered_images_are_in_order_of_number(tmp_path, name):
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(12)))
    for index in range(12):
        save(tmp_path / "images" / name.format(index), value=index)
    images = read_folder(tmp_path / "images", tmp_path / "p.txt")
    assert [image.prompt["prompt"] for image in images] == [f"prompt {image.pixels()[0, 0, 0]}" for image in images]


def test_numbers_of_genevals_folders_need_no_zeros(tmp_path):
    for index in range(11):
        save(tmp_path / f"{index}/samples/0.png")
        (tmp_path / f"{index}/metadata.jsonl").write_text(json.dumps({"prompt": f"p{index}"}))
    assert [image.prompt["prompt"] for image in read_folder(tmp_path)] == [f"p{index}" for index in range(11)]
    (tmp_path / "3/metadata.jsonl").unlink()
    with pytest.raises(UsageError, match=r"3: no metadata\.jsonl"):
        read_folder(tmp_path)


def test_what_systems_leave_in_folders_is_no_picture(tmp_path):
    for name in ("0.png", "b/1.png"):
        save(tmp_path / name)
    for left in (
        ".ipynb_checkpoints/0-checkpoint.png",
        "b/.ipynb_checkpoints/1.png",
        "__MACOSX/b/1.png",
        ".thumbnails/0.png",
        "@eaDir/0.png",
        "b/$RECYCLE.BIN/0.png",
    ):
        save(tmp_path / left)
    (tmp_path / "b/._1.png").write_bytes(b"\0\5\x16\7")
    assert [image.name for image in read_folder(tmp_path)] == ["0.png", "b/1.png"]
    hidden = tmp_path / ".mine"  # the folder that was asked for may be hidden itself
    save(hidden / "0.png")
    assert [image.name for image in read_folder(hidden)] == ["0.png"]


def lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_prompts_without_an_image_and_images_left_out_are_said(tmp_path):
    folder = tmp_path / "images"
    for name in ("a.png", "b.png"):
        save(folder / name)
    entries = [{"file": f"{name}.png", "prompt": name} for name in "abc"]
    with pytest.warns(UserWarning, match="1 of 3 prompts have no image and are not scored; the first: c"):
        read_folder(folder, lines(tmp_path / "p.jsonl", entries))
    (folder / "c.tif").write_bytes(b"II")
    with pytest.warns(UserWarning, match=r"1 pictures are left out, the first c\.tif"):
        read_folder(folder, lines(tmp_path / "p.jsonl", entries[:2]))
    (folder / "c.tif").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_folder(folder, lines(tmp_path / "p.jsonl", entries[:2]))) == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"file": "a.png", "prompt": "one"}, {"file": "a.png", "prompt": "two"}], r"two different prompts for a\.png"),
        ([{"file": "a.png", "prompt": "one"}, {"prompt": "two"}], "'two' names no file"),
    ],
)
def test_prompts_that_do_not_add_up_are_refused(tmp_path, entries, message):
    save(tmp_path / "images/a.png")
    with pytest.raises(UsageError, match=message):
        read_folder(tmp_path / "images", lines(tmp_path / "p.jsonl", entries))


def test_a_gap_in_the_numbers_and_prompts_that_are_not_read_are_said(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    for index in (0, 1, 3):
        save(tmp_path / f"images/x-{index}.png")
    with pytest.warns(UserWarning, match="not consecutive after 1"):
        read_folder(tmp_path / "images", tmp_path / "p.txt")
    save(tmp_path / "geneval/00000/samples/0.png")
    (tmp_path / "geneval/00000/metadata.jsonl").write_text('{"prompt": "own"}')
    with pytest.warns(UserWarning, match="ignoring --prompts .*p.txt: "):
        images = read_folder(tmp_path / "geneval", tmp_path / "p.txt")
    assert images[0].prompt["prompt"] == "own"


def test_references_keep_their_partners_with_any_numbering(tmp_path):
    for index in range(12):
        save(tmp_path / f"a/x-{index}.png", value=index)
        save(tmp_path / f"b/x-{index}.jpg", value=index)
    images = read_folder(tmp_path / "a")
    references = match_references(images, tmp_path / "b")
    assert all(abs(int(read_picture(references[i.name])[0, 0, 0]) - int(i.pixels()[0, 0, 0])) <= 1 for i in images)
