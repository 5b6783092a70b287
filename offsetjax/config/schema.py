"""Every field of a config, declared once: type, default, range, meaning, unit, names elsewhere, when it may change.

The path of a field names the part of the program that reads it: `noise.offset_strength` is read by
`offsetjax.diffusion.noise`. `offsetjax config` shows what stands here, and so does `REFERENCE.md`.

A family or a process that others bring declares fields of its own in a section of its own, before `get_config()` is
called or as an entry point of the group `offsetjax.sections`:

    SECTIONS.register("my_process", Section("my_process", "…", (Field("shift", float, 1.0, above(0), "…"),)))
"""

from functools import reduce

from offsetjax.config.field import Change, Field, Section
from offsetjax.config.settings import Settings
from offsetjax.registry import Registry

_HERE = "offsetjax.config.sections"
_OWN = {
    "": f"{_HERE}.training:TOP",
    "train": f"{_HERE}.training:TRAIN",
    "data": f"{_HERE}.data:DATA",
    "captions": f"{_HERE}.data:CAPTIONS",
    "encode": f"{_HERE}.data:ENCODE",
    "model": f"{_HERE}.model:MODEL",
    "model.unet": f"{_HERE}.architectures:UNET",
    "model.vae": f"{_HERE}.architectures:AUTOENCODER",
    "model.text_encoder": f"{_HERE}.architectures:TEXT_ENCODER",
    "model.text_encoder_2": f"{_HERE}.architectures:TEXT_ENCODER_2",
    "lora": f"{_HERE}.model:LORA",
    "noise": f"{_HERE}.noise:NOISE",
    "schedule": f"{_HERE}.noise:SCHEDULE",
    "timesteps": f"{_HERE}.noise:TIMESTEPS",
    "loss": f"{_HERE}.noise:LOSS",
    "optimizer": f"{_HERE}.training:OPTIMIZER",
    "mesh": f"{_HERE}.training:MESH",
    "checkpoint": f"{_HERE}.training:CHECKPOINT",
    "sample": f"{_HERE}.evaluation:SAMPLE",
    "validation": f"{_HERE}.evaluation:VALIDATION",
    "probe": f"{_HERE}.evaluation:PROBE",
}
SECTIONS: Registry[Section] = Registry("section", "offsetjax.sections", _OWN)


def sections() -> tuple[Section, ...]:
    """All sections: ours, those that were registered, those of installed packages."""
    return tuple(SECTIONS[name] for name in SECTIONS.names)


def fields() -> dict[str, Field]:
    """Every field by its path."""
    return {path: field for section in sections() for path, field in section.by_path.items()}


def default_config() -> Settings:
    """The defaults of every field: Stable Diffusion 1.x's architecture and schedule, plain noise.

    Returns:
        A locked `ConfigDict` that keeps the types of its values, and remembers which of them are set from then on.
    """
    config = Settings()
    for section in sections():
        node = reduce(_child, section.path.split(".") if section.path else (), config)
        for field in section.fields:
            node[field.name] = field.default
    return config.lock()


def _child(node: Settings, name: str) -> Settings:
    if name not in node:
        node[name] = Settings()
    return node[name]


def default(path: str) -> object:
    """The default of a field."""
    return fields()[path].default


def choices(path: str) -> tuple[str, ...]:
    """The words that a field may be, for the command line."""
    return fields()[path].range.choices


def may_change_on_resume(path: str) -> bool:
    """Whether a run may resume with another value of a field; not where the field is unknown."""
    field = fields().get(path)
    return field is not None and field.change is not Change.NEVER


def is_indifferent(path: str) -> bool:
    """Whether no loss depends on a field, but for rounding: in a report it sets no runs apart."""
    field = fields().get(path)
    return field is not None and field.change is Change.FREELY
