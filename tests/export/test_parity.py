"""Parity passes correct exports, and every kind of runtime error is found and located."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx as onnx_format
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from numprune.errors import InputError, IntegrityError, ParityError
from numprune.export import manifest, onnx, parity, parity_reference, tolerance
from numprune.export.parity_reference import Row
from numprune.export.runtimes.torch_eager import TorchRuntime
from numprune.flows.steps.quantize import quantize_checkpoint
from numprune.quantization import Scheme

Checkpoint = Callable[..., Path]
Change = Callable[[onnx_format.ModelProto], None]


def altered(export: Path, change: Change) -> Path:
    """A copy of an ONNX export with another graph, and a manifest that is right for it."""
    target = export.with_name(export.name + "-altered")
    with manifest.creating(target, kind="onnx", facts=manifest.read(export).facts) as folder:
        model = onnx_format.load(export / onnx.MODEL_FILE)
        change(model)
        onnx_format.save(model, folder / onnx.MODEL_FILE)
    return target


def test_parity_of_onnx_runtime(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    onnx.export(tiny_checkpoint(), tmp_path / "onnx")
    same = altered(tmp_path / "onnx", lambda model: None)  # `altered`, used below, changes nothing of its own
    result = parity.check(tmp_path / "base", same, "onnxruntime", threads=1)
    assert json.loads(json.dumps(result)) == result
    assert 0 < result["logit_error_mean"] < result["logit_error_max"] < 1e-4
    assert 0 < result["logprob_error_mean"] < result["logprob_error_max"] < 1e-4
    assert result["greedy_match"] == 1.0
    assert result["decode_steps"] == 32
    assert result["batches"] == [
        {"batch_size": 1, "padded": False},
        {"batch_size": 3, "padded": False},
        {"batch_size": 3, "padded": True},
    ]
    prompts = 24 + 3 * 24 + (24 + 13 + 1)
    assert result["positions"] == prompts + (1 + 3 + 3) * 32
    assert abs(result["worst"]["reference"] - result["worst"]["candidate"]) == pytest.approx(result["logit_error_max"])


@pytest.mark.slow
def test_torch_matches_itself_exactly_and_fails_with_other_weights(tiny_checkpoint: Checkpoint) -> None:
    base, other = tiny_checkpoint(), tiny_checkpoint(name="other", seed=1)
    result = parity.check(base, base, "torch")
    assert result["logit_error_max"] < 1e-4
    with pytest.raises(ParityError, match=r"worst at batch size \d"):
        parity.check(base, other, "torch")


@pytest.mark.slow
def test_an_export_of_other_weights_fails(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    onnx.export(tiny_checkpoint(name="other", seed=1), tmp_path / "onnx")
    with pytest.raises(ParityError, match="in onnxruntime does not compute what"):
        parity.check(tiny_checkpoint(), tmp_path / "onnx", "onnxruntime", threads=1)


def weight(name: str, change: Callable[[torch.Tensor], object]) -> Change:
    def apply(model: onnx_format.ModelProto) -> None:
        found = next(value for value in model.graph.initializer if value.name == name)
        tensor = torch.from_numpy(numpy_helper.to_array(found).copy())
        change(tensor)
        found.CopyFrom(numpy_helper.from_array(tensor.numpy(), name))

    return apply


def swap_two_heads(tensor: torch.Tensor) -> None:
    """Of layer 1's queries, in (hidden, heads * 16)."""
    tensor[:, :32] = torch.cat([tensor[:, 16:32], tensor[:, :16]], dim=1)


def one_percent_more_theta(frequencies: torch.Tensor) -> None:
    """theta^(-i / n) for i from 0 to n - 1."""
    count = frequencies.numel()
    frequencies.mul_((1.01 ** (-torch.arange(count) / count)).reshape(frequencies.shape))


