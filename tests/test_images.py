"""Image files as people have them: pixels against independent arithmetic, and what is refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from mutations import cases, damaged
from PIL import Image

from wdkd.images import read_image


def photo(height, width, channels=3, seed=0):
    """A smooth image with all values, uint8 (H, W, C)."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (2 + c + seed)) + np.cos(columns / (3 + c)) for c in range(channels)]
    return np.rint(np.stack(waves, -1) * 63 + 127).astype(np.uint8)


def saved(tmp_path, image, name="image.png", **options):
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) if isinstance(image, np.ndarray) else image
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixels(path, size=None, channels=3):
    with Image.open(path) as image:
        size = size or (image.height, image.width)
    return read_image(path, size, channels).pixels


def weights(length, size, start, stop):
    """Bilinear resampling with antialiasing of [start, stop) of `length` samples to `size`, as a float64 matrix (size, length)."""
    scale = (stop - start) / size
    centres = start + (np.arange(size) + 0.5) * scale
    found = np.clip(1 - np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1.0), 0, None)
    return found / found.sum(1, keepdims=True)


def covering(image, height, width):
    """The image (h, w, C) resized so that it covers (height, width), cropped around its centre; float64."""
    h, w = image.shape[:2]
    scale = min(h / height, w / width)
    top, left = (h - height * scale) / 2, (w - width * scale) / 2
    vertical, horizontal = weights(h, height, top, h - top), weights(w, width, left, w - left)
    return np.einsum("ih,hwc,jw->ijc", vertical, image.astype(np.float64), horizontal, optimize=True)


# --- size ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "A.PNG"])
def test_an_image_of_the_size_keeps_its_pixels(tmp_path, name):
    image = photo(12, 10)
    found = read_image(saved(tmp_path, image, name), (12, 10), 3)
    assert found.pixels.dtype == np.uint8 and not found.animated
    np.testing.assert_array_equal(found.pixels, image)
    np.testing.assert_array_equal(pixels(saved(tmp_path, photo(12, 10, 1)), channels=1), photo(12, 10, 1))
    np.testing.assert_array_equal(pixels(saved(tmp_path, photo(12, 10, 1))), photo(12, 10, 1).repeat(3, -1))


