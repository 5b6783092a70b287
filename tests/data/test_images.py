"""Pictures of every kind are shown as a viewer shows them, and what is none is refused without decoding it."""

import contextlib
import io
import os
import pathlib
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngImageFile, PngInfo

from offsetjax.data import images
from offsetjax.data.buckets import Size, square
from offsetjax.data.images import (
    MAX_PIXELS,
    Room,
    UnreadableImage,
    clean,
    decode,
    picture_size,
    resize_and_crop,
    time_ids,
)
from offsetjax.data.record import Picture


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_file(width: int, height: int, packed_rows: bytes = b"") -> bytes:
    """A PNG that says how large it is, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed_rows) + chunk(b"IEND", b"")


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_plain_pictures_decode_exactly_and_keep_their_bytes() -> None:
    pixels = noise(5, 7)
    for kind in ("PNG", "WEBP"):
        data = encode(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
        np.testing.assert_array_equal(decode(data), pixels)
        assert clean(data) == (data, 5, 7)
    grey = encode(Image.fromarray(pixels[..., 0]))
    np.testing.assert_array_equal(decode(grey), np.repeat(pixels[..., :1], 3, axis=-1))
    assert clean(grey)[0] is grey
    jpeg = encode(Image.fromarray(pixels), "JPEG")
    assert clean(jpeg)[0] is jpeg


@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_transparency_lies_over_white(alpha: int) -> None:
    colour, white = np.array([200, 100, 0]), 255
    expected = (colour * alpha + white * (255 - alpha)) / 255
    shown = decode(encode(Image.new("RGBA", (3, 2), (200, 100, 0, alpha))))
    assert shown.shape == (2, 3, 3) and np.abs(shown - expected).max() <= 1
    shown = decode(encode(Image.new("LA", (3, 2), (100, alpha))))
    assert np.abs(shown - expected[1]).max() <= 1


def test_a_palette_keeps_its_colours_and_its_transparent_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode(encode(image))[0], [[10, 20, 30], [200, 100, 50]])
    for kind in ("PNG", "GIF"):
        shown = decode(encode(image, kind, transparency=0))
        np.testing.assert_array_equal(shown[0], [[255, 255, 255], [200, 100, 50]])
    rgb = encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode(rgb)[0], [[255, 255, 255], [4, 5, 6]])


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 30000, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encode(Image.fromarray(values), kind))[0, :, 0], [0, 1, 117, 255])


def test_cmyk_jpegs_have_their_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 40))
    data = encode(red.convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(decode(data).astype(int) - (220, 30, 40)).max() <= 4
    again = Image.open(io.BytesIO(clean(data)[0]))
    assert (again.mode, again.format) == ("RGB", "PNG")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_pictures_are_turned_as_their_exif_says(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(noise(2, 3)), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(data), expected)
    stored, height, width = clean(data)
    assert (height, width) == ((3, 2) if orientation > 4 else (2, 3))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), expected)
    assert (stored == data) == (orientation == 1 and kind != "TIFF")


def test_broken_exif_does_not_make_a_picture_unreadable() -> None:
    data = encode(Image.fromarray(noise(2, 3)), "JPEG", exif=b"Exif\x00\x00nonsense")
    assert decode(data).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not a picture"),
        (encode(Image.fromarray(noise(64, 64)))[:-3000], "truncated"),
        (encode(Image.fromarray(noise(64, 64)), "JPEG")[:2000], "truncated"),
        (encode(Image.fromarray(noise(64, 64)))[:20], "corrupt|not a picture"),
        (encode(Image.new("F", (2, 2), 0.5), "TIFF"), "white"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    for read in (decode, clean):
        with pytest.raises(UnreadableImage, match=reason):
            read(data)


def test_flipped_bytes_are_refused_or_shown_but_raise_nothing_else() -> None:
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        data = np.frombuffer(encode(Image.fromarray(noise(24, 24)), kind), np.uint8)
        for _ in range(30):
            broken = data.copy()
            broken[rng.integers(0, min(len(data), 400), 4)] = rng.integers(0, 256, 4)
            with contextlib.suppress(UnreadableImage):
                assert decode(broken.tobytes()).ndim == 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 12_000, 60_000])
def test_more_pixels_than_allowed_are_refused(side: int) -> None:
    assert side * side > MAX_PIXELS
    with pytest.raises(UnreadableImage, match=f"more than {MAX_PIXELS} pixels"):
        decode(png_file(side, side))


def test_a_bomb_is_refused_before_it_takes_memory(tmp_path: pathlib.Path) -> None:
    # 81 million black pixels in about 240 kB: below Pillow's own limit, and 240 MB when decoded.
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + 3 * 9000)) for _ in range(9000)) + rows.flush()
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_file(9000, 9000, packed))
    assert bomb.stat().st_size < 300_000
    program = """
