"""offsetjax: latent diffusion on TPU pods, with offset noise as a first-class feature."""

from offsetjax.diffusion.noise import offset_noise

__all__ = ["__version__", "offset_noise"]
__version__ = "0.1.0"