@pytest.mark.parametrize("shape", [(60, 41), (41, 60), (9, 8), (16, 16), (200, 9), (1, 30), (1, 1)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_other_sizes_are_resized_and_cropped_around_the_centre(tmp_path, shape, size):
    image = photo(*shape)
    found = pixels(saved(tmp_path, image), size).astype(np.float64)
    assert found.shape == (*size, 3)
    # Pillow rounds after each of the two directions.
    assert np.abs(found - covering(image, *size)).max() <= 1.01


def test_a_large_jpeg_decodes_to_a_smaller_size_with_the_same_result(tmp_path):
    path = saved(tmp_path, photo(1200, 900), "image.jpg", quality=95)
    with Image.open(path) as image:
        whole = np.asarray(image)
    assert np.abs(pixels(path, (32, 32)).astype(float) - covering(whole, 32, 32)).max() <= 3


# --- modes --------------------------------------------------------------------------------------------------------------


def test_colours_become_grey_by_their_luma(tmp_path):
    image = photo(12, 10)
    luma = image @ [0.299, 0.587, 0.114]
    assert np.abs(pixels(saved(tmp_path, image), channels=1)[..., 0] - luma).max() <= 0.6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_transparent_is_laid_on_white(tmp_path, mode):
    alpha = np.arange(120, dtype=np.uint8).reshape(12, 10) * 2
    grey = photo(12, 10, 1)
    if mode == "RGBA":
        colours, path = photo(12, 10), saved(tmp_path, np.dstack([photo(12, 10), alpha]))
    elif mode == "LA":
        colours, path = grey, saved(tmp_path, Image.merge("LA", [Image.fromarray(grey[..., 0]), Image.fromarray(alpha)]))
    else:  # A palette, transparent in one entry or in as many as wanted.
        index = alpha // 2
        palette = photo(120, 1)[:, 0]
        image = Image.fromarray(index)
        image = image.convert("P") if image.mode != "P" else image
        image.putpalette(palette.tobytes())
        levels = bytes(range(0, 240, 2)) if mode == "PA" else bytes([0])
        path = saved(tmp_path, image, transparency=levels)
        colours, alpha = palette[index], np.array(list(levels) + [255] * (120 - len(levels)))[index]
    share = alpha[..., None] / 255
    assert np.abs(pixels(path) - (share * colours + (1 - share) * 255)).max() <= 1


def test_a_transparent_colour_is_laid_on_white(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = (10, 20, 30)
    found = pixels(saved(tmp_path, image, transparency=(10, 20, 30)))
    assert (found[:4] == 255).all() and (found[4:] == 0).all()


def png(image, depth, colour, said=None):
    """A PNG's bytes, from integers (H, W, C), written without Pillow; its header says `said` (width, height)."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = image.astype(">u2" if depth == 16 else np.uint8)
    head = struct.pack(">IIBBBBB", *(said or image.shape[1::-1]), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "colour"), [(1, 0), (3, 2)])
def test_16_bits_become_8(tmp_path, channels, colour):
    image = np.linspace(0, 65535, 64 * channels).astype(np.int64).reshape(8, 8, channels)
    (tmp_path / "deep.png").write_bytes(png(image, 16, colour))
    found = pixels(tmp_path / "deep.png", channels=channels).astype(np.float64)
    assert np.abs(found - image / 257).max() <= (0.5 if channels == 1 else 1)  # Pillow itself cuts those of colours.


def test_cmyk_becomes_rgb(tmp_path):
    inks = np.broadcast_to(np.array([40, 90, 200, 30], np.uint8), (16, 16, 4))
    path = saved(tmp_path, Image.fromarray(inks.copy(), "CMYK"), "a.jpg", quality=100)
    expected = (255 - np.array([40, 90, 200])) * (255 - 30) / 255
    assert np.abs(pixels(path) - expected).max() <= 3


def test_one_bit_and_palettes_without_transparency(tmp_path):
    bits = photo(8, 8, 1)[..., 0] > 127
    assert (pixels(saved(tmp_path, Image.fromarray(bits)), channels=1)[..., 0] == bits * 255).all()
    image = Image.fromarray(photo(8, 8)).quantize(16)
    np.testing.assert_array_equal(pixels(saved(tmp_path, image)), np.asarray(image.convert("RGB")))


# --- orientation and frames ---------------------------------------------------------------------------------------------

UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: np.rot90(x, 1),
}
"""What a viewer does for each value of EXIF's orientation."""


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_is_turned_upright(tmp_path, orientation):
    image, exif = photo(12, 10), Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, exif=exif.tobytes())
    expected = UPRIGHT[orientation](image)
    np.testing.assert_array_equal(read_image(path, expected.shape[:2], 3).pixels, expected)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, name):
    frames = [Image.fromarray(photo(12, 10, seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    found = read_image(tmp_path / name, (12, 10), 3)
    assert found.animated
    np.testing.assert_array_equal(found.pixels, photo(12, 10))


def test_a_phones_second_picture_is_no_animation(tmp_path):
    frames = [Image.fromarray(photo(16, 16, seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:], quality=95)
    found = read_image(tmp_path / "a.jpg", (16, 16), 3)
    assert not found.animated and np.abs(found.pixels - photo(16, 16).astype(float)).mean() < 4


# --- what is refused ----------------------------------------------------------------------------------------------------


def encoded(kind, **options):
    file = io.BytesIO()
    Image.fromarray(photo(64, 64)).save(file, format=kind, **options)
    return file.getvalue()


HUGE = png(np.zeros((1, 1, 1), np.int64), 8, 0, said=(20_000, 20_000))
BROKEN = {
    "empty": (b"", "it is no PNG, JPEG, WebP or BMP image"),
    "text": (b"not an image\n" * 10, "it is no PNG, JPEG, WebP or BMP image"),
    "another kind": (encoded("GIF"), "it is no PNG, JPEG, WebP or BMP image"),
    "cut PNG": (encoded("PNG")[:-2000], "trunc"),
    "cut JPEG": (encoded("JPEG")[:-500], "trunc"),
    "cut WebP": (encoded("WEBP")[:-500], ""),
    "flipped PNG": (encoded("PNG").replace(b"IDAT", b"IDAT\xff", 1), ""),
    "a header alone": (encoded("PNG")[:30], ""),
    "bomb": (HUGE, "exceeds limit of"),
}


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_image_is_refused(tmp_path, content, words):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_image(tmp_path / "a.png", (8, 8), 3)
    assert words in str(caught.value) and 0 < len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (("pipe.png", "is no regular file"), ("missing.png", "it is not there")):
        with pytest.raises(ValueError, match=words):
            read_image(tmp_path / name, (8, 8), 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damage_of_any_kind_is_an_image_or_a_line(tmp_path, kind):
    path = tmp_path / "a.png"

    @cases(60)
    @given(damaged(encoded(kind)))
    def check(content):
        path.write_bytes(content)
        try:
            found = read_image(path, (8, 8), 3).pixels
        except ValueError as error:
            assert str(error).strip() and "\n" not in str(error)
        else:
            assert found.shape == (8, 8, 3) and found.dtype == np.uint8

    check()