import io, pathlib, re, sys
from PIL import Image
from offsetjax.data.images import UnreadableImage, decode
bomb = pathlib.Path(sys.argv[1]).read_bytes()
def peak():  # of this program alone: ru_maxrss would begin at the size of the tests' own process
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
try:
    decode(bomb)
except UnreadableImage:
    print(peak() - before)
Image.open(io.BytesIO(bomb)).load()
print(peak() - before)
"""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, bomb], capture_output=True, text=True, env=environment, check=True
    )
    grown_kb, undefended_kb = map(int, done.stdout.split())
    assert grown_kb < 64 * 1024
    assert undefended_kb > 200 * 1024, "the bomb is none, so that the check above proves nothing"


def test_the_centre_square_is_kept() -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200  # the middle square
    np.testing.assert_array_equal(resize_and_crop(image, square(40)), 200)
    assert np.abs(resize_and_crop(image.transpose(1, 0, 2), square(20)).astype(int) - 200)[2:-2].max() <= 1
    # A picture that is symmetric stays so: the crop is not off by a pixel.
    mirrored = noise(31, 64)
    mirrored = np.concatenate([mirrored, mirrored[:, ::-1]], axis=1)
    cropped = resize_and_crop(mirrored, square(16)).astype(int)
    assert np.abs(cropped - cropped[:, ::-1]).max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1024, 1024, (0, 0)),
        (1000, 1500, (0, 256)),  # 1536 x 1024 when resized
        (4000, 2000, (512, 0)),
        (256, 384, (0, 256)),  # enlarged
        (768, 1025, (0, 171)),  # 1366.67 px wide: diffusers makes it 1366, and begins at 171
        (1999, 1237, (315, 0)),  # 1654.78 px high: 1654, from 315
    ],
)
def test_time_ids_are_those_of_diffusers_to_the_pixel(height: int, width: int, expected: tuple[int, int]) -> None:
    ids = time_ids(height, width, square(1024))
    assert ids.dtype == np.float32 and ids[[0, 1, 4, 5]].tolist() == [height, width, 1024, 1024]
    is_whole = (max(height, width) * 1024) % min(height, width) == 0
    np.testing.assert_allclose(ids[2:4], expected, atol=0 if is_whole else 0.75)


@pytest.mark.parametrize("resolution", [16, 64, 200])
def test_resizing_agrees_with_resizing_first_and_cropping_then(resolution: int) -> None:
    y, x = np.mgrid[:128, :256]
    image = np.stack([x, y * 2, 255 - x], axis=-1).astype(np.uint8)
    whole = Image.fromarray(image).resize((2 * resolution, resolution), Image.Resampling.LANCZOS)
    expected = np.asarray(whole, np.int16)[:, resolution // 2 : resolution // 2 + resolution]
    actual = resize_and_crop(image, square(resolution))
    assert actual.shape == (resolution, resolution, 3) and actual.dtype == np.uint8
    assert np.abs(actual - expected).max() <= 3


def test_resizing_keeps_the_brightness_and_a_stripe_does_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize_and_crop(stripes, square(64))
    assert abs(small.mean() - 127.5) < 2 and np.ptp(small[8:-8, 8:-8]) < 8, "picking each 8th column gives one colour"


def test_a_single_pixel_and_a_sliver_can_be_resized() -> None:
    for shape in ((1, 1, 3), (1, 5000, 3), (5000, 1, 3)):
        np.testing.assert_array_equal(resize_and_crop(np.full(shape, 90, np.uint8), square(8)), np.full((8, 8, 3), 90))


def display_p3() -> bytes:
    """An ICC profile of version 4 with the primaries of Display P3 and sRGB's curve."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = fixed(0.9642, 1.0, 0.8249)
    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    primaries = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 3) + b"P3" + bytes(79), b"cprt": b"text" + bytes(8)}
    tags |= {b"wtpt": b"XYZ " + bytes(4) + white}
    for letter, primary in zip(b"rgb", primaries, strict=True):
        tags |= {bytes([letter]) + b"XYZ": b"XYZ " + bytes(4) + fixed(*primary), bytes([letter]) + b"TRC": curve}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    about = struct.pack(">I4x", start + len(body)) + bytes([4, 0x30, 0, 0]) + b"mntrRGB XYZ "
    header = about + struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_those_of_the_profile(mode: str) -> None:
    """(200, 100, 50) of Display P3 is (215, 93, 31) of sRGB."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 100, 50)).convert(mode).save(file, "PNG", icc_profile=display_p3())
    assert (np.abs(decode(file.getvalue()).astype(int) - (215, 93, 31)) <= 1).all()
    stored, _, _ = clean(file.getvalue())
    shown = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"), int)
    assert (np.abs(shown - (215, 93, 31)) <= 1).all() and "icc_profile" not in Image.open(io.BytesIO(stored)).info


@pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_a_profile_of_srgb_or_a_broken_one_leaves_the_file_as_it_is(profile: bytes) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 100, 50)).save(file, "PNG", icc_profile=profile)
    assert clean(file.getvalue())[0] == file.getvalue()


def test_long_texts_of_a_png_are_left_out() -> None:
    info, file = PngInfo(), io.BytesIO()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("workflow", "y" * 3_000_000)
    Image.new("RGB", (4, 4), (200, 100, 50)).save(file, "PNG", pnginfo=info)
    stored, height, width = clean(file.getvalue())
    assert len(stored) < 200 and (height, width) == (4, 4)
    assert (decode(file.getvalue()) == (200, 100, 50)).all() and (decode(stored) == (200, 100, 50)).all()


def test_a_size_is_that_of_the_turned_picture_and_nothing_is_decoded_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG"):
        turned = encode(Image.new("RGB", (30, 20)), kind, exif=exif)
        assert picture_size(turned) == (20, 30) == decode(turned).shape[1::-1]
    decoded: list[tuple[int, int]] = []
    monkeypatch.setattr(PngImageFile, "load", lambda image: decoded.append(image.size))
    assert picture_size(png_file(8000, 4000)) == (8000, 4000) and not decoded


def test_threads_decode_no_more_pixels_at_once_than_one_large_picture_has() -> None:
    room, most, lock = Room(1000), [0, 0], threading.Lock()

    def use(pixels: int) -> None:
        with room.of(pixels):
            with lock:
                most[0] += pixels
                most[1] = max(most[1], most[0])
            time.sleep(0.002)
            with lock:
                most[0] -= pixels

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, [1000, 1, 400, 300, 300, 5000, 999, 2] * 8))
    assert most[0] == 0 and most[1] <= 5000, "one that is larger than the room has it for itself"
    with ThreadPoolExecutor(16) as pool:
        most[1] = 0
        list(pool.map(use, [400, 300, 300, 250, 1000] * 8))
    assert most[1] <= 1000


def test_every_way_to_decode_takes_its_room_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Noted(Room):
        @contextlib.contextmanager
        def of(self, pixels: int) -> Iterator[None]:
            with super().of(pixels):
                taken.append(pixels)
                yield

    room = Noted()
    monkeypatch.setattr(images, "_ROOM", room)
    data = encode(Image.fromarray(noise(20, 30)))
    for use in (images.decode, images.clean, lambda data: images.cropped(data, square(8))):
        use(data)
        with pytest.raises(UnreadableImage):
            use(data[:200])
    assert taken == [600] * 6 and room._used == 0


MEASURE = """
import io, resource
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from offsetjax.data import images
from offsetjax.data.buckets import square

