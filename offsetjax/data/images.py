"""Bytes of a picture → its RGB pixels, for the messy files that people have.

Everything becomes 8-bit sRGB as a viewer would show it: rotated as its EXIF says, its colours as its profile says,
transparency over white, 16 bits scaled down (white is 65535), CMYK and palettes converted. A file that cannot be shown
so raises `UnreadableImage`.
"""

import contextlib
import ctypes
import functools
import io
import threading
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms

from offsetjax.data.buckets import Size
from offsetjax.errors import one_line

# Pictures beyond 8192 x 8192 are refused by their header: 20 kB of PNG can decode to hundreds of megabytes.
MAX_PIXELS = 2**26
BYTES_A_PIXEL = 32  # held at most while one is decoded: with transparency there are several copies of four bytes

CENTRE = 0.5  # of what can be cropped, as much lies before the crop as behind it

# Only these decoders see a file: Pillow's others are rarely used, and one of them starts a PostScript interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_KEPT_FORMATS = ("PNG", "JPEG", "MPO", "WEBP")  # MPO: a JPEG that is followed by further ones, as phones write

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):  # noqa: N818 - the house names errors by what they say
    """The bytes are no picture that we can show; the text is the reason, in a few words."""


class Room:
    """How many pixels all threads of a process may decode at once: as many as the largest picture that is taken.

    A thread waits until its picture goes in beside those of others. So memory is bounded by `BYTES_A_PIXEL` times
    `MAX_PIXELS`, 2.1 GB, whatever the number of threads and the sizes of a stranger's pictures.
    """

    def __init__(self, most: int = MAX_PIXELS):
        self._most, self._used, self._changed = most, 0, threading.Condition()

    @contextlib.contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Inside, that many pixels are in."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._most)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


_ROOM = Room()
_LARGE_PIXELS = 2**22


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an encoded picture, as a viewer shows them.

    Raises:
        UnreadableImage: empty, truncated, corrupt, too large, or of a format or kind that is not supported.
    """
    with _loaded(data) as (image, orientation):
        return _pixels(image, orientation)


def cropped(
    data: bytes, size: Size, place: float = CENTRE
) -> tuple[UInt8[np.ndarray, "size.height size.width 3"], int, int]:
    """What `resize_and_crop` makes of an encoded picture, and the whole one's height and width.

    Raises:
        UnreadableImage: as for `decode`.
    """
    with _loaded(data) as (image, orientation):
        whole = _pixels(image, orientation)
        height, width, _ = whole.shape
        return resize_and_crop(whole, size, place), height, width


def clean(data: bytes) -> tuple[bytes, int, int]:
    """An encoded picture that any decoder shows as `decode` does.

    Returns:
        The bytes, and the picture's height and width. They are the same bytes if the picture is plain sRGB or grey
        in a common format with nothing to rotate, but for a PNG's texts where they are long, and a PNG of its pixels
        otherwise.

    Raises:
        UnreadableImage: as for `decode`.
    """
    data = without_texts(data)
    with _loaded(data) as (image, orientation):
        pixels = _pixels(image, orientation)
        height, width, _ = pixels.shape
        is_plain = image.mode in ("RGB", "L") and "transparency" not in image.info and orientation == 1
        is_plain = is_plain and _to_srgb(image) is None
        if is_plain and image.format in _KEPT_FORMATS and getattr(image, "n_frames", 1) == 1:
            return data, height, width
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue(), height, width


def crop_box(height: int, width: int, size: Size, place: float = CENTRE) -> tuple[float, float, float, float]:
    """The part of a picture that has the shape of `size`, as large as it can be.

    Args:
        place: where it is, from 0, at the left or the top, to 1.

    Returns:
        Left, top, right and bottom in the picture's pixels; it may begin between two of them.
    """
    if width * size.height > height * size.width:  # wider than the size
        wide, high = height * size.width / size.height, float(height)
    else:
        wide, high = float(width), width * size.height / size.width
    left, top = (width - wide) * place, (height - high) * place
    return left, top, left + wide, top + high


def resize_and_crop(
    image: UInt8[np.ndarray, "h w 3"], size: Size, place: float = CENTRE
) -> UInt8[np.ndarray, "size.height size.width 3"]:
    """The part of an image that has the shape of `size` (`crop_box`), scaled to it: LANCZOS to shrink, else bicubic."""
    height, width, _ = image.shape
    if (width, height) == size:
        return image
    left, top, right, bottom = crop_box(height, width, size, place)
    shrinks = right - left > size.width
    resized = Image.fromarray(image).resize(
        size,
        Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC,
        box=(left, top, right, bottom),
        reducing_gap=3.0,  # a box filter does most of a large reduction: faster, and hardly a difference
    )
    return np.asarray(resized)


def time_ids(height: int, width: int, size: Size, place: float = CENTRE) -> Float[np.ndarray, "6"]:
    """What `resize_and_crop` does to a picture, as SDXL's micro-conditioning (arXiv 2307.01952, section 2.2) says it.

    Returns:
        The picture's height and width; the crop's top and left in pixels of the picture after its resize, as
        diffusers' training script counts them, but not rounded; the height and width that it comes to.
    """
    left, top, right, _ = crop_box(height, width, size, place)
    scale = size.width / (right - left)
    return np.array([height, width, top * scale, left * scale, size.height, size.width], np.float32)


def picture_size(data: bytes) -> Size:
    """The size of an encoded picture as a viewer shows it, from its header; only a PNG with an EXIF is decoded.

    Raises:
        UnreadableImage: as for `decode`, as far as the header shows.
    """
    data = without_texts(data)
    image = _open(data)
    is_turned = _says_orientation(data) and _orientation_of(image) in (5, 6, 7, 8)
    return Size(image.height, image.width) if is_turned else Size(image.width, image.height)


def _says_orientation(data: bytes) -> bool:
    """Whether it may. To find none in a PNG Pillow decodes all of its pixels, for one may lie behind them."""
    return not data.startswith(_PNG) or any(name in data for name in (b"eXIf", b"type exif", b"com.adobe.xmp"))


def _orientation_of(image: Image.Image) -> int:
    """That of an image that is not decoded yet; a PNG is, in its room."""
    with _ROOM.of(image.width * image.height):
        return _orientation(image)


@contextlib.contextmanager
def _loaded(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """The decoded image in the file's own mode, and its EXIF orientation, 1 to 8; inside, it has its room."""
    image = _open(data)
    with _ROOM.of(image.width * image.height):
        if image.width * image.height > _LARGE_PIXELS:
            _give_back()
        try:
            image.load()
        except Exception as error:  # a decoder of untrusted bytes may raise anything
            raise UnreadableImage(f"corrupt or truncated: {one_line(error)}") from error
        yield image, _orientation(image)


