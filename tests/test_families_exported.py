"""Every family exported: to ONNX as the checkpoint computes, and for vLLM or refused."""

import pytest
from numprune_vllm import sizes, weights

from numprune.anatomy import PER_LAYER_PREFIX, read_anatomy
from numprune.errors import InputError
from numprune.export import checkpoint, onnx, onnx_decoder, parity, parity_encoder, vllm
from numprune.families import FAMILIES
from numprune.options import PruneOptions
from numprune.pruning import prune
from tests.conftest import build_tiny, write_checkpoint
from tests.test_families import ALIGNED, ROWS, of_decoder

of_served = pytest.mark.parametrize(
    "family", [name for name, family in FAMILIES.items() if family.vllm.runs and "causal-lm" in family.tasks]
)
ENCODERS = [name for name, family in FAMILIES.items() if "causal-lm" not in family.tasks]


@of_decoder
@pytest.mark.slow
def test_every_family_is_exported_to_onnx(family, tmp_path):
    model = build_tiny(family)
    alike = all(len(set(getattr(model.config, name, None) or ())) < 2 for name in ("layer_types", "no_rope_layers"))
    if alike and len(read_anatomy(model.config).kinds) == 2:
        model = build_tiny(family, num_hidden_layers=1)  # all layers are alike, and a trace takes seconds a layer
    base = write_checkpoint(model, tmp_path / "base")
    made = onnx.export(base, tmp_path / "onnx")
    assert made.facts["exporter"] == ("numprune" if onnx_decoder.writes(model.config) else "torch")
    proof = parity.check(base, tmp_path / "onnx", "onnxruntime")
    assert proof["logit_error_max"] < 1e-4
    assert proof["candidate"]["kv_bytes_per_token"] == proof["reference"]["kv_bytes_per_token"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task"),
    [(name, FAMILIES[name].tasks[index % len(FAMILIES[name].tasks)]) for index, name in enumerate(ENCODERS)],
)
def test_every_encoder_is_exported_to_onnx(family, task, tmp_path):
    model = build_tiny(family, task=task, **({} if FAMILIES[family].stages else {"num_hidden_layers": 1}))
    base = write_checkpoint(model, tmp_path / "base")
    onnx.export(base, tmp_path / "onnx")
    proof = parity_encoder.check(base, tmp_path / "onnx", "onnxruntime", device="cpu")
    assert proof["output_error_max"] < 1e-4


@of_served
def test_every_family_is_served_or_refused_by_name_before_any_work(family, tmp_path):
    base, pruned = write_checkpoint(build_tiny(family), tmp_path / "base"), tmp_path / "pruned"
    assert not vllm.preflight(checkpoint.read_config(base))["plugin"]
    options = PruneOptions(0.5, allocation="error", target=ALIGNED)  # so much that no family's layers stay alike
    checkpoint.save(prune(build_tiny(family), ROWS, options).model, base, pruned)
    if FAMILIES[family].vllm.per_layer:
        assert vllm.preflight(checkpoint.read_config(pruned))["plugin"]
    else:
        with pytest.raises(InputError, match=f"vLLM does not run {family} with layers of different sizes"):
            vllm.export(pruned, tmp_path / "vllm")


@of_served
def test_exported_tensors_match_the_vllm_loader(family, tmp_path):
    models = {"stock": build_tiny(family)}
    if FAMILIES[family].vllm.per_layer:
        layers = {1: {FAMILIES[family].width: 32}}
        models["per layer"] = build_tiny(PER_LAYER_PREFIX + family, per_layer_config=layers)
    for name, model in models.items():
        out = tmp_path / name / "vllm"
        vllm.export(write_checkpoint(model, tmp_path / name / "base"), out)
        weights.audit(out, sizes.expected_tensors(checkpoint.read_config(out)))