images._ROOM = images.Room(2500 * 2500)
buffer = io.BytesIO()
Image.new("RGBA", (2500, 2500)).save(buffer, "PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(6) as pool:
    list(pool.map(lambda _: images.cropped(buffer.getvalue(), square(64))[1], range(6)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 2500**2 / images.BYTES_A_PIXEL)
"""


def test_the_memory_of_all_threads_is_bounded() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 1.25, "six threads without a bound took 5 times as much"


@pytest.mark.parametrize(("width", "height"), [(40, 16), (16, 40), (16, 16)])
@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_a_mirrored_crop_is_the_crop_of_the_mirrored_picture(width: int, height: int, place: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    size = Size(16, 16)
    seen = Picture(pixels, "").view(size, True, place)
    is_wide = width > height
    mirrored = Picture(np.ascontiguousarray(pixels[:, ::-1]), "").view(size, False, 1 - place if is_wide else place)
    np.testing.assert_allclose(seen["pixels"].astype(int), mirrored["pixels"].astype(int), atol=1)
    np.testing.assert_allclose(seen["time_ids"], mirrored["time_ids"])
    plain = Picture(pixels, "").view(size, False, place)
    left, top = (width - 16) * place * is_wide, (height - 16) * place
    np.testing.assert_allclose(plain["time_ids"], [height, width, top, left, 16, 16], rtol=1e-6)
    if float(left).is_integer() and float(top).is_integer():
        whole = pixels[int(top) : int(top) + 16, int(left) : int(left) + 16]
        np.testing.assert_array_equal(plain["pixels"], whole)
