"""One image file as people have them -> uint8 pixels of the size that a network takes. Used wherever a file becomes an input."""

import dataclasses
import io
import os
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps

from wdkd.files import read_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What is opened, whatever a file's suffix says. Of Pillow's other formats, one has Ghostscript run what is in the file."""
MAX_BYTES = 2**28
"""Of the largest image file that is read."""
REDUCTION = 4
"""JPEG decodes to a smaller size, an average over blocks, as long as its sides stay this many times those that are wanted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A file's pixels, uint8 (H, W, C), and whether it had further frames, which are left out."""

    pixels: np.ndarray
    animated: bool


def read_image(path: str | os.PathLike, size: tuple[int, int], channels: int) -> Image:
    """The first frame, turned upright as EXIF says, resized so that it just covers `size` and cropped around its centre.

    Resizing is bilinear with antialiasing; an image that has the size keeps its pixels. 16 bits are rounded to 8 (grey) or cut to 8
    (colour, by Pillow), CMYK and palettes become RGB, transparent pixels are laid on white. Colour profiles are ignored.

    Args:
      size: (height, width) in pixels.
      channels: 3 for RGB; 1 for grey, of which colours have the luma of ITU-R 601.

    Raises:
      ValueError: with the reason, for a file that cannot be opened, is none of FORMATS, is damaged or cut off, or has more pixels
        than Pillow decodes (twice PIL.Image.MAX_IMAGE_PIXELS).
    """
    try:
        content = read_file(path, MAX_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of half of the limit, and of odd metadata.
            with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
                # A JPEG with a second picture, as phones write it (MPO), is no animation.
                animated = image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1
                image.draft(None, (REDUCTION * max(size),) * 2)
                image.load()
                pixels = fitted(opaque(PIL.ImageOps.exif_transpose(image)), size, channels)
    except PIL.UnidentifiedImageError:
        raise ValueError("it is no PNG, JPEG, WebP or BMP image") from None
    except Exception as error:  # Damage surfaces as whatever Pillow and its decoders raise.
        why = "it is not there" if isinstance(error, FileNotFoundError) else " ".join(str(error).split()) or type(error).__name__
        raise ValueError(why) from error
    return Image(pixels, animated)


def opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in mode L or RGB, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip what is above 255.
        return PIL.Image.fromarray(np.rint(np.asarray(image, np.float64).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image).convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def fitted(image: PIL.Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """An image in mode L or RGB as uint8 (*size, channels)."""
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    image = PIL.ImageOps.fit(image, (width, height), PIL.Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(height, width, channels)
