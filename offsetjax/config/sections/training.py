"""How a run goes: steps, optimizer, devices, checkpoints."""

from offsetjax.config.field import Change, Field, Integers, Section, Texts
from offsetjax.config.ranges import (
    ANY,
    DECAY,
    DEVICES,
    FACTOR,
    STEPS_TO_TRACE,
    EachRegistered,
    Registered,
    above,
    at_least,
    at_most_letters,
    count,
    from_up_to,
    one_of,
)
from offsetjax.config.registries import OPTIMIZERS, TASKS, WRITERS

TOP = Section(
    "",
    "The training as a whole.",
    (
        Field(
            "seed",
            int,
            0,
            count(0, 2**32 - 1),
            "of everything that is random: two runs with one seed draw the same",
        ),
        Field("task", str, "diffusion", Registered(TASKS), "what is trained"),
    ),
)

TRAIN = Section(
    "train",
    "What is trained beside the denoiser, for how long, and what is reported meanwhile.",
    (
        Field(
            "text_encoders",
            bool,
            False,
            ANY,
            "whether the text encoders are trained too, whole or, with lora.rank, by adapters; else they are frozen",
            elsewhere={"train_text_encoder": "diffusers"},
        ),
        Field(
            "steps",
            int,
            1000,
            count(1),
            "updates of the parameters in all, those before a resume included",
            elsewhere={"max_train_steps": "kohya, diffusers, SimpleTuner"},
            change=Change.RESUME,
        ),
        Field(
            "stages",
            Texts,
            (),
            at_most_letters(64, each=2000),
            "stages that follow one another, such as 'train.steps=1000 data.resolution=256', each with its own steps, "
            "of which train.steps is the sum; a resume may change those that have not begun",
            change=Change.RESUME,
        ),
        Field(
            "global_batch_size",
            int,
            8,
            count(1),
            "examples of an update, over all devices and parts",
            elsewhere={"train_batch_size": "kohya, diffusers: for one device and part", "batch_size": "OneTrainer"},
        ),
        Field(
            "accumulate_steps",
            int,
            1,
            count(1),
            "parts that a batch is computed in, one after the other, to save memory",
            elsewhere={"gradient_accumulation_steps": "kohya, diffusers, OneTrainer"},
        ),
        Field(
            "compile_ahead",
            int,
            4,
            count(0, 64),
            "where there are several sizes of pictures, how many are compiled at a time before the first step; 0: each "
            "when it comes",
            change=Change.FREELY,
        ),
        Field("log_every_steps", int, 50, count(1), "how often losses are written", "steps", change=Change.FREELY),
        Field(
            "writers",
            Texts,
            ("jsonl", "tensorboard", "terminal"),
            EachRegistered(WRITERS),
            "where losses and pictures are written",
            elsewhere={"log_with": "kohya", "report_to": "diffusers, SimpleTuner"},
            change=Change.FREELY,
        ),
        Field("profile_steps", Integers, (), STEPS_TO_TRACE, "what is traced for xprof", "steps", change=Change.FREELY),
        Field(
            "max_skipped_in_a_row",
            int,
            10,
            count(0),
            "steps that would write what is not finite change nothing; after so many in a row the run ends; 0: never",
            "steps",
            change=Change.FREELY,
        ),
        Field(
            "roll_back",
            bool,
            False,
            ANY,
            "whether instead a run goes back, once, to its newest checkpoint of before these steps, and leaves out the "
            "batches that it has read since",
            change=Change.FREELY,
        ),
        Field(
            "max_spike",
            float,
            0.0,
            FACTOR,
            "nor does a step whose loss or gradient is more than so many times its running mean, such as 10; 0: off",
        ),
        Field(
            "stall_seconds",
            int,
            1800,
            count(0),
            "a run without progress for so long is ended: more than any compilation, evaluation or save; 0: never",
            change=Change.FREELY,
        ),
    ),
)

