"""Image files to uint8 RGB: every mode and format, exact where the format is lossless."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from bit.data.images import CorruptImage, decode, resize, size

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def encoded(image, format="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def as_rgb(grey):
    return np.stack([grey] * 3, axis=2)


def on_white(rgb, alpha):
    """Composited on white in float64, before rounding."""
    alpha = alpha[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_rgb_is_exact(format):
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = decode(encoded(RGB, format, **options))
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, RGB)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_grey_becomes_rgb(format):
    np.testing.assert_array_equal(decode(encoded(GREY, format)), as_rgb(GREY))


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lossy_formats_come_close(format, mode):
    smooth = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8)
    pixels = decode(encoded(Image.fromarray(smooth).convert(mode), format, quality=95))
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels.astype(int) - as_rgb(smooth)).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_one_bit(format):
    bits = GREY > 127
    pixels = decode(encoded(Image.fromarray(bits), format))
    np.testing.assert_array_equal(pixels, as_rgb(bits * np.uint8(255)))


def test_cmyk():
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # full cyan ink leaves no red
    image = Image.frombytes("CMYK", (8, 8), cmyk.tobytes())
    np.testing.assert_array_equal(decode(encoded(image, "TIFF"))[0, 0], [0, 255, 255])
    jpeg = decode(encoded(image, "JPEG", quality=95)).astype(int)
    assert np.abs(jpeg - [0, 255, 255]).max() <= 4


def test_palette():
    colours = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(decode(encoded(colours)), np.asarray(colours.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_laid_on_white(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    alpha = np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7)
    pixels = decode(encoded(np.dstack([RGB, alpha]), format, **options))
    assert np.abs(pixels - on_white(RGB, alpha)).max() <= 1
    np.testing.assert_array_equal(pixels[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(pixels[4, 6], RGB[4, 6])


def test_grey_with_alpha():
    alpha = np.full_like(GREY, 128)
    pixels = decode(encoded(np.dstack([GREY, alpha])))
    assert np.abs(pixels - on_white(as_rgb(GREY), alpha)).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(format):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = decode(encoded(image, format, transparency=1))
    np.testing.assert_array_equal(pixels, [[[10, 20, 30], [255, 255, 255]]])


def test_palette_with_alpha_per_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = decode(encoded(image, transparency=bytes([255, 0])))
    np.testing.assert_array_equal(pixels, [[[10, 20, 30], [255, 255, 255]]])


def test_transparent_colour_without_alpha_channel():
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    pixels = decode(encoded(rgb, transparency=(4, 5, 6)))
    np.testing.assert_array_equal(pixels, [[[1, 2, 3], [255, 255, 255]]])
    pixels = decode(encoded(rgb[..., 0], transparency=4))
    np.testing.assert_array_equal(pixels, [[[1, 1, 1], [255, 255, 255]]])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])  # PPM is opened as mode I
def test_16_bit_grey_is_shifted_not_clipped(format):
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    pixels = decode(encoded(values, format))
    np.testing.assert_array_equal(pixels, as_rgb(np.array([[0, 0, 1], [128, 254, 255]])))


def test_16_bit_grey_big_endian():
    image = Image.frombytes("I;16B", (2, 1), bytes([0x12, 0x34, 0xFE, 0xDC]))
    np.testing.assert_array_equal(decode(encoded(image, "TIFF"))[0, :, 0], [0x12, 0xFE])


def test_16_bit_grey_with_a_transparent_value():
    values = np.array([[256, 512]], np.uint16)
    pixels = decode(encoded(values, transparency=512))
    np.testing.assert_array_equal(pixels[0, :, 0], [1, 255])


def png_rgb16(values):
    """A 16-bit RGB PNG, which Pillow can read but not write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def test_16_bit_rgb_is_shifted():
    values = RNG.integers(0, 65536, (4, 3, 3))
    np.testing.assert_array_equal(decode(png_rgb16(values)), values >> 8)


def test_unbounded_grey_is_refused():
    with pytest.raises(CorruptImage, match="outside 0..65535"):
        decode(encoded(np.array([[0, 70000]], np.int32), "TIFF"))
    with pytest.raises(CorruptImage, match="floating-point"):
        decode(encoded(np.array([[0.5]], np.float32), "TIFF"))


# How the stored array follows from the upright one, by EXIF orientation.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])  # Pillow turns TIFF by itself: not twice
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = np.ascontiguousarray(STORED[orientation](RGB))
    np.testing.assert_array_equal(decode(encoded(stored, format, exif=exif)), RGB)


def test_broken_exif_is_no_orientation():
    jpeg = encoded(RGB, "JPEG", exif=b"Exif\0\0nonsense")
    assert decode(jpeg).shape == RGB.shape


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(data), np.full((4, 4, 3), [255, 0, 0]))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
def test_truncated_is_corrupt(format):
    data = encoded(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8), format)
    with pytest.raises(CorruptImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_not_an_image_is_corrupt(data):
    with pytest.raises(CorruptImage):
        decode(data)
    assert size(data) == (0, 0)


def test_decompression_bomb_is_corrupt(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # Pillow itself only warns up to 60
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(CorruptImage, match="7 x 5"):
        decode(encoded(RGB))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with pytest.raises(CorruptImage, match="bomb"):
        decode(encoded(RGB))


def test_file_and_header(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB))
    np.testing.assert_array_equal(decode(path), RGB)
    assert size(path) == size(path.read_bytes()) == (5, 7)
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "b.png")


def test_resize_is_antialiased_and_ignores_aspect():
    stripes = np.zeros((8, 16, 3), np.uint8)
    stripes[:, ::2] = 200
    small = resize(stripes, 4)
    assert small.shape == (4, 4, 3)
    assert np.abs(small.astype(int) - 100).max() <= 15  # without antialiasing: 0 or 200
    assert resize(small, 4) is small
