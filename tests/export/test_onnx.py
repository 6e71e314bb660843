"""The ONNX export: every supported network, exact for padded rows too, in a complete and standard file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx as onnx_format
import pytest
import torch
from onnxruntime import InferenceSession

from numprune.errors import InputError, IntegrityError
from numprune.export import checkpoint, manifest, onnx, onnx_traced, parity
from numprune.plans import PLAN_FILE
from numprune.tasks import CAUSAL
from numprune.tasks.embedding import Embedding
from tests.conftest import recast
from tests.export.networks import NETWORKS, SIZES, error, per_layer

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("opset", [23, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(tiny_checkpoint: Checkpoint, tmp_path: Path, name: str, opset: int) -> None:
    base = tiny_checkpoint(**NETWORKS[name])
    onnx.export(base, tmp_path / "onnx", opset=opset)
    assert error(base, tmp_path / "onnx") < 1e-4


@pytest.mark.parametrize("opset", [23, 20])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_that_differ(tiny_checkpoint: Checkpoint, tmp_path: Path, family: str, opset: int) -> None:
    base = per_layer(tiny_checkpoint(family=family), family, SIZES)
    onnx.export(base, tmp_path / "onnx", opset=opset)
    assert error(base, tmp_path / "onnx") < 1e-4
    inputs = {value.name: value.type.tensor_type.shape.dim for value in graph(tmp_path / "onnx").input}
    assert [inputs[f"past_key_values.{layer}.key"][1].dim_value for layer in (0, 1)] == [1, 3]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_that_skip_a_block(tiny_checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    sizes = {0: {"skip": ["attention"], "intermediate_size": 40}, 1: SIZES[1], 2: {"skip": ["mlp"]}, 3: {}}
    base = per_layer(tiny_checkpoint(family=family, num_hidden_layers=4), family, sizes)
    onnx.export(base, tmp_path / "onnx")
    proof = parity.check(base, tmp_path / "onnx", "onnxruntime", device="cpu")
    assert proof["logit_error_max"] < 1e-4
    assert proof["reference"]["kv_bytes_per_token"] == proof["candidate"]["kv_bytes_per_token"]
    names = {value.name for value in graph(tmp_path / "onnx").input}
    assert "past_key_values.0.key" not in names
    assert {f"past_key_values.{layer}.key" for layer in (1, 2, 3)} <= names


@pytest.mark.slow
def test_an_activation_unknown_to_the_writer_is_traced(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint(hidden_act="tanh", num_hidden_layers=1)
    made = onnx.export(base, tmp_path / "onnx", opset=20)
    assert made.facts["exporter"] == "torch"
    assert error(base, tmp_path / "onnx") < 1e-4


TRACED: dict[str, dict[int, dict[str, Any]]] = {
    "phi3": {0: {"skip": ["attention"], "intermediate_size": 40}, 1: SIZES[1], 2: {"skip": ["mlp"]}},
    "gpt2": {0: {"n_head": 3, "head_dim": 16}, 1: {"skip": ["attention"], "head_dim": 16}},
    "llamagen": SIZES,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TRACED)
def test_traced_layers_that_differ(tiny_checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    base = per_layer(tiny_checkpoint(family=family, num_hidden_layers=len(TRACED[family])), family, TRACED[family])
    onnx.export(base, tmp_path / "onnx")
    proof = parity.check(base, tmp_path / "onnx", "onnxruntime", device="cpu")
    assert proof["logit_error_max"] < 1e-4
    assert proof["reference"]["kv_bytes_per_token"] == proof["candidate"]["kv_bytes_per_token"]
    attending = [layer for layer, sizes in TRACED[family].items() if "attention" not in sizes.get("skip", ())]
    names = [value.name for value in graph(tmp_path / "onnx").input]
    assert names[3:] == [f"past_key_values.{layer}.{name}" for layer in attending for name in ("key", "value")]


def graph(folder: Path) -> onnx_format.GraphProto:
    return onnx_format.load(folder / onnx.MODEL_FILE, load_external_data=False).graph


def dimensions(network: onnx_format.GraphProto) -> dict[str, list[str | int]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*network.input, *network.output]
    }


def test_the_file_is_standard_and_self_describing(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    made = onnx.export(base, tmp_path / "onnx")
    model = onnx_format.load(tmp_path / "onnx" / onnx.MODEL_FILE, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata == {"flavour": "standard-operators", "family": "llama", "checkpoint": manifest.folder_digest(base)}
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    dims = dimensions(model.graph)
    assert dims["input_ids"] == ["batch", "sequence"]
    assert dims["attention_mask"] == ["batch", "total"]
    assert dims["logits"] == ["batch", "kept", 259]
    assert dims["past_key_values.1.value"] == ["batch", 2, "past", 16]
    assert dims["present.1.value"] == ["batch", 2, "total", 16]
    assert str(tmp_path).encode() not in (tmp_path / "onnx" / onnx.MODEL_FILE).read_bytes()

    assert manifest.verify(tmp_path / "onnx") == made
    assert made.parents == {"checkpoint": manifest.folder_digest(base)}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "generation_config.json"} <= set(
        made.files
    )


@pytest.mark.slow
def test_traced_and_written_files_have_the_same_form(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = tiny_checkpoint(tie_word_embeddings=True, num_hidden_layers=1)
    onnx.export(base, tmp_path / "written", opset=20)
    files = []
    for name in ("traced", "again"):
        model, _ = checkpoint.load(base)
        (tmp_path / name).mkdir()
        capfd.readouterr()
        onnx_traced.trace(model, CAUSAL, tmp_path / name / onnx.MODEL_FILE, 20, {"flavour": onnx.FLAVOUR})
        assert capfd.readouterr() == ("", "")
        files.append((tmp_path / name / onnx.MODEL_FILE).read_bytes())
    assert files[0] == files[1]
    model = onnx_format.load(tmp_path / "traced" / onnx.MODEL_FILE, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert {entry.key: entry.value for entry in model.metadata_props} == {"flavour": onnx.FLAVOUR}
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert dimensions(model.graph) == dimensions(graph(tmp_path / "written"))
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("traced", "written")]
    assert sizes[0] == pytest.approx(sizes[1], abs=4 * 259 * 64 / 2)  # the embeddings, stored once


@pytest.mark.slow
def test_an_embedding_is_pooled_in_the_graph_as_the_task_says(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model, task = tiny_model("bert", task="embedding", num_hidden_layers=1), Embedding("last", normalized=True)
    onnx_traced.trace(model, task, tmp_path / onnx.MODEL_FILE, 20, {})
    assert dimensions(graph(tmp_path)) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "token_type_ids": ["batch", "sequence"],
        "last_hidden_state": ["batch", "sequence", 64],
        "sentence_embedding": ["batch", 64],
    }
    tokens = torch.randint(0, 259, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 4:] = mask[1, :6] = 0  # padding on either side
    fed = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}
    session = InferenceSession(tmp_path / onnx.MODEL_FILE)
    found = session.run(["sentence_embedding"], {name: value.numpy() for name, value in fed.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), task.output(model, tokens, mask).detach(), atol=1e-5, rtol=1e-5)


def test_an_untraceable_network_is_reported_in_one_line(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("opt", num_hidden_layers=1)
    model.model.decoder.final_layer_norm.forward = lambda hidden: hidden if hidden.sum() > 0 else -hidden
    with pytest.raises(InputError, match=r"^torch .* cannot export opt to ONNX \(.*\); leave onnx and tensorrt out$"):
        onnx_traced.trace(model, CAUSAL, tmp_path / onnx.MODEL_FILE, 23, {})


def test_tied_embeddings_are_stored_once(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    sizes = [
        onnx.export(tiny_checkpoint(name=name, tie_word_embeddings=tied), tmp_path / f"onnx-{name}")
        .files["model.onnx.data"]
        .size
        for name, tied in (("tied", True), ("untied", False))
    ]
    assert sizes[1] - sizes[0] >= 4 * 259 * 64


def test_half_precision_checkpoints_become_float32(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    half = recast(tiny_checkpoint(), torch.bfloat16)
    onnx.export(half, tmp_path / "onnx")
    assert error(half, tmp_path / "onnx") < 1e-4


def test_the_plan_is_exported_too(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    (base / PLAN_FILE).write_text('{"kept": 1}')
    onnx.export(base, tmp_path / "onnx")
    assert json.loads((tmp_path / "onnx" / PLAN_FILE).read_text()) == {"kept": 1}


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ({}, {"opset": 24}, "opset=24"),
        ({"rope_parameters": DYNAMIC}, {}, "rope_type='dynamic'"),
        ({"family": "granite", "rope_parameters": DYNAMIC}, {}, "rope_type='dynamic'"),
        ({"family": "gemma3_text", "rope_parameters": {"full_attention": DYNAMIC}}, {}, "rope_type='dynamic'"),
    ],
)
def test_unsupported_models_are_refused_and_leave_nothing_behind(
    tiny_checkpoint: Checkpoint, tmp_path: Path, network: dict, options: dict, message: str
) -> None:
    base = tiny_checkpoint(**network)
    with pytest.raises(InputError, match=message):
        onnx.export(base, tmp_path / "onnx", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_incomplete_checkpoint_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(IntegrityError, match=r"mlp\.down_proj"):
        onnx.export(base, tmp_path / "onnx")


def test_an_existing_folder_is_left_alone(tiny_checkpoint: Checkpoint) -> None:
    base = tiny_checkpoint()
    before = manifest.folder_digest(base)
    with pytest.raises(InputError, match="already exists"):
        onnx.export(base, base)
    assert manifest.folder_digest(base) == before