def another_epsilon(model: onnx_format.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "RMSNormalization" and attribute.name == "epsilon":
                attribute.f *= 100


def ignore_padding(model: onnx_format.ModelProto) -> None:
    """Let the attention mask be made from a padding mask of all ones."""
    nodes = model.graph.node
    one = numpy_helper.from_array(torch.ones(1, dtype=torch.int64).numpy())
    made = [
        helper.make_node("Shape", ["attention_mask"], ["altered.shape"]),
        helper.make_node("ConstantOfShape", ["altered.shape"], ["altered.ones"], value=one),
    ]
    (reader,) = (node for node in nodes if node.op_type == "Cast" and node.input[0] == "attention_mask")
    reader.input[0] = "altered.ones"
    kept = [*made, *nodes]
    del nodes[:]
    nodes.extend(kept)


def shuffle_the_past(model: onnx_format.ModelProto) -> None:
    """Put layer 1's new values before its old ones. Prefill, which has no old ones, is still right."""
    (join,) = (node for node in model.graph.node if "past_key_values.1.value" in node.input)
    join.input[:] = list(reversed(join.input))


ALTERATIONS = {
    "a weight that is a little off": (
        weight("model.layers.1.mlp.down_proj.weight.T", lambda tensor: tensor[7, 9].add_(0.05)),
        r"log-probabilities by",
    ),
    "a norm that is a little off": (weight("model.norm.weight", lambda tensor: tensor[3].mul_(1.02)), "worst at"),
    "NaN": (
        weight("model.embed_tokens.weight", lambda tensor: tensor.fill_(float("nan"))),
        "is not finite: batch size 1",
    ),
    "infinity": (weight("lm_head.weight.T", lambda tensor: tensor[0, 5].fill_(float("inf"))), r"token 5: .*(inf|nan)"),
    "padding that is attended to": (ignore_padding, "worst at batch size 3, left-padded"),
    "a permuted head": (weight("model.layers.1.self_attn.q_proj.weight.T", swap_two_heads), "worst at"),
    "a rotary theta that is 1 % off": (weight("rotary.frequencies", one_percent_more_theta), "worst at"),
    "another epsilon": (another_epsilon, "worst at"),
    "a cache in the wrong order": (shuffle_the_past, r"decode step \d+"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALTERATIONS)
def test_a_wrong_graph_fails_and_is_located(tiny_checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    change, message = ALTERATIONS[name]
    base = tiny_checkpoint()
    onnx.export(base, tmp_path / "onnx")
    with pytest.raises(ParityError, match=message):
        parity.check(base, altered(tmp_path / "onnx", change), "onnxruntime", threads=1)


def test_a_missing_bias_fails(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint("qwen2")
    onnx.export(base, tmp_path / "onnx")
    without = altered(tmp_path / "onnx", weight("model.layers.1.self_attn.v_proj.bias", lambda tensor: tensor.zero_()))
    with pytest.raises(ParityError, match="does not compute"):
        parity.check(base, without, "onnxruntime", threads=1)


def rescaled(checkpoint: Path, factor: float) -> Path:
    """The same network with logits `factor` times as large, and float32's rounding with them."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
    return checkpoint


@pytest.mark.slow
def test_rounding_beyond_the_floor_is_distinguished_from_a_wrong_export(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = rescaled(tiny_checkpoint(), 3000)
    onnx.export(base, tmp_path / "onnx")
    result = parity.check(base, tmp_path / "onnx", "onnxruntime", threads=1)
    assert result["logit_error_max"] > tolerance.FLOOR
    decided = [prompt for prompt in result["prompts"] if prompt["yardstick"] == "float32 error"]
    assert decided
    for prompt in decided:
        assert prompt["tolerance"] == tolerance.FACTOR * prompt["float32_error"] > tolerance.FLOOR
        assert prompt["logit_error_max"] <= prompt["tolerance"]
    largest = max(result["prompts"], key=lambda prompt: max(prompt["logit_error_max"], prompt["logprob_error_max"]))
    assert result["tolerance"] == largest["tolerance"]

    off = altered(tmp_path / "onnx", weight("rotary.frequencies", one_percent_more_theta))
    with pytest.raises(ParityError, match=r"on (prose|code|random tokens), prompt length \d+, .*PyTorch's own float32"):
        parity.check(base, off, "onnxruntime", threads=1)


def test_small_rounding_errors_need_no_float64_reference(tiny_checkpoint: Checkpoint) -> None:
    base = tiny_checkpoint()
    result = parity.check(base, base, "torch", batch_sizes=(3,))
    assert [(prompt["prompt"], prompt["tokens"]) for prompt in result["prompts"]] == [
        ("prose", 24),
        ("random tokens", 24),
        ("code", 24),
        ("random tokens", 13),
        ("code", 1),
    ]
    assert {prompt["yardstick"] for prompt in result["prompts"]} == {"floor"}
    assert {prompt["float32_error"] for prompt in result["prompts"]} == {None}


def test_float32_far_from_float64_proves_nothing(tiny_checkpoint: Checkpoint) -> None:
    """Rounding as large as the logits: what comes of the checkpoint depends on who runs it."""
    base = tiny_checkpoint()
    logits = torch.randn(6, 259, generator=torch.Generator().manual_seed(0))
    rows = [Row("prose", torch.arange(4), torch.arange(2), logits)]
    with pytest.raises(
        ParityError, match=r"on prose its logits spread by only .* own float32 error there is .*; prune less"
    ):
        parity._allowed(lambda: TorchRuntime(base), base, rows, [parity._Difference(logit_max=1.0)], tolerance.FLOOR)


@pytest.mark.parametrize(
    ("scheme", "remedy"), [(None, "; use float32$"), (Scheme("fp8"), "; prune less, or leave it unquantized and use")]
)
def test_half_precision_far_from_float32_proves_nothing(
    tiny_checkpoint: Checkpoint, tmp_path: Path, scheme: Scheme | None, remedy: str
) -> None:
    base = tiny_checkpoint()
    if scheme is not None:
        quantize_checkpoint(base, scheme, tmp_path / "quantized", torch.device("cpu"))
        base = tmp_path / "quantized"
    logits = torch.randn(6, 259, generator=torch.Generator().manual_seed(0))
    rows = [Row("prose", torch.arange(4), torch.arange(2), logits)]
    with pytest.raises(ParityError, match=rf"on prose its logits spread by .* reliably in bfloat16{remedy}"):
        parity._allowed_noise(TorchRuntime(base, dtype="bfloat16"), base, rows, "bfloat16")


def test_a_different_vocabulary_fails(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    onnx.export(tiny_checkpoint(name="wide", vocab_size=300), tmp_path / "onnx")
    with pytest.raises(ParityError, match=r"shape \[1, 24, 300\], not \[1, 24, 259\]"):
        parity.check(tiny_checkpoint(), tmp_path / "onnx", "onnxruntime", threads=1)


def test_logits_within_the_tolerance_prove_nothing(tiny_checkpoint: Checkpoint) -> None:
    base = tiny_checkpoint()
    with pytest.raises(ParityError, match=r"on prose .*would prove nothing"):
        parity.check(base, base, "torch", floor=10.0)


def test_a_folder_altered_after_export_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    onnx.export(base, tmp_path / "onnx")
    data = tmp_path / "onnx" / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[5000] ^= 1
    data.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data"):
        parity.check(base, tmp_path / "onnx", "onnxruntime", threads=1)


def test_custom_prompts(tiny_checkpoint: Checkpoint) -> None:
    base = tiny_checkpoint()
    result = parity.check(base, base, "torch", prompts=torch.arange(20).reshape(2, 10), batch_sizes=(2,))
    assert (result["prompt_length"], result["positions"]) == (10, 20 + 11 + 4 * 32)


@pytest.mark.slow
def test_a_prompt_reaches_beyond_the_attention_window(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A window of 64 tokens exceeds the usual prompts with their continuation."""
    base = tiny_checkpoint("mistral", sliding_window=64)
    wider = shutil.copytree(base, tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "sliding_window": 66}))
    for source in (base, wider):
        onnx.export(source, source.with_name(f"{source.name}-onnx"))
    proof = parity.check(base, tmp_path / "base-onnx", "onnxruntime", threads=1)
    assert proof["logit_error_max"] < 1e-4
    assert (proof["window"], proof["beyond_window"]) == (64, True)
    assert (proof["prompts"][-1]["tokens"], proof["batches"][-1]) == (72, {"batch_size": 1, "padded": False})
    usual = parity.check(base, base, "torch", prompts=torch.randint(0, 259, (3, 24)))
    assert usual["beyond_window"] is False
    assert proof["positions"] == usual["positions"] + 1 + 32
    for candidate, runtime in (("wider-onnx", "onnxruntime"), ("wider", "torch")):
        with pytest.raises(ParityError, match="on random tokens beyond the window, prompt length 72, logits differ"):
            parity.check(base, tmp_path / candidate, runtime, threads=1)


def test_a_window_that_is_too_long_for_a_prompt_is_reported(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_checkpoint("mistral", sliding_window=64)
    monkeypatch.setattr(parity_reference, "_MOST_FLOPS", 1)
    proof = parity.check(base, base, "torch", threads=1)
    assert (proof["window"], proof["beyond_window"], len(proof["batches"])) == (64, False, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_steps": 31}, "at least 32"),
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (0, 2)}, "batch_sizes"),
        ({"prompts": torch.zeros(2, 8, dtype=torch.int64)}, "at least 3 rows"),
        ({"prompt_length": 225}, "max_position_embeddings=256"),
    ],
)
def test_too_weak_checks_are_refused(tiny_checkpoint: Checkpoint, options: dict, message: str) -> None:
    base = tiny_checkpoint()
    with pytest.raises(InputError, match=message):
        parity.check(base, base, "torch", **options)
