from numprune.families.bert import BERT_LAYER, bert_embeddings
from numprune.families.family import Family, linear, norm

_HIDDEN = "hidden_size"

ROBERTA = Family(
    name="roberta",
    prefix="roberta",
    around=bert_embeddings(),
    heads_of={
        "masked-lm": {
            "lm_head.bias": ("vocab_size",),
            **linear("lm_head.dense", _HIDDEN, _HIDDEN),
            **norm("lm_head.layer_norm", _HIDDEN),
        },
        "classification": {
            **linear("classifier.dense", _HIDDEN, _HIDDEN),
            **linear("classifier.out_proj", "num_labels", _HIDDEN),
        },
        "embedding": linear("pooler.dense", _HIDDEN, _HIDDEN),
    },
    untied=linear("lm_head.decoder", "vocab_size", _HIDDEN),
    reserved_positions=True,
    **BERT_LAYER,
)
