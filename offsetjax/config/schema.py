"""The fields of a config, with their defaults, and what other trainers call them."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

# The names that other trainers use for our fields, so that an error can translate them.
FOREIGN_NAMES = {
    "noise_offset": "noise.offset_strength",
    "offset_noise_weight": "noise.offset_strength",
    "noise_offset_random_strength": "noise.random_strength",
    "noise_offset_probability": "noise.probability",
    "adaptive_noise_scale": "noise.adaptive_scale",
    "multires_noise_discount": "noise.pyramid_discount",
    "multires_noise_iterations": "noise.pyramid_levels",
    "ip_noise_gamma": "noise.input_perturbation",
    "input_perturbation": "noise.input_perturbation",
    "zero_terminal_snr": "schedule.zero_terminal_snr",
    "rescale_betas_zero_snr": "schedule.zero_terminal_snr",
    "min_snr_gamma": "loss.min_snr_gamma",
    "snr_gamma": "loss.min_snr_gamma",
    "v_parameterization": "schedule.prediction_type",
    "caption_dropout_rate": "encode.caption_dropout",
    "pretrained_model_name_or_path": "model.pretrained",
    "train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.accumulate_steps",
    "max_train_steps": "train.steps",
    "cache_latents": "data.cached_latents",
    "cache_latents_to_disk": "data.cached_latents",
    "lr_scheduler": "optimizer.decay",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "timestep_spacing": "sample.spacing",
    "sample_sampler": "sample.sampler",
    "guidance_rescale": "sample.guidance_rescale",
    "text_encoder_lr": "optimizer.text_encoder_learning_rate",
    "train_text_encoder": "optimizer.text_encoder_learning_rate",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "lora_alpha": "lora.alpha",
    "network_weights": "lora.pretrained",
    "target_modules": "lora.targets",
    "min_timestep": "loss.min_timestep",
    "timestep_bias_begin": "loss.min_timestep",
    "gradient_checkpointing": "model.remat",
    "enable_xformers_memory_efficient_attention": "model.attention",
    "xformers": "model.attention",
    "sdpa": "model.attention",
    "mem_eff_attn": "model.attention",
}


# What no loss depends on, but for rounding: it may change when a run resumes, and in a report it sets no runs apart.
INDIFFERENT_FIELDS = (
    "train.log_every_steps",
    "train.profile_steps",
    "train.stall_seconds",
    "data.num_workers",
    "model.attention",
    "model.remat",
    "model.scan_layers",
)
INDIFFERENT_SECTIONS = ("mesh", "checkpoint")


def default_config() -> ConfigDict:
    """The defaults of every field: Stable Diffusion 1.x's architecture and schedule, plain noise.

    Returns:
        A locked `ConfigDict`; a value keeps the type that it has here.
    """
    config = ConfigDict()
    config.seed = 0
    config.task = "diffusion"  # or "autoencoder"
    config.train = ConfigDict(
        {
            "steps": 1000,
            "global_batch_size": 8,
            "accumulate_steps": 1,
            "log_every_steps": 50,
            "profile_steps": (),  # the first and the last step of a trace for xprof, such as (20, 24)
            # Longer than the longest compilation, step, watch or save: what hangs for so long is ended; 0: nothing is.
            "stall_seconds": 1800,
        }
    )
    config.data = ConfigDict(
        {
            "path": "",
            "split": "train",
            "resolution": 512,
            "random_flip": True,
            "cached_latents": False,  # the path is of latents, from `offsetjax data encode`, not of pictures
            "num_workers": 0,
        }
    )
    config.encode = ConfigDict({"caption_dropout": 0.1, "long_captions": "truncate"})  # or "refuse"
    config.model = ConfigDict(
        {
            "pretrained": "",  # a diffusers directory or a single file; its architecture replaces the one below
            "variant": "",  # of a directory's weights, such as fp16; empty: the plain files, or the only variant
            "family": "",  # sd1, sd2 or sdxl; empty: as the checkpoint or the architecture below says
            "from_scratch": (),  # parts to draw at random: unet, vae, text_encoder, text_encoder_2, tokenizer
            "dtype": "bfloat16",  # compute, but for an autoencoder that is trained; parameters are float32
            "attention": "auto",  # the kernel in training: splash on TPUs, cudnn on GPUs, xla elsewhere
            "remat": "none",  # what the backward pass computes again: none, attention, blocks or full
            "scan_layers": "auto",  # layers that repeat become a loop: always, never, or auto: where FSDP splits them
            "unet": {
                "sample_size": 64,
                "in_channels": 4,
                "out_channels": 4,
                "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                "block_out_channels": (320, 640, 1280, 1280),
                "layers_per_block": 2,
                "attention_head_dim": (8, 8, 8, 8),  # the number of heads of each block, by diffusers' name
                "cross_attention_dim": 768,
                "use_linear_projection": False,
                "norm_num_groups": 32,
                "flip_sin_to_cos": True,
                "freq_shift": 0,
                "transformer_layers_per_block": (1, 1, 1, 1),
                "addition_embed_type": "",  # "text_time": SDXL's pooled text and micro-conditioning
                "addition_time_embed_dim": 0,
                "projection_class_embeddings_input_dim": 0,
            },
            "vae": {
                "in_channels": 3,
                "out_channels": 3,
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "latent_channels": 4,
                "norm_num_groups": 32,
                "sample_size": 512,
                "scaling_factor": 0.18215,  # 0: standardise the latents on the data, then 1
                "mid_block_add_attention": True,
            },
            "text_encoder": {
                "vocab_size": 49408,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "max_position_embeddings": 77,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
                "projection_dim": 768,
            },
            "text_encoder_2": {  # of SDXL alone: OpenCLIP ViT-bigG
                "vocab_size": 49408,
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 20,
                "max_position_embeddings": 77,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,
                "projection_dim": 1280,
            },
            "force_zeros_for_empty_prompt": False,  # an empty caption is zeros, as SDXL base was trained
        }
    )
    config.lora = ConfigDict(
        {
            "rank": 0,  # 0: the weights themselves are trained
            "alpha": 0.0,  # the adapters are scaled by alpha / rank; 0: alpha is the rank
            "targets": ("to_q", "to_k", "to_v", "to_out.0"),  # of the denoiser, by the ends of diffusers' names
            "text_encoder_targets": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "pretrained": "",  # a LoRA to start from: a .safetensors file with diffusers' or kohya's keys
        }
    )
    config.noise = ConfigDict(
        {
            "kind": "offset",  # or "pyramid", "spectral", "adjusted"
            "offset_strength": 0.0,  # 0: plain noise
            "channel_strengths": (),  # instead, one for each latent channel
            "random_strength": False,  # an example's strength is uniform from 0 to the one given
            "probability": 1.0,  # the share of the examples that have an offset
            "adaptive_scale": 0.0,  # times the absolute mean of a latent's channel, is added to the strength
            "pyramid_discount": 0.0,
            "pyramid_levels": 0,
            "spectrum": (),  # a formula of the frequency, or one for each latent channel
            "input_perturbation": 0.0,  # further noise in the network's input alone
            "reference_resolution": 0,  # the strength is for pictures of this size, and c √N is kept; 0: for all
            "calibration": "",  # a file of `offsetjax calibrate`, which fills in strengths or spectrum
            "data_mean": (),  # of the latents' channels, and its deviation over pictures, for a matched
            "data_mean_std": (),  # start with adaptive_scale; noise.calibration fills them in
        }
    )
    config.schedule = ConfigDict(
        {
            "process": "variance_preserving",  # or another of diffusion/process.py's
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
            "zero_terminal_snr": False,
        }
    )
    config.loss = ConfigDict({"min_snr_gamma": 0.0, "min_timestep": 0, "kl_weight": 1e-6})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-5,
            "text_encoder_learning_rate": 0.0,  # 0: the text encoders are frozen
            "warmup_steps": 100,  # cut to train.steps, so that short trials reach the learning rate too
            "decay": "cosine",
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "ema_decay": 0.9999,  # 0: no average is kept
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # devices an axis; -1: all that are left
    config.checkpoint = ConfigDict({"every_steps": 500, "max_to_keep": 3})
    config.sample = ConfigDict(
        {
            "every_steps": 500,  # 0: no pictures during training
            "prompts": (),
            "negative_prompt": "",
            "seeds_per_prompt": 4,
            "num_steps": 50,
            "sampler": "ddim",
            "guidance_scale": 7.5,
            "guidance_rescale": 0.0,
            "spacing": "trailing",
            "start_noise": "matched",  # to the training's; or "plain", as other programs sample
            "brightness": (),  # of the start, in standard deviations; a picture each; none: drawn at random
            "params": "ema",
        }
    )
    config.validation = ConfigDict(
        {"every_steps": 0, "split": "", "num_examples": 64, "timesteps": (100, 300, 500, 700, 900, 999)}
    )
    config.probe = ConfigDict({"every_steps": 0, "prompts": ("",), "seeds_per_prompt": 32})
    return config.lock()


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `("noise.offset_strength", value)` for each field, sections and fields by name."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
