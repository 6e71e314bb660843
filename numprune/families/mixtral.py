from numprune.families.family import Family, attention, experts

MIXTRAL = Family(
    name="mixtral",
    attention=attention(),
    experts=experts(
        count="num_local_experts",
        width="intermediate_size",
        width_attribute="intermediate_dim",
        stored=("w1", "w3", "w2"),
    ),
    renamed={".mlp.": ".block_sparse_moe."},
)
