"""The model card of a pruned checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from numprune.errors import IntegrityError
from numprune.export import card, card_changes, vllm
from numprune.flows.steps.prune import prune_checkpoint
from numprune.options import PruneOptions
from numprune.quantization import Scheme, compressed_tensors

Checkpoint = Callable[..., Path]


def pruned(base: Path, out: Path, ratio: float = 0.3, **options: object) -> Path:
    rows = torch.arange(64).view(2, 32) % 30
    chosen = PruneOptions(ratio, compensation="none", **options)  # type: ignore[arg-type]
    prune_checkpoint(base, rows, chosen, out, torch.device("cpu"))
    return out


def test_only_the_licence_is_taken_from_the_base_model_card(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--tiny-llama" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    base = tiny_checkpoint(vocab_size=259).rename(snapshot)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [fast]\n"
        "model-index: [{name: dense}]\n---\n\nPerplexity: 3.\n"
    )
    text = (pruned(base, tmp_path / "out") / "README.md").read_text()
    found = ModelCard(text).data.to_dict()
    assert found == {
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "base_model": "owner/tiny-llama",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["numprune", "structured-pruning"],
    }
    assert "Perplexity: 3" not in text
    assert "[owner/tiny-llama](https://huggingface.co/owner/tiny-llama)" in text
    assert "criterion obs, allocation uniform, compensation none" in text
    assert "(30.0% asked for)" in text
    assert "Not measured yet" in text


@pytest.mark.parametrize(
    ("task", "pipeline", "loads"),
    [("masked-lm", "fill-mask", "AutoModelForMaskedLM"), ("embedding", "feature-extraction", "AutoModel")],
)
def test_the_card_of_an_encoder_names_its_task(
    tiny_checkpoint: Checkpoint, tmp_path: Path, task: str, pipeline: str, loads: str
) -> None:
    text = (pruned(tiny_checkpoint("bert", task=task), tmp_path / "out") / "README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == pipeline
    assert f"from transformers import {loads}, AutoTokenizer" in text
    assert "KV cache" not in text
    # An embedding model needs its pooling declared; vLLM has no server for masked language models.
    assert ('vllm serve . --pooler-config \'{"pooling_type": "MEAN"' in text) == (task == "embedding")
    assert ("vLLM does not serve this model" in text) == (task == "masked-lm")


@pytest.mark.parametrize(
    ("family", "loads"),
    [
        ("imagegpt", "```python\nfrom transformers import ImageGPTForCausalImageModeling\n"),
        ("llamagen", "```python\nimport numprune.modeling\nfrom transformers import AutoModelForCausalLM\n"),
    ],
)
def test_the_card_of_an_image_generator_loads_no_tokenizer(
    tiny_checkpoint: Checkpoint, tmp_path: Path, family: str, loads: str
) -> None:
    text = (pruned(tiny_checkpoint(family), tmp_path / "out") / "README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "unconditional-image-generation"
    assert loads in text
    assert "AutoTokenizer" not in text
    assert "vLLM does not serve this model" in text


def test_vllm_classes_that_derive_the_head_size_are_avoided(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint("qwen2", vocab_size=259)
    commands = {  # by what is protected, with a ratio that the rest can give
        ("mlp", 0.201): "vllm serve . --model-impl transformers\n",
        ("attention", 0.15): "vllm serve .\n",
    }
    for (kept, ratio), command in commands.items():
        made = pruned(base, tmp_path / kept, ratio, criterion="magnitude", keep=(kept,))
        assert command in (made / "README.md").read_text()


def test_only_the_card_of_a_pruned_checkpoint_is_exported(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint(vocab_size=259)
    (base / "README.md").write_text("Perplexity: 3.")
    made = pruned(base, tmp_path / "out")
    vllm.export(made, tmp_path / "vllm")
    vllm.export(base, tmp_path / "dense")
    assert (tmp_path / "vllm" / "README.md").read_bytes() == (made / "README.md").read_bytes()
    assert not (tmp_path / "dense" / "README.md").exists()


def test_layers_of_different_sizes_need_numprune_and_the_card_says_so(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    made = pruned(tiny_checkpoint(vocab_size=259), tmp_path / "out", allocation="global", criterion="magnitude")
    text = (made / "README.md").read_text()
    assert ModelCard(text).data.tags == ["numprune", "structured-pruning", "per-layer-sizes"]
    assert "import numprune.modeling\nfrom transformers import AutoModelForCausalLM" in text
    assert "pip install --no-deps . ./serving/vllm_plugin" in text
    assert "vllm serve .\n" in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no header",
        b"---\n[1, 2]\n---\n",
        b"---\n: :\n  - {\n---\n",
        b"---\nlicense: [[mit]]\nlanguage: {en: 1}\n---\n",
        b"---\nlicense: " + b"x" * 1000 + b"\n---\n",
        b"\xff\xfe\x00",
    ],
)
def test_an_unusable_base_card_is_ignored(tiny_checkpoint: Checkpoint, tmp_path: Path, content: bytes) -> None:
    base = tiny_checkpoint(vocab_size=259)
    (base / "README.md").write_bytes(content)
    text = (pruned(base, tmp_path / "out") / "README.md").read_text()
    assert "license" not in ModelCard(text).data.to_dict()
    assert "see the licence of the base model" in text


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("cache/models--owner--name/snapshots/abc", "owner/name"),
        ("cache/models--gpt2/snapshots/abc", "gpt2"),
        ("cache/datasets--owner--name/snapshots/abc", None),
        ("snapshots/abc", None),
        ("my-model", None),
    ],
)
def test_the_hub_id_is_recovered_from_the_hub_cache(folder: str, name: str | None) -> None:
    assert card.hub_id(Path(folder)) == name


def test_quality_replaces_the_not_measured_section() -> None:
    text = "# A\n\n## Quality\n\nNot measured yet.\n\n## Use\n\nB\n"
    assert card_changes.with_quality(text, "## Quality\n\n| 1 |\n") == "# A\n\n## Quality\n\n| 1 |\n\n## Use\n\nB\n"
    with pytest.raises(IntegrityError, match=r"README\.md: not a card written by numprune"):
        card_changes.with_quality("# Another", "## Quality\n")


@pytest.mark.parametrize("last", [False, True])
def test_quality_that_other_weights_had_is_not_kept(tiny_checkpoint: Checkpoint, tmp_path: Path, last: bool) -> None:
    folder = pruned(tiny_checkpoint(vocab_size=259), tmp_path / "out")
    path, unmeasured = folder / "README.md", (folder / "README.md").read_text()
    measured = card_changes.with_quality(unmeasured, "## Quality\n\nNLL 1.2345\n\n### Speed\n\nfast")
    scheme = compressed_tensors.config_of({"layers.0.mlp": Scheme("w8a8")}, [])
    quantization = compressed_tensors.read_quantization({compressed_tensors.CONFIG_FIELD: scheme})
    assert quantization is not None
    changes: list[Callable[[], None]] = [
        lambda: card_changes.set_training(folder, "distilled"),
        lambda: card_changes.set_quantization(folder, quantization, 4),
        lambda: card_changes.set_precision(folder),
    ]
    for change in changes:
        path.write_text(measured[: measured.index("## Use")] if last else measured)
        change()
        text = path.read_text()
        assert "Not measured yet" in text
        assert not {"1.2345", "Speed"} & {*text.split()}
        assert ("## Use" in text) == (not last)
