"""The fields of the networks, by the names that diffusers and transformers give them in their `config.json`.

The defaults are Stable Diffusion 1.x; `presets.py` has the others, and `model.pretrained` brings its own.
"""

from offsetjax.config.field import Field, Integers, Section, Texts
from offsetjax.config.ranges import ANY, above, at_least, count, each_count, each_of, one_of

_WIDTH = count(1, 65_536)
_LAYERS = count(1, 1024)
_WIDTHS = each_count(1, 65_536)

UNET = Section(
    "model.unet",
    "The denoiser of Stable Diffusion 1.x, 2.x and XL.",
    (
        Field("sample_size", int, 64, _WIDTH, "the size of the latents that programs draw by default", "latents"),
        Field("in_channels", int, 4, _WIDTH, "channels of its input, as many as the latents have"),
        Field("out_channels", int, 4, _WIDTH, "channels of its output, as many as the latents have"),
        Field(
            "down_block_types",
            Texts,
            ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            each_of("CrossAttnDownBlock2D", "DownBlock2D"),
            "the blocks on the way down, from the widest latents to the narrowest",
        ),
        Field(
            "up_block_types",
            Texts,
            ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            each_of("CrossAttnUpBlock2D", "UpBlock2D"),
            "the blocks on the way up",
        ),
        Field("block_out_channels", Integers, (320, 640, 1280, 1280), _WIDTHS, "channels of each block"),
        Field("layers_per_block", int, 2, _LAYERS, "residual layers of each block"),
        Field(
            "attention_head_dim",
            Integers,
            (8, 8, 8, 8),
            _WIDTHS,
            "the number of heads of each block, by diffusers' name",
        ),
        Field("cross_attention_dim", int, 768, _WIDTH, "width of the text encoders' outputs, side by side"),
        Field("use_linear_projection", bool, False, ANY, "a linear layer around attention, where others convolve"),
        Field("norm_num_groups", int, 32, _WIDTH, "groups of the normalisations"),
        Field("flip_sin_to_cos", bool, True, ANY, "cosines before sines in the timestep's embedding"),
        Field("freq_shift", int, 0, count(0, 1), "of the frequencies of the timestep's embedding"),
        Field(
            "transformer_layers_per_block",
            Integers,
            (1, 1, 1, 1),
            each_count(1, 1024),
            "attention layers of each block",
        ),
        Field(
            "addition_embed_type",
            str,
            "",
            one_of("", "text_time"),
            "text_time: SDXL's pooled text and micro-conditioning",
        ),
        Field("addition_time_embed_dim", int, 0, count(0, 65_536), "width of the embedding of each size of a picture"),
        Field("projection_class_embeddings_input_dim", int, 0, count(0, 1 << 20), "width of the added conditions"),
    ),
)

AUTOENCODER = Section(
    "model.vae",
    "The autoencoder, between pictures and latents.",
    (
        Field("in_channels", int, 3, _WIDTH, "channels of a picture: red, green and blue"),
        Field("out_channels", int, 3, _WIDTH, "channels of a picture: red, green and blue"),
        Field("down_block_types", Texts, ("DownEncoderBlock2D",) * 4, each_of("DownEncoderBlock2D"), "of the encoder"),
        Field("up_block_types", Texts, ("UpDecoderBlock2D",) * 4, each_of("UpDecoderBlock2D"), "of the decoder"),
        Field("block_out_channels", Integers, (128, 256, 512, 512), _WIDTHS, "channels of each block"),
        Field("layers_per_block", int, 2, _LAYERS, "residual layers of each block"),
        Field("latent_channels", int, 4, count(1, 1024), "channels of the latents"),
        Field("norm_num_groups", int, 32, _WIDTH, "groups of the normalisations"),
        Field("sample_size", int, 512, _WIDTH, "size of the pictures that it was trained on", "pixels"),
        Field(
            "scaling_factor",
            float,
            0.18215,
            at_least(0),
            "latents are multiplied by it; 0: standardise them on the data, after which it is 1",
        ),
        Field("mid_block_add_attention", bool, True, ANY, "attention in the middle block"),
    ),
)


def _clip(path: str, meaning: str, width: int, inner: int, layers: int, heads: int, activation: str) -> Section:
    return Section(
        path,
        meaning,
        (
            Field("vocab_size", int, 49408, count(1, 1 << 24), "tokens that it knows"),
            Field("hidden_size", int, width, _WIDTH, "width"),
            Field("intermediate_size", int, inner, count(1, 1 << 20), "width of the feed-forward layers"),
            Field("num_hidden_layers", int, layers, _LAYERS, "layers"),
            Field("num_attention_heads", int, heads, _WIDTH, "heads of attention"),
            Field(
                "max_position_embeddings", int, 77, count(2, 65_536), "the longest caption, with its two ends", "tokens"
            ),
            Field("hidden_act", str, activation, one_of("quick_gelu", "gelu"), "activation of the feed-forward layers"),
            Field("layer_norm_eps", float, 1e-5, above(0, at_most=1), "added to the variance in normalisations"),
            Field("projection_dim", int, width, _WIDTH, "width of the projection of a caption as a whole"),
        ),
    )


TEXT_ENCODER = _clip("model.text_encoder", "The text encoder: OpenAI's CLIP ViT-L.", 768, 3072, 12, 12, "quick_gelu")
TEXT_ENCODER_2 = _clip(
    "model.text_encoder_2", "The second text encoder, of SDXL alone: OpenCLIP ViT-bigG.", 1280, 5120, 32, 20, "gelu"
)
