from numprune.families.family import Family, Vllm, Windows, attention, gated_mlp

# A norm before each block and another after it.
ATTENTION = attention(
    bias="attention_bias",
    reader_bias="attention_bias",
    norms=("input_layernorm", "post_attention_layernorm"),
    norm_behind=True,
)
MLP = gated_mlp(norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"), norm_behind=True)

GEMMA2 = Family(
    name="gemma2",
    attention=ATTENTION,
    mlp=MLP,
    scales_embeddings=True,
    stock_heads="divisors",
    requires={"use_bidirectional_attention": (None, False)},
    attention_implementation="eager",  # SDPA ignores the soft-capping of attention scores
    windows=Windows(),
    vllm=Vllm(per_layer=True),
)
