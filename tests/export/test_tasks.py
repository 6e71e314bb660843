"""A checkpoint's task is read from its files, or refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForPreTraining

from numprune.anatomy import context_of
from numprune.documents import Document
from numprune.errors import InputError
from numprune.export import checkpoint
from numprune.export.tasks import load_task
from numprune.quality import evaluate
from numprune.tasks import CAUSAL
from numprune.tasks.classification import Classification
from numprune.tasks.embedding import Embedding
from numprune.tasks.masked import Masked
from tests.conftest import TINY, build_tiny, encoder_tokenizer, write_checkpoint

KNOWN = ("Transformer", "Pooling", "Normalize")


def sentences(folder, pooling=None, modules=KNOWN):
    """Give a checkpoint the files of sentence-transformers."""
    entries = [
        {"idx": index, "path": f"{index}_{kind}" if index else "", "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    return write_checkpoint(build_tiny("bert", task="embedding"), tmp_path_factory.mktemp("embedding") / "base")


@pytest.fixture
def copied(embedding, tmp_path):
    return shutil.copytree(embedding, tmp_path / "base")


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("llama", "causal-lm", CAUSAL),
        ("bert", "masked-lm", Masked(258, (256, 257, 258))),
        ("electra", "classification", Classification({"LABEL_0": 0, "LABEL_1": 1})),
        ("distilbert", "embedding", Embedding()),
    ],
)
def test_the_class_determines_the_task(family, name, expected, tmp_path):
    assert load_task(write_checkpoint(build_tiny(family, task=name), tmp_path / "base")) == expected


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_follows_sentence_transformers(pooling, expected, copied):
    assert load_task(sentences(copied, pooling)) == Embedding(expected, normalized=True, declared=True)


@pytest.mark.parametrize(
    ("pooling", "modules", "message"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, KNOWN, "it must be one of mean, cls"),
        ({"pooling_mode_weightedmean_tokens": True}, KNOWN, "pooling_mode_weightedmean_tokens"),
        ({"pooling_mode": "weightedmean"}, KNOWN, "pooling weightedmean"),
        ({"pooling_mode": "mean"}, (*KNOWN, "Dense"), "module 'Dense' is not supported"),
        (None, KNOWN, "not a regular file"),
    ],
)
def test_unsupported_pooling_is_refused(pooling, modules, message, copied):
    with pytest.raises(InputError, match=message):
        load_task(sentences(copied, pooling, modules))


def test_modules_outside_the_checkpoint_are_refused(copied):
    sentences(copied, {})
    text = (copied / "modules.json").read_text()
    (copied / "modules.json").write_text(text.replace("1_Pooling", "../1_Pooling"))
    with pytest.raises(InputError, match="is not the name of a folder"):
        load_task(copied)


def test_unsupported_heads_are_refused_by_name(tmp_path):
    config = AutoConfig.for_model("bert", **{**TINY, "pad_token_id": 0})
    AutoModelForPreTraining.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'BertForPreTraining'.*bert is supported for masked-lm \(…ForMaskedLM\)"):
        checkpoint.read_config(tmp_path)
    config.is_decoder = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is_decoder=True: bert is supported only with False"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("fields", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_multi_label_and_regression_heads_are_refused(fields, tmp_path):
    model = build_tiny("bert", task="classification", **fields)
    with pytest.raises(InputError, match="only classifiers that choose one of several classes"):
        load_task(write_checkpoint(model, tmp_path / "base"))


def test_positions_stored_by_older_versions_are_not_weights(copied):
    weights = load_file(copied / "model.safetensors")
    save_file(weights | {"embeddings.position_ids": torch.arange(256)[None]}, copied / "model.safetensors")
    assert "embeddings.position_ids" not in checkpoint.audit(copied)
    assert checkpoint.weight_bytes(copied) == sum(value.nbytes for value in weights.values())


def test_an_original_bert_checkpoint_is_read(tmp_path):
    """With the heads of its pretraining, TensorFlow's names of norms, and the positions' numbers."""
    model = build_tiny("bert")
    folder = write_checkpoint(model, tmp_path / "base")
    stored = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    stored |= {"cls.seq_relationship.weight": torch.ones(2, 64), "cls.seq_relationship.bias": torch.ones(2)}
    stored |= {"bert.pooler.dense.weight": torch.ones(64, 64), "bert.pooler.dense.bias": torch.ones(64)}
    save_file(stored | {"bert.embeddings.position_ids": torch.arange(256)[None]}, folder / "model.safetensors")
    loaded, _ = checkpoint.load(folder)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    checkpoint.save(loaded, folder, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(checkpoint.audit(tmp_path / "out"))


def test_roberta_reserves_its_first_positions():
    """Positions count from behind that of padding, so that so many fewer tokens fit."""
    model = build_tiny("roberta")
    context = context_of(model.config)
    assert context == TINY["max_position_embeddings"] - 2
    task = Masked(258)
    fitting, longer = (
        task.heldout_rows([Document("a", "a" * length)], encoder_tokenizer(), length + 2)
        for length in (context - 2, context - 1)
    )
    assert evaluate(model, fitting, task).count == round(0.15 * context)
    with pytest.raises(InputError, match=f"sequence length {context + 1} exceeds the model's context of {context}"):
        evaluate(model, longer, task)
