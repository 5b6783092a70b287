"""What a config names by a word and others may add to: what is in each is said where it is used."""

from typing import Any

from offsetjax.registry import Registry

SOURCES: Registry[Any] = Registry(
    "data.source",
    "offsetjax.sources",
    {"tfds": "offsetjax.data.tfds:open_pictures", "latents": "offsetjax.data.latents:open_latents"},
)
OPTIMIZERS: Registry[Any] = Registry(
    "optimizer.name",
    "offsetjax.optimizers",
    {
        "adamw": "offsetjax.training.optimizer:adamw",
        **{
            name: f"offsetjax.training.optimizers:{name}"
            for name in ("adafactor", "dadapt_adamw", "lion", "muon", "prodigy", "sgd")
        },
    },
)
TASKS: Registry[Any] = Registry(
    "task",
    "offsetjax.tasks",
    {
        "diffusion": "offsetjax.training.diffusion:DIFFUSION",
        "autoencoder": "offsetjax.training.autoencoder:AUTOENCODER",
    },
)
WRITERS: Registry[Any] = Registry(
    "train.writers",
    "offsetjax.writers",
    {
        "jsonl": "offsetjax.training.jsonl:JsonLines",
        "tensorboard": "offsetjax.training.writers:TensorBoard",
        "terminal": "offsetjax.training.writers:Terminal",
    },
)
