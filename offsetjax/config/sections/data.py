"""The pictures and captions, and what becomes of them before the denoiser."""

from offsetjax.config.field import Change, Field, Section, Texts
from offsetjax.config.ranges import ANY, FRACTION, PLACE, Registered, at_least, between, count, one_of
from offsetjax.config.registries import SOURCES

DATA = Section(
    "data",
    "The pictures that are trained on.",
    (
        Field(
            "path",
            str,
            "",
            PLACE,
            "a data set of `offsetjax data build` or of TFDS: a folder, or gs://",
            elsewhere={"train_data_dir": "kohya, diffusers", "instance_data_dir": "diffusers"},
            change=Change.RESUME,
        ),
        Field(
            "source",
            str,
            "tfds",
            Registered(SOURCES),
            "the kind of data set that data.path is",
            change=Change.RESUME,
        ),
        Field(
            "image_feature",
            str,
            "image",
            ANY,
            "the feature of the data set that is the picture",
            elsewhere={"image_column": "diffusers"},
        ),
        Field(
            "caption_feature",
            str,
            "caption",
            ANY,
            "the feature that is the caption, a text, several, or a class; captions/text is one within another",
            elsewhere={"caption_column": "diffusers"},
        ),
        Field(
            "label_template",
            str,
            "",
            ANY,
            "what a caption is made of a class with: a photo of a {label}",
        ),
        Field("split", str, "train", ANY, "of the data set, such as train[:95%]"),
        Field(
            "resolution",
            int,
            512,
            count(8, 65_536),
            "side of the square that pictures are cut to; with several sizes, its area is theirs",
            "pixels",
        ),
        Field(
            "buckets",
            Texts,
            (),
            ANY,
            "sizes of pictures, such as 1152x896; each picture goes to the one that crops the least of it",
            elsewhere={"enable_bucket": "kohya", "aspect_ratio_bucketing": "OneTrainer"},
        ),
        Field(
            "bucket_count",
            int,
            0,
            count(0, 64),
            "how many sizes are chosen for the data, so that the fewest pixels are cropped; 0: those of "
            "data.buckets, or one square",
        ),
        Field(
            "bucket_step",
            int,
            64,
            count(8, 512),
            "what the sides of chosen sizes are a multiple of",
            "pixels",
            elsewhere={"bucket_reso_steps": "kohya"},
        ),
        Field(
            "max_aspect",
            float,
            3.0,
            between(1, 64),
            "the longer side of a picture over the shorter one; longer ones are left out, and counted",
        ),
        Field(
            "max_enlargement",
            float,
            0.0,
            at_least(0.0),
            "what a picture may be scaled up by; smaller ones go to smaller sizes, or are left out and counted; 0: any",
            elsewhere={"bucket_no_upscale": "kohya"},
        ),
        Field(
            "equal_tokens",
            int,
            0,
            count(0, 65_536),
            "batches of each size have as many pixels as those of squares of data.resolution, in multiples of so many "
            "examples; 0: all have train.global_batch_size",
            "examples",
        ),
        Field(
            "random_flip",
            bool,
            True,
            ANY,
            "half of the pictures are mirrored",
            elsewhere={"flip_aug": "kohya", "enable_random_flip": "OneTrainer"},
        ),
        Field(
            "random_crop",
            bool,
            False,
            ANY,
            "what a picture has beyond its size is cropped at random, not at both ends alike",
            elsewhere={"random_crop": "kohya, diffusers", "enable_crop_jitter": "OneTrainer"},
        ),
        Field(
            "cached_latents",
            bool,
            False,
            ANY,
            "data.path holds latents, from `offsetjax data encode`, not pictures",
            elsewhere={"cache_latents": "kohya", "cache_latents_to_disk": "kohya", "latent_caching": "OneTrainer"},
        ),
        Field(
            "num_workers",
            int,
            0,
            count(0, 1024),
            "processes that read and decode; 0: threads",
            elsewhere={"max_data_loader_n_workers": "kohya", "dataloader_num_workers": "diffusers"},
            change=Change.FREELY,
        ),
        Field(
            "max_bad_fraction",
            float,
            0.01,
            FRACTION,
            "the fraction of records that may be left out in training, where they cannot be read; above it, it ends",
            change=Change.RESUME,
        ),
    ),
)

ENCODE = Section(
    "encode",
    "How pictures and captions become what the denoiser reads.",
    (
        Field(
            "caption_dropout",
            float,
            0.1,
            FRACTION,
            "the fraction of captions that are replaced by the empty one, which guidance needs",
            elsewhere={
                "caption_dropout_rate": "kohya",
                "caption_dropout_probability": "SimpleTuner",
                "proportion_empty_prompts": "diffusers",
            },
        ),
        Field(
            "long_captions",
            str,
            "truncate",
            one_of("truncate", "refuse"),
            "what happens to captions that are longer than the text encoder reads",
        ),
    ),
)
