"""FLUX.2's tensors by the names of Black Forest Labs' code, and by diffusers'."""

from offsetjax.formats.layout import Layout, Rule

_DOUBLE = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "img_attn.proj.weight": "attn.to_out.0.weight",
    "img_mlp.0.weight": "ff.linear_in.weight",
    "img_mlp.2.weight": "ff.linear_out.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "txt_attn.proj.weight": "attn.to_add_out.weight",
    "txt_mlp.0.weight": "ff_context.linear_in.weight",
    "txt_mlp.2.weight": "ff_context.linear_out.weight",
}
_SINGLE = {
    "linear1.weight": "attn.to_qkv_mlp_proj.weight",
    "linear2.weight": "attn.to_out.weight",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
_ALONE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_FUSED = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}

FLUX2 = Layout(
    (
        *(Rule(f"{original}.weight", (f"{other}.weight",)) for original, other in _ALONE.items()),
        Rule("final_layer.adaLN_modulation.1.weight", ("norm_out.linear.weight",), is_swapped=True),
        *(
            Rule(
                f"double_blocks.{{}}.{original}.weight",
                tuple(f"transformer_blocks.{{}}.attn.{name}.weight" for name in parts),
            )
            for original, parts in _FUSED.items()
        ),
        *(
            Rule(f"double_blocks.{{}}.{original}", (f"transformer_blocks.{{}}.{other}",))
            for original, other in _DOUBLE.items()
        ),
        *(
            Rule(f"single_blocks.{{}}.{original}", (f"single_transformer_blocks.{{}}.{other}",))
            for original, other in _SINGLE.items()
        ),
    )
)
