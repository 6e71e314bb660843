from numprune.families.family import Family, Vllm, Windows, attention, gated_mlp

QWEN3 = Family(
    name="qwen3",
    attention=attention(
        bias="attention_bias",
        reader_bias="attention_bias",
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    ),
    mlp=gated_mlp(),
    per_layer={"max_window_layers": "first"},
    # max_window_layers as in Qwen2.
    windows=Windows(fields={"use_sliding_window": True, "max_window_layers": 0}),
    vllm=Vllm(native_unless=("attention_bias", "use_sliding_window"), per_layer=True),
)
