from numprune.families.family import Family, Vllm, attention, experts

GPT_OSS = Family(
    name="gpt_oss",
    attention=attention(bias="attention_bias", reader_bias="attention_bias", per_head=("self_attn.sinks",)),
    experts=experts(
        router="mlp.router",
        count="num_local_experts",
        width="intermediate_size",
        width_attribute="intermediate_size",
        bias=True,
        transposed=True,
        stored=None,
    ),
    vllm=Vllm(alternating=True),
    attention_implementation="eager",  # transformers refuses SDPA, which has no sinks
)
