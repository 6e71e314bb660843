from numprune.families.bert import BERT_LAYER, bert_embeddings
from numprune.families.family import Family, Vllm, linear, norm

_HIDDEN, _EMBEDDING = "hidden_size", "embedding_size"

ELECTRA = Family(
    name="electra",
    prefix="electra",
    around=bert_embeddings(_EMBEDDING),
    projection="embeddings_project",
    heads_of={
        "masked-lm": {
            "generator_lm_head.bias": ("vocab_size",),
            **linear("generator_predictions.dense", _EMBEDDING, _HIDDEN),
            **norm("generator_predictions.LayerNorm", _EMBEDDING),
        },
        "classification": {
            **linear("classifier.dense", _HIDDEN, _HIDDEN),
            **linear("classifier.out_proj", "num_labels", _HIDDEN),
        },
    },
    untied={"generator_lm_head.weight": ("vocab_size", _EMBEDDING)},
    vllm=Vllm(native=False),
    **BERT_LAYER,
)
