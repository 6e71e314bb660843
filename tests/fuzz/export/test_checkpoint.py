"""Untrusted configurations and tokenizers are read, or refused by name; no code from them is run."""

import builtins
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numprune_vllm import sizes

from numprune.anatomy import MAXIMUM_LAYERS
from numprune.errors import InputError, NumpruneError
from numprune.export import checkpoint, files
from tests.conftest import build_tiny, byte_tokenizer
from tests.fuzz.strangers import NAMES, changed, documents, fuzz, named, raw, values, written

PER_LAYER = {"per_layer_config": {"0": {"intermediate_size": 48}}, "model_type": "numprune_llama", "head_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    build_tiny().save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def good(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"]
SIZES += ["head_dim", "vocab_size", "max_position_embeddings"]


def refused_or_read(folder: Path) -> Any:
    config = named(checkpoint.read_config, folder)
    if not isinstance(config, NumpruneError):
        named(checkpoint.audit, folder)
        with suppress(ValueError, InputError):  # as the plug-in reads it, in vLLM's process, and refuses it
            sizes.check_settings(config)
            sizes.check_layers(config)
            sizes.check_parallel(config, 2)
    return config


@fuzz
@given(st.data())
def test_a_configuration_is_read_or_refused(folder: Path, good: dict[str, Any], data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "per layer"]))
    start = {**good, **PER_LAYER} if family == "per layer" else {**good, "model_type": family}
    size = st.integers(-1, 8) | st.sampled_from([10**6, 2**31, 2**63, 10**400, "4", None, 2.5, True])
    sized = st.dictionaries(st.sampled_from(SIZES), size, max_size=3).map(lambda more: written({**start, **more}))
    content = data.draw(st.one_of(changed(start).map(written), sized, values.map(written), raw))
    (folder / "config.json").write_bytes(content)
    try:
        refused_or_read(folder)
    finally:
        (folder / "config.json").write_text(json.dumps(good))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral", "num_attention_heads": 0},
        {"model_type": "mistral", "num_attention_heads": 0, "num_key_value_heads": 0},
        {"model_type": "qwen2", "num_key_value_heads": -2},
        {"model_type": "mistral", "hidden_size": 2**62},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": MAXIMUM_LAYERS + 1},
        {"num_hidden_layers": -1},
        {"intermediate_size": 0},
        {"hidden_act": "os.system"},
        {"rope_parameters": {"rope_type": "unheard of", "rope_theta": 1.0}},
        {"dtype": "__import__('os')"},
        {"dtype": "int8"},
        {"dtype": True},
        {"model_type": "numprune_llama", "per_layer_config": {"0": {"skip": ["everything"]}}},
        {"architectures": [None]},
        {"architectures": True},
        {"architectures": [5]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": {"0": "LlamaForCausalLM"}},
    ],
)
def test_earlier_failing_configurations(folder: Path, good: dict[str, Any], change: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({**good, **change}))
    try:
        refused_or_read(folder)
    finally:
        (folder / "config.json").write_text(json.dumps(good))


CODE = "import pathlib\npathlib.Path({path!r}).touch()\n"


@pytest.mark.parametrize("model_type", ["llama", "stranger"])
def test_no_model_code_is_run_and_nothing_is_prompted(
    tmp_path: Path, good: dict[str, Any], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    build_tiny().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    code = CODE.format(path=str(ran)) + "class C: pass\n"
    (folder / "modeling_stranger.py").write_text(code)
    automatic = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_stranger.C")
    (folder / "config.json").write_text(json.dumps({**good, "model_type": model_type, "auto_map": automatic}))
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text())
    told |= {
        "auto_map": {"AutoTokenizer": ["modeling_stranger.C", "modeling_stranger.C"]},
        "chat_template": "{{ raise_exception('rendered') }}{% for i in range(10**12) %}{% endfor %}",
    }
    path.write_text(json.dumps(told))

    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *said: asked.append(said) or "y")
    for read in (checkpoint.read_config, checkpoint.load_tokenizer, checkpoint.load):
        refused = isinstance(named(read, folder), NumpruneError)
        assert refused == (model_type == "stranger" and read is not checkpoint.load_tokenizer)
    assert asked == []
    assert not ran.exists()


@fuzz
@given(st.data())
@example(None)
def test_a_tokenizer_is_read_or_refused(folder: Path, data: st.DataObject | None) -> None:
    path = folder / "tokenizer.json"
    good = path.read_text()
    document = json.loads(good)
    vocabulary = dict(list(document["model"]["vocab"].items())[:4])
    small = {**document, "model": {**document["model"], "vocab": vocabulary}}
    drawn = b"[" * 100_000 if data is None else data.draw(st.one_of(changed(small).map(written), raw))
    path.write_bytes(drawn)
    try:
        named(checkpoint.load_tokenizer, folder)
    finally:
        path.write_text(good)


@fuzz
@given(st.data())
def test_a_tokenizer_configuration_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / "tokenizer_config.json"
    good = path.read_text()
    keys = st.sampled_from(["tokenizer_class", "auto_map", "vocab_file", "tokenizer_file", "chat_template"])
    odd = st.dictionaries(keys, st.sampled_from([*NAMES, "os.system", "PreTrainedTokenizer", None, 1, ["a"]]))
    content = data.draw(
        st.one_of(
            changed(json.loads(good)).map(written), odd.map(lambda more: written({**json.loads(good), **more})), raw
        )
    )
    path.write_bytes(content)
    try:
        named(checkpoint.load_tokenizer, folder)
    finally:
        path.write_text(good)


@fuzz
@given(documents({"bos_token_id": 256, "eos_token_id": [257], "temperature": 0.6, "do_sample": True}))
@example(b"[1]")
@example(b"[" * 100_000)
@example(written({"watermarking_config": 5}))
@example(written({"temperature": 0.6, "do_sample": False}))  # transformers would not write it
def test_generation_settings_are_copied_unread(folder: Path, content: bytes) -> None:
    path = folder / "generation_config.json"
    path.write_bytes(content)
    try:
        model, _ = checkpoint.load(folder)
        with tempfile.TemporaryDirectory() as out:
            checkpoint.save(model, folder, Path(out))
            assert (Path(out) / path.name).read_bytes() == content
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["chat_template.jinja", "added_tokens.json"])
def test_a_link_to_a_device_is_not_read(tmp_path: Path, name: str) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{name}: not a regular file"):
        checkpoint.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("config.json", files.MAXIMUM_CONFIG_BYTES + 1),
        ("tokenizer.json", files.MAXIMUM_FILE_BYTES + 1),
        ("tokenizer_config.json", 1 << 40),
        ("special_tokens_map.json", 1 << 40),
    ],
)
def test_oversized_files_are_not_read(tmp_path: Path, name: str, size: int) -> None:
    build_tiny().config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(size)
    with pytest.raises(InputError, match=f"{name}: exceeds the"):
        (checkpoint.read_config if name == "config.json" else checkpoint.load_tokenizer)(tmp_path)
