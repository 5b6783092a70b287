"""The networks' weights and how they are computed; their shapes are in `architectures.py`."""

from offsetjax.config.families import FAMILIES
from offsetjax.config.field import Change, Field, Section, Texts
from offsetjax.config.ranges import ANY, PLACE, Registered, at_least, at_most_letters, count, one_of

MODEL = Section(
    "model",
    "The networks: where their weights come from, and how they are computed.",
    (
        Field(
            "pretrained",
            str,
            "",
            PLACE,
            "a diffusers directory or a single file; its architecture replaces the one in the sections below",
            elsewhere={
                "pretrained_model_name_or_path": "kohya, diffusers, SimpleTuner",
                "base_model_name": "OneTrainer",
            },
            change=Change.RESUME,
        ),
        Field(
            "variant",
            str,
            "",
            ANY,
            "of a directory's weights, such as fp16; empty: the plain files, or the only variant",
            change=Change.RESUME,
        ),
        Field(
            "family",
            str,
            "",
            Registered(FAMILIES, empty="is found out"),
            "the kind of model; empty: as the checkpoint or the architecture says",
            elsewhere={"v2": "kohya", "sdxl": "kohya", "model_type": "OneTrainer"},
        ),
        Field(
            "from_scratch",
            Texts,
            (),
            ANY,  # a part of the family, see rules.py
            "the parts of model.pretrained that are drawn at random rather than loaded",
        ),
        Field(
            "dtype",
            str,
            "bfloat16",
            one_of("float32", "bfloat16"),
            "of computing, but for an autoencoder that is trained; parameters are float32",
            elsewhere={"mixed_precision": "kohya, diffusers", "train_dtype": "OneTrainer"},
        ),
        Field(
            "attention",
            str,
            "auto",
            one_of("auto", "xla", "splash", "cudnn"),
            "the kernel of attention in training; auto: splash on TPUs, cudnn on GPUs, xla elsewhere",
            elsewhere={
                "enable_xformers_memory_efficient_attention": "diffusers",
                "xformers": "kohya",
                "sdpa": "kohya",
                "mem_eff_attn": "kohya",
                "attention_mechanism": "OneTrainer, SimpleTuner",
            },
            change=Change.FREELY,
        ),
        Field(
            "remat",
            str,
            "none",
            one_of("none", "attention", "blocks", "full"),
            "what the backward pass computes again, to save memory",
            elsewhere={"gradient_checkpointing": "kohya, diffusers, OneTrainer"},
            change=Change.FREELY,
        ),
        Field(
            "scan_layers",
            str,
            "auto",
            one_of("auto", "always", "never"),
            "whether layers that repeat are compiled once, in a loop; auto: with mesh.fsdp of 8 and more",
            change=Change.FREELY,
        ),
        Field(
            "force_zeros_for_empty_prompt",
            bool,
            False,
            ANY,
            "an empty caption is zeros rather than encoded, as SDXL base was trained",
        ),
    ),
)

LORA = Section(
    "lora",
    "Adapters of low rank, which are trained in place of the weights.",
    (
        Field(
            "rank",
            int,
            0,
            count(0, 65_536),
            "of the adapters; 0: the weights themselves are trained",
            elsewhere={"network_dim": "kohya", "lora_rank": "SimpleTuner, OneTrainer"},
        ),
        Field(
            "alpha",
            float,
            0.0,
            at_least(0),
            "the adapters are scaled by alpha / rank; 0: alpha is the rank",
            elsewhere={"network_alpha": "kohya", "lora_alpha": "SimpleTuner, OneTrainer, peft"},
        ),
        Field(
            "targets",
            Texts,
            ("to_q", "to_k", "to_v", "to_out.0"),
            at_most_letters(4096, each=1000),
            "the layers of the denoiser that are adapted, by the ends of diffusers' names; by default its family's",
            elsewhere={"target_modules": "peft", "layer_filter": "OneTrainer"},
        ),
        Field(
            "text_encoder_targets",
            Texts,
            ("q_proj", "k_proj", "v_proj", "out_proj"),
            at_most_letters(4096, each=1000),
            "those of the text encoders",
        ),
        Field(
            "pretrained",
            str,
            "",
            PLACE,
            "a LoRA to start from: a .safetensors file with diffusers' or kohya's keys",
            elsewhere={"network_weights": "kohya", "init_lora": "SimpleTuner"},
            change=Change.RESUME,
        ),
    ),
)
