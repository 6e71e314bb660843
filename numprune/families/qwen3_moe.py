from numprune.families.family import Family, attention, experts, gated_mlp

QWEN3_MOE = Family(
    name="qwen3_moe",
    attention=attention(
        bias="attention_bias", reader_bias="attention_bias", head_norms=("self_attn.q_norm", "self_attn.k_norm")
    ),
    mlp=gated_mlp(),
    experts=experts(
        count="num_local_experts",
        width="moe_intermediate_size",
        width_attribute="intermediate_dim",
        normalized="norm_topk_prob",
        step="decoder_sparse_step",
        dense="mlp_only_layers",
    ),
    per_layer={"mlp_only_layers": "layers", "decoder_sparse_step": "step"},
)
