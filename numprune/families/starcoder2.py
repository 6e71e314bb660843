from numprune.families.family import Family, Vllm, attention, plain_mlp

STARCODER2 = Family(
    name="starcoder2",
    attention=attention(bias="use_bias", reader_bias="use_bias"),
    mlp=plain_mlp("mlp.c_fc", "mlp.c_proj", bias="use_bias", norms=("post_attention_layernorm",), modules=("mlp",)),
    norm_bias=True,
    vllm=Vllm(native=False, per_layer=True),
)
