"""BERT, and the parts that RoBERTa and ELECTRA share with it."""

from typing import Any

from numprune.families.family import Family, Matrix, Shape, Wiring, linear, norm, plain_mlp

_HIDDEN = "hidden_size"


def bert_embeddings(width: str = _HIDDEN) -> dict[str, Shape]:
    """Return the tensors of the embeddings, whose size is the configuration's field `width`."""
    return {
        "embeddings.word_embeddings.weight": ("vocab_size", width),
        "embeddings.position_embeddings.weight": ("max_position_embeddings", width),
        "embeddings.token_type_embeddings.weight": ("type_vocab_size", width),
        **norm("embeddings.LayerNorm", width),
    }


BERT_LAYER: dict[str, Any] = {
    "attention": Wiring(
        writers=tuple(Matrix(f"attention.self.{part}", (part,), bias=True) for part in ("query", "key", "value")),
        reader=Matrix("attention.output.dense", ("query",), bias=True),
        modules=("attention.self", "attention.output.dense"),
        norms=("attention.output.LayerNorm",),
        post_norm=True,
        sizes={"attention.self.num_attention_heads": "heads", "attention.self.all_head_size": "channels"},
    ),
    "mlp": plain_mlp(
        "intermediate.dense",
        "output.dense",
        bias=True,
        norms=("output.LayerNorm",),
        modules=("intermediate", "output.dense"),
        post_norm=True,
    ),
    "tasks": ("masked-lm", "classification", "embedding"),
    "layers": "encoder.layer",
    "embedding": "embeddings.word_embeddings",
    "final_norm": None,
    "kv_heads": None,
    "norm_bias": True,
    "stock_heads": "all",
    "requires": {
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "position_embedding_type": (None, "absolute"),
    },
    "computed": (
        "embeddings.position_ids",
        # Pretraining heads that a checkpoint for another task may still contain.
        *("cls.seq_relationship.weight", "cls.seq_relationship.bias", "pooler.dense.weight", "pooler.dense.bias"),
    ),
}

BERT = Family(
    name="bert",
    prefix="bert",
    around=bert_embeddings(),
    heads_of={
        "masked-lm": {
            "cls.predictions.bias": ("vocab_size",),
            **linear("cls.predictions.transform.dense", _HIDDEN, _HIDDEN),
            **norm("cls.predictions.transform.LayerNorm", _HIDDEN),
        },
        "classification": {
            **linear("bert.pooler.dense", _HIDDEN, _HIDDEN),
            **linear("classifier", "num_labels", _HIDDEN),
        },
        "embedding": linear("pooler.dense", _HIDDEN, _HIDDEN),
    },
    untied=linear("cls.predictions.decoder", "vocab_size", _HIDDEN),
    **BERT_LAYER,
)
