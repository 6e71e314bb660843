from numprune.families.family import Family, Vllm, attention, experts, gated_mlp

QWEN2_MOE = Family(
    name="qwen2_moe",
    attention=attention(bias="qkv_bias"),
    mlp=gated_mlp(),
    experts=experts(
        count="num_experts",
        width="moe_intermediate_size",
        width_attribute="intermediate_dim",
        normalized="norm_topk_prob",
        step="decoder_sparse_step",
        dense="mlp_only_layers",
    ),
    shared=gated_mlp(module="mlp.shared_expert", norms=(), gate="mlp.shared_expert_gate", norm_behind=True),
    vllm=Vllm(takes_head_dim=False),
    per_layer={"mlp_only_layers": "layers", "decoder_sparse_step": "step"},
)