def _give_back() -> None:
    """Gives the system back what threads have freed: glibc keeps it for each, hundreds of MB after large pictures."""
    with contextlib.suppress(OSError, AttributeError):  # another system's library, which has no such function
        ctypes.CDLL(None).malloc_trim(0)


def _open(data: bytes) -> Image.Image:
    """The image, of which only the header is read."""
    if not data:
        raise UnreadableImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(without_texts(data)), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(f"more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not a picture in a format of " + ", ".join(FORMATS)) from None
    except Exception as error:  # a decoder of untrusted bytes may raise anything
        raise UnreadableImage(f"corrupt: {one_line(error)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata do not make the picture unreadable
        orientation = 1
    return orientation if orientation in _TRANSPOSITIONS else 1


def _pixels(image: Image.Image, orientation: int) -> UInt8[np.ndarray, "h w 3"]:
    try:
        rgb = _to_rgb(image)
    except Exception as error:  # as above: palettes out of range, modes without a conversion
        raise UnreadableImage(f"mode {image.mode} cannot be shown: {one_line(error)}") from error
    if orientation != 1:
        rgb = rgb.transpose(_TRANSPOSITIONS[orientation])
    return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels do not say which value is white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        colours = rgba.convert("RGB")
        colours.info["icc_profile"] = image.info.get("icc_profile")
        if transform := _to_srgb(colours):
            rgba = Image.merge("RGBA", (*_applied(transform, colours).split(), rgba.getchannel("A")))
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    transform = _to_srgb(image)
    return _applied(transform, image) if transform else image.convert("RGB")


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    shown = ImageCms.applyTransform(image, transform)
    assert shown is not None  # it is None where the image is changed in place
    return shown


def _to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """The transform from the image's colours to sRGB; None where it has no profile, a broken one, or sRGB's."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "L", "CMYK"):
        return None
    return _transform(bytes(profile), image.mode)


@functools.lru_cache(maxsize=64)  # one camera's pictures share a profile
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        probe = Image.fromarray(_PROBE).convert(mode)
        shown = np.asarray(_applied(transform, probe), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a profile that cannot be used is none
        return None
    is_srgb = np.abs(shown - np.asarray(probe.convert("RGB"), np.int16)).max() <= 1
    return None if is_srgb else transform


_LEVELS = np.arange(0, 256, 51).astype(np.uint8)
_PROBE = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS), -1).reshape(6, 36, 3)


def without_texts(data: bytes) -> bytes:
    """A PNG without its texts, where they are compressed or long: decoders refuse them, and programs store workflows.

    Other data are given back as they are.
    """
    if not data.startswith(_PNG):
        return data
    kept, at, is_long = [_PNG], len(_PNG), False
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if kind in (b"zTXt", b"iTXt") or (kind == b"tEXt" and length > _LONG_TEXT):
            is_long = True
        else:
            kept.append(data[at:end])
        at = end
    return b"".join(kept) if is_long else data


_PNG, _LONG_TEXT = b"\x89PNG\r\n\x1a\n", 2**16


def _from_16_bits(image: Image.Image) -> Image.Image:
    grey = np.asarray(image)
    scaled = grey.astype(np.uint32)
    scaled += 128
    scaled //= 257
    shown = scaled.astype(np.uint8)
    del scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        shown[grey == transparent] = 255
    return Image.fromarray(shown).convert("RGB")
