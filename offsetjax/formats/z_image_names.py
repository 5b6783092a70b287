"""Z-Image's tensors by the names of its original code, which ComfyUI's files have, and by diffusers'."""

from offsetjax.formats.layout import Layout, Rule

_LISTS = ("noise_refiner", "context_refiner", "layers")
_ATTENTION = {
    "qkv.weight": ("to_q.weight", "to_k.weight", "to_v.weight"),
    "out.weight": ("to_out.0.weight",),
    "q_norm.weight": ("norm_q.weight",),
    "k_norm.weight": ("norm_k.weight",),
}
_ALONE = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}

Z_IMAGE = Layout(
    (
        *(
            Rule(f"{original}.{leaf}", (f"{other}.{leaf}",))
            for original, other in _ALONE.items()
            for leaf in ("weight", "bias")
        ),
        *(
            Rule(f"{blocks}.{{}}.attention.{original}", tuple(f"{blocks}.{{}}.attention.{name}" for name in parts))
            for blocks in _LISTS
            for original, parts in _ATTENTION.items()
        ),
    ),
    ignored=("norm_final.weight",),
)
