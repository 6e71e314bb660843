from numprune.families.family import Family, StandIn, Vllm, Windows, attention, gated_mlp

LLAMA = Family(
    name="llama",
    attention=attention(bias="attention_bias", reader_bias="attention_bias"),
    mlp=gated_mlp(bias="mlp_bias"),
    stock_heads="divisors",
    # Mistral is the same network, and does not check that heads divide the hidden size.
    stand_in=StandIn(
        "mistral",
        unless=("attention_bias", "mlp_bias"),
        dropped=("pretraining_tp",),
        fields={"sliding_window": None},
    ),
    # SmolLM3 is the same network, if all layers have rotary positions.
    windows=Windows(
        "smollm3",
        fields={"use_sliding_window": True},
        entries={"no_rope_layers": 1},
        dropped=("pretraining_tp",),
    ),
    vllm=Vllm(per_layer=True),
)
