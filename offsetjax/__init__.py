"""offsetjax: latent diffusion on TPU pods, with offset noise as a first-class feature."""

__all__ = ["__version__", "offset_noise"]
__version__ = "0.1.0"

is_program = False  # whether this process is the command `offsetjax`, with nobody else's code beside it


def __getattr__(name: str) -> object:
    # At its first use: the command hears signals from its first lines on, before JAX is imported.
    if name == "offset_noise":
        from offsetjax.diffusion.noise import offset_noise

        return offset_noise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
