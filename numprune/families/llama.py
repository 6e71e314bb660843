from numprune.families.family import Family, StandIn, Vllm, attention, gated_mlp

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
    vllm=Vllm(per_layer=True),
)
