"""The table of a model family, so that its permutations can be folded."""

from __future__ import annotations

from permllm.models.families import Family, GroupTable

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

# Paths of a group are relative to a decoder layer; others to the model.
FAMILY = Family(
    layers="model.layers",
    groups=(
        GroupTable("self_attn.qkv_proj", _ATTENTION, reader="self_attn"),
        GroupTable(
            "self_attn.o_proj",
            ("self_attn.o_proj",),
            producers=("self_attn.v_proj",),
            by_head=True,
        ),
        GroupTable("mlp.c_fc", ("mlp.c_fc",)),
        GroupTable("mlp.c_proj", ("mlp.c_proj",), producers=("mlp.c_fc",)),
    ),
    after=("model.norm",),
    norms=("input_layernorm", "post_attention_layernorm"),
    writers=("self_attn.o_proj", "mlp.c_proj"),
    embeddings=("model.embed_tokens",),
)
