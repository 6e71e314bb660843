from numprune.families.family import Family, Matrix, Vllm, Wiring, linear, norm, plain_mlp

_HIDDEN = "dim"

DISTILBERT = Family(
    name="distilbert",
    attention=Wiring(
        writers=(
            Matrix("attention.q_lin", ("query",), bias=True),
            Matrix("attention.k_lin", ("key",), bias=True),
            Matrix("attention.v_lin", ("value",), bias=True),
        ),
        reader=Matrix("attention.out_lin", ("query",), bias=True),
        modules=("attention",),
        norms=("sa_layer_norm",),
        post_norm=True,
        sizes={"attention.n_heads": "heads"},
    ),
    mlp=plain_mlp("ffn.lin1", "ffn.lin2", bias=True, norms=("output_layer_norm",), modules=("ffn",), post_norm=True),
    tasks=("masked-lm", "classification", "embedding"),
    prefix="distilbert",
    layers="transformer.layer",
    embedding="embeddings.word_embeddings",
    final_norm=None,
    around={
        "embeddings.word_embeddings.weight": ("vocab_size", _HIDDEN),
        "embeddings.position_embeddings.weight": ("max_position_embeddings", _HIDDEN),
        **norm("embeddings.LayerNorm", _HIDDEN),
    },
    heads_of={
        "masked-lm": {
            "vocab_projector.bias": ("vocab_size",),
            **linear("vocab_transform", _HIDDEN, _HIDDEN),
            **norm("vocab_layer_norm", _HIDDEN),
        },
        "classification": {
            **linear("pre_classifier", _HIDDEN, _HIDDEN),
            **linear("classifier", "num_labels", _HIDDEN),
        },
    },
    untied={"vocab_projector.weight": ("vocab_size", _HIDDEN)},
    indexed=False,
    heads="n_heads",
    kv_heads=None,
    width="hidden_dim",
    norm_bias=True,
    stock_heads="all",
    vllm=Vllm(native=False),
)
