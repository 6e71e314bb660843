"""The files in every artifact besides the weights: byte for byte those of the base model, and no others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from numprune.errors import InputError
from numprune.export import files, onnx, vllm
from numprune.flows.steps.prune import prune_checkpoint
from numprune.options import PruneOptions
from numprune.target import Target

Checkpoint = Callable[..., Path]

CARRIED = {
    # Numbers, orders and spaces as no program would write them again.
    "generation_config.json": b'{"temperature":1e0,\t"do_sample": false, "eos_token_id":[257, 257]}',
    "chat_template.jinja": b"{{ raise_exception('no') }}\r\n",
    "chat_template.json": b'{"chat_template": "x"}',
    "additional_chat_templates/rag.jinja": b"{{ x }}",
    "special_tokens_map.json": b'{ "eos_token": "</s>" }',
    "added_tokens.json": b"{}",
    "tokenizer.model": b"not even read where there is a tokenizer.json",
    "merges.txt": b"#version: 0.2\n",
    "modules.json": b'[ {"path": "1_Pooling"}]',
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens":true}',
    "sentence_bert_config.json": b'{"max_seq_length":  256}',
    "config_sentence_transformers.json": b'{"__version__": {}}',
    "LICENSE": b"all rights\n",
    "NOTICE.txt": b"who made it\n",
    "USE_POLICY.md": b"be good\n",
}
CARD = b"perplexity of the dense model: 3"  # README.md; a pruned model has its own (test_card.py)
LEFT = {
    "params.json": b'{"dim": 64}',
    "modeling_x.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "train.txt": b"a corpus",
    ".gitattributes": b"*.bin filter=lfs",
    "original/params.json": b"{}",
}


@pytest.fixture
def base(tiny_checkpoint: Checkpoint) -> Path:
    folder = tiny_checkpoint(vocab_size=259)
    for name, content in (CARRIED | LEFT | {"README.md": CARD}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pruned(base: Path, out: Path, stream: bool) -> Path:
    rows = torch.arange(64).view(2, 32)
    options = PruneOptions(0.3, compensation="none", target=Target(align=8))
    prune_checkpoint(base, rows, options, out, torch.device("cpu"), stream=stream)
    return out


ARTIFACTS: dict[str, Callable[[Path, Path], object]] = {
    "in memory": lambda base, out: pruned(base, out, stream=False),
    "streamed": lambda base, out: pruned(base, out, stream=True),
    "vllm": vllm.export,
    "onnx": onnx.export,
    "vllm of pruned": lambda base, out: vllm.export(pruned(base, out.with_name("pruned"), stream=False), out),
}


@pytest.mark.slow
@pytest.mark.parametrize("made", ARTIFACTS)
def test_files_that_pruning_does_not_change_are_identical_in_every_artifact(base: Path, made: str) -> None:
    out = base.with_name("out")
    ARTIFACTS[made](base, out)
    for name in (*CARRIED, "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert not [name for name in LEFT if (out / name).exists()]
    assert not [path for path in out.rglob("*.md") if CARD in path.read_bytes()]
    if made in ("vllm", "onnx"):  # of a model that was not pruned
        assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


CODE = {"AutoConfig": "modeling_x.C", "AutoTokenizer": ["modeling_x.T", None]}


@pytest.mark.slow
@pytest.mark.parametrize("made", ARTIFACTS)
def test_references_to_code_are_dropped(base: Path, made: str) -> None:
    def content(folder: Path, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / name).read_text())
        return found

    for name in ("config.json", "tokenizer_config.json"):
        (base / name).write_text(json.dumps({**content(base, name), "auto_map": CODE, "ü": "ö"}, ensure_ascii=False))
    out = base.with_name("out")
    ARTIFACTS[made](base, out)
    assert content(out, "tokenizer_config.json") | {"auto_map": CODE} == content(base, "tokenizer_config.json")
    assert "auto_map" not in content(out, "tokenizer_config.json") | content(out, "config.json")


def test_links_are_followed_except_to_devices(base: Path) -> None:
    """A hub's snapshot consists of links to files."""
    (base / "LICENSE").rename(base.with_name("blob"))
    (base / "LICENSE").symlink_to(base.with_name("blob"))
    files.carry(base, base / "original")
    assert (base / "original" / "LICENSE").read_bytes() == CARRIED["LICENSE"]
    assert not (base / "original" / "LICENSE").is_symlink()
    (base / "COPYING").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="COPYING: not a regular file"):
        files.carry(base, base / "original")
