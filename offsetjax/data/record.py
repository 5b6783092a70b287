"""Records of pictures and of latents, as a batch takes them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Float32, UInt8

from offsetjax.data.buckets import Size
from offsetjax.data.images import CENTRE, UnreadableImage, cropped, decode, picture_size, resize_and_crop, time_ids


@dataclass(frozen=True)
class Picture:
    """A picture, as encoded in its file or as RGB, its caption, and further ones where there are several."""

    image: bytes | UInt8[np.ndarray, "h w 3"]
    caption: str
    name: str = ""
    others: tuple[str, ...] = ()

    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """The whole picture in RGB, as a viewer shows it.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        return decode(self.image) if isinstance(self.image, bytes) else self.image

    def size(self) -> Size:
        """The whole picture's, from its header.

        Raises:
            UnreadableImage: it is no picture.
        """
        if isinstance(self.image, bytes):
            return picture_size(self.image)
        return Size(self.image.shape[1], self.image.shape[0])

    def view(self, size: Size, is_mirrored: bool, place: float = CENTRE) -> dict[str, np.ndarray]:
        """`pixels` and `time_ids` of a part of the picture, scaled to `size`; see `images.crop_box`.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        if isinstance(self.image, bytes):
            pixels, height, width = cropped(self.image, size, place)
        else:
            height, width, _ = self.image.shape
            pixels = resize_and_crop(self.image, size, place)
        if not is_mirrored:
            return {"pixels": pixels, "time_ids": time_ids(height, width, size, place)}
        # Of the mirrored picture it is the part as far from the left as it was from the right; from the top it stays.
        is_wide = width * size.height > height * size.width
        return {"pixels": pixels[:, ::-1], "time_ids": time_ids(height, width, size, 1 - place if is_wide else place)}

    def brightness(self, size: Size) -> float:
        """The mean of the central part's values, 0 black and 1 white.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        return float(self.view(size, False)["pixels"].mean() / 255.0)


@dataclass(frozen=True)
class Latents:
    """What an autoencoder made of a cropped picture, and of its mirror image where there are two views.

    Attributes:
        views: mean and log-variance of the posterior, not scaled, of each view.
        time_ids: of the picture's crop.
        mean_brightness: of the cropped picture, which its latents do not show.
        size: of the cropped picture, in a cache of several; 0x0 where it has no latents.
    """

    views: Float16[np.ndarray, "v 2 c h w"]
    time_ids: Float32[np.ndarray, "6"]
    mean_brightness: float
    caption: str
    name: str = ""
    size: Size | None = None

    def view(self, size: Size, is_mirrored: bool) -> dict[str, np.ndarray]:
        """`moments` of one view, and `time_ids`.

        Raises:
            UnreadableImage: there are none, or of another size.
        """
        if self.size and self.size != size:
            raise UnreadableImage(f"its latents are of {self.size} pixels, not of {size}")
        return {"moments": self.views[-1 if is_mirrored else 0], "time_ids": self.time_ids}

    def brightness(self, size: Size) -> float:
        """The mean of the cropped picture's values, 0 black and 1 white; the size is that of the cache."""
        del size
        return self.mean_brightness