OPTIMIZER = Section(
    "optimizer",
    "How gradients become updates, the learning rate over the steps, and the average of the weights.",
    (
        Field("name", str, "adamw", Registered(OPTIMIZERS), "which", elsewhere={"optimizer_type": "kohya"}),
        Field(
            "learning_rate",
            float,
            1e-5,
            above(0, at_most=1000),
            "the highest, after the warm-up; for prodigy and dadapt_adamw what multiplies the one they find, often 1",
            elsewhere={"unet_lr": "kohya"},
        ),
        Field(
            "text_encoder_learning_rate",
            float,
            0.0,
            at_least(0, at_most=1000),
            "theirs, where train.text_encoders trains them; 0: the same as optimizer.learning_rate",
            elsewhere={"text_encoder_lr": "kohya"},
        ),
        Field(
            "warmup_steps",
            int,
            100,
            count(0),
            "over which the learning rate rises from 0; cut to train.steps, so that short trials reach it too",
            elsewhere={"lr_warmup_steps": "kohya, diffusers", "learning_rate_warmup_steps": "OneTrainer"},
        ),
        Field(
            "decay",
            str,
            "cosine",
            one_of(
                "cosine",
                "linear",
                "constant",
                "polynomial",
                "inverse_sqrt",
                "warmup_stable_decay",
                "cosine_restarts",
            ),
            "how the learning rate falls to decay_end of itself at train.steps, or does not; inverse_sqrt as "
            "√(warmup_steps / step)",
            elsewhere={"lr_scheduler": "kohya, diffusers", "learning_rate_scheduler": "OneTrainer"},
        ),
        Field(
            "decay_end",
            float,
            0.0,
            from_up_to(0, 1),
            "the last learning rate, as a share of the highest",
            elsewhere={"lr_scheduler_min_lr_ratio": "kohya"},
        ),
        Field(
            "decay_power",
            float,
            1.0,
            above(0, at_most=100),
            "of decay = 'polynomial'; 1: a straight line",
            elsewhere={"lr_scheduler_power": "kohya", "lr_power": "diffusers"},
        ),
        Field(
            "decay_fraction",
            float,
            0.1,
            above(0, at_most=1),
            "the share of the steps in which decay = 'warmup_stable_decay' falls, in a straight line",
        ),
        Field(
            "decay_cycles",
            int,
            1,
            count(1),
            "times that decay = 'cosine_restarts' falls from the highest rate",
            elsewhere={"lr_scheduler_num_cycles": "kohya", "lr_num_cycles": "diffusers"},
        ),
        Field(
            "decay_from",
            int,
            0,
            count(0),
            "the step at which warm-up and decay begin anew, over the steps that are left: of a training that "
            "train.steps extends, its old end",
            "steps",
            change=Change.RESUME,
        ),
        Field(
            "b1",
            float,
            0.9,
            DECAY,
            "decay of the gradient's average, or sgd's momentum",
            elsewhere={"adam_beta1": "diffusers"},
        ),
        Field(
            "b2",
            float,
            0.999,
            DECAY,
            "decay of its square's; of lion's average, for which 0.99 is usual",
            elsewhere={"adam_beta2": "diffusers"},
        ),
        Field(
            "eps", float, 1e-8, above(1e-30, at_most=1), "added to the root", elsewhere={"adam_epsilon": "diffusers"}
        ),
        Field(
            "moment_dtype",
            str,
            "float32",
            one_of("float32", "bfloat16"),
            "of the gradient's average; bfloat16 takes half the memory",
        ),
        Field(
            "weight_decay",
            float,
            0.01,
            at_least(0, at_most=1000),
            "times the learning rate, is the part of the weights that each step takes away",
            elsewhere={"adam_weight_decay": "diffusers"},
        ),
        Field(
            "max_grad_norm",
            float,
            1.0,
            above(0),
            "longer gradients are cut to this length",
            elsewhere={"clip_grad_norm": "OneTrainer"},
        ),
        Field(
            "ema_decay",
            float,
            0.9999,
            DECAY,
            "of the average of the weights over the steps; 0: no average is kept",
            elsewhere={"use_ema": "diffusers, SimpleTuner"},
        ),
    ),
)

MESH = Section(
    "mesh",
    "How the devices are arranged, and what each holds; -1: all devices that are left.",
    (
        Field("data", int, -1, DEVICES, "copies of the weights, each with its part of the batch", "devices"),
        Field(
            "fsdp", int, 1, DEVICES, "devices over which a copy's weights, moments and averages are split", "devices"
        ),
        Field("tensor", int, 1, DEVICES, "devices over which heads and feed-forward layers are split", "devices"),
    ),
    change=Change.FREELY,
)

CHECKPOINT = Section(
    "checkpoint",
    "What is kept of a run, to resume from.",
    (
        Field(
            "every_steps",
            int,
            500,
            count(1),
            "between two checkpoints",
            "steps",
            elsewhere={"save_every_n_steps": "kohya", "checkpointing_steps": "diffusers, SimpleTuner"},
        ),
        Field(
            "max_to_keep",
            int,
            3,
            count(1),
            "the newest checkpoints",
            elsewhere={"save_last_n_steps": "kohya", "checkpoints_total_limit": "diffusers, SimpleTuner"},
        ),
        Field(
            "every_minutes",
            float,
            0.0,
            at_least(0),
            "between two checkpoints, besides those by steps; 0: by steps alone",
        ),
        Field("keep_every_steps", int, 0, count(0), "checkpoints of its multiples are kept for ever; 0: of none"),
    ),
    change=Change.FREELY,
)
