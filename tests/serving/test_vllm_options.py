"""Options, API key and memory of a server, decided before it starts."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from numprune.errors import InputError
from numprune.serving.vllm import api_key, memory
from numprune.serving.vllm.options import split_names, taken

GIB = 1 << 30


# --- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names", "others"),
    [
        ([], ["mine"], []),
        (["--served-model-name", "y"], ["y"], []),
        (["--seed", "3", "--served_model_name", "y", "z", "-O3"], ["y", "z"], ["--seed", "3", "-O3"]),
        (["--served-model-name=y", "--max-model-len", "128"], ["y"], ["--max-model-len", "128"]),
        (["--served", "y", "--served-model-name", "z"], ["z"], []),  # the last counts, as for vLLM
        (["--hf-overrides.a_b", "--served-not", "1"], ["1"], ["--hf-overrides.a_b"]),
    ],
)
def test_served_names_are_separated_from_other_options(
    options: Sequence[str], names: Sequence[str], others: Sequence[str]
) -> None:
    assert split_names(options, "mine") == (names, others)


def test_an_option_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match="--served-model-name: expected at least one argument"):
        split_names(["--served-model-name", "--seed", "3"], "mine")


@pytest.mark.parametrize(
    ("word", "found"),
    [("--api_key=x", "--api-key"), ("--api", "--api-key"), ("--model-impl", None), ("api-key", None), ("--seed", None)],
)
def test_reserved_options_are_detected_in_every_spelling(word: str, found: str | None) -> None:
    assert taken(word, ("--model", "--api-key")) == found


# --- API keys ----------------------------------------------------------------------------------------


def test_a_key_is_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.delenv(api_key.VARIABLE, raising=False)
    assert api_key.read() is None
    assert api_key.read(file) == "from-file"
    monkeypatch.setenv(api_key.VARIABLE, "from-environment")
    assert api_key.read() == "from-environment"
    assert api_key.read(file) == "from-file"
    monkeypatch.setenv(api_key.VARIABLE, "")  # vLLM, too, takes this for none
    assert api_key.read() is None


@pytest.mark.parametrize("content", ["", "\n", "hunter2 and more", "hunter2\nhunter2", "hünter2", "hunter2" * 1000])
def test_what_is_not_a_key_is_refused_without_repeating_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    with pytest.raises(InputError, match=r"--api-key-file .*key: not an API key") as refused:
        api_key.read(file)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        api_key.read(tmp_path / "none")


# --- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "available", "weights", "share"),
    [(24, 20, 0, 0.416), (24, 20, 8, 0.583), (24, 2, 1, 0.062), (512, 512, 16, 0.515)],
)
def test_the_memory_share_covers_the_weights_and_half_of_the_rest(
    total: int, available: int, weights: int, share: float
) -> None:
    found = memory.share(memory.Memory(total * GIB, available * GIB), weights * GIB)
    assert found == share
    assert weights < found * total < available  # vLLM refuses more


@pytest.mark.parametrize(
    ("files", "limited"),
    [
        ({"memory.max": f"{GIB}\n", "memory.current": f"{GIB // 4}\n"}, True),
        ({"memory/memory.limit_in_bytes": f"{GIB}\n", "memory/memory.usage_in_bytes": f"{GIB // 4}\n"}, True),
        ({"memory.max": "max\n", "memory.current": "1\n"}, False),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, False),
        ({}, False),
    ],
)
def test_memory_follows_the_container_limit(tmp_path: Path, files: dict[str, str], limited: bool) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = memory.of_machine(tmp_path)
    assert found.total == (GIB if limited else psutil.virtual_memory().total)
    assert 0 < found.available <= (GIB - GIB // 4 if limited else found.total)


@pytest.mark.parametrize(
    ("options", "variables", "found"),
    [
        ([], {}, False),
        (["--max-model-len", "128"], {"PATH": "/bin"}, False),
        (["--gpu-memory-utilization", "0.3"], {}, True),
        (["--kv_cache_memory_bytes=1G"], {}, True),
        ([], {"VLLM_CPU_KVCACHE_SPACE": "4"}, True),
        ([], {"VLLM_CPU_KVCACHE_SPACE": ""}, False),
    ],
)
def test_user_settings_take_precedence(options: Sequence[str], variables: dict[str, str], found: bool) -> None:
    assert memory.is_set(options, variables) == found
