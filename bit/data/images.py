"""One image file to uint8 RGB, by rules that lose nothing on the way.

Grey becomes RGB, the EXIF orientation is applied, transparency is laid on white, and 16-bit values
are shifted to 8 bits (Pillow's own conversion clips them at 255). Of an animation the first frame
is taken.
"""

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm".split())
# Only these parsers see a file: Pillow knows others that are slow or start a program (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class CorruptImage(ValueError):
    """The bytes are no image that can be read whole; the message says why."""


def decode(source: Path | bytes) -> np.ndarray:
    """Read an image file, or the bytes of one.

    Returns:
        uint8 array (H, W, 3), values as stored; H and W are those after EXIF rotation.

    Raises:
        CorruptImage: broken, cut short, no known image format, or more pixels than Pillow's
            `Image.MAX_IMAGE_PIXELS` (about 89 million: a decompression bomb).
        OSError: the file itself can't be read.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        with _open(data) as image:
            image.load()
            return _oriented(_rgb(image), _orientation(image))
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:
        raise CorruptImage(f"{len(data)} bytes that are no image in a known format") from error
    # Pillow's parsers meet broken bytes with whatever they stumble over: OSError, SyntaxError,
    # struct.error, IndexError, zlib.error and more.
    except Exception as error:
        raise CorruptImage(str(error) or type(error).__name__) from error


def size(source: Path | bytes) -> tuple[int, int]:
    """(height, width) as the header says, before EXIF rotation; (0, 0) if there is no header."""
    data = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(data, formats=_FORMATS) as image:
            return image.height, image.width
    except Exception:  # see decode(), which will report the file
        return 0, 0


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 to a (side, side, 3) square: bilinear, antialiased, aspect ignored."""
    if image.shape[:2] == (side, side):
        return image
    return resized_crop(image, (0, 0, image.shape[1], image.shape[0]), side)


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int], side: int) -> np.ndarray:
    """Cut `box` = (left, top, right, bottom) in pixels out of `image`, then as `resize`."""
    resampled = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resampled)


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise CorruptImage(
            f"{image.width} x {image.height} pixels are more than the "
            f"{Image.MAX_IMAGE_PIXELS} allowed (decompression bomb?)"
        )
    return image


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey16(np.asarray(image), image.info.get("transparency"))
    if image.mode == "F":
        raise CorruptImage("floating-point pixels, whose range no file says")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _grey16(values: np.ndarray, transparent: int | None) -> np.ndarray:
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise CorruptImage("grey values outside 0..65535, whose range no file says")
    grey = (values >> 8).astype(np.uint8)
    if transparent is not None:
        grey[values == transparent] = 255
    return np.repeat(grey[..., None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return 1


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo how the camera was held; EXIF numbers the eight cases 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
