"""Releases on a model hub: a local server that speaks its upload API stands in for huggingface.co."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from numprune.errors import IntegrityError
from numprune.export import manifest
from numprune.flows.steps.prune import prune_checkpoint
from numprune.options import PruneOptions
from numprune.serving import hub
from numprune.serving.hub import HubError
from tests.serving.releases import make_release, write_checkpoint
from tests.serving.servers import Hub

TOKEN = "hf_stand_in"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    base = write_checkpoint(folder / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n\nPerplexity 3.\n")
    rows = torch.arange(128).reshape(4, 32) % 200
    prune_checkpoint(base, rows, PruneOptions(ratio=0.3), folder / "pruned", torch.device("cpu"))
    return make_release(folder / "pruned", folder / "release")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub(TOKEN)
    with found.listening() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # of which the stand-in knows nothing
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_a_release_becomes_a_repository_that_transformers_loads(release: Path, stand_in: Hub, tmp_path: Path) -> None:
    pushed = hub.push(release, "team/tiny-pruned", private=True)
    files = stand_in.repositories["team/tiny-pruned"]
    assert stand_in.private == {"team/tiny-pruned"}
    assert (pushed.repository, pushed.digest) == ("team/tiny-pruned", manifest.read(release).digest)
    assert (pushed.files, pushed.bytes) == (len(files), sum(map(len, files.values())))
    assert {"config.json", "model.safetensors", "numprune_plan.json", "README.md"} <= files.keys()
    assert {"numprune/report.json", "numprune/manifest.json"} <= files.keys()
    assert "manifest.json" not in files  # it has the digest of the card before the quality was known
    for name, content in files.items():
        if name != "README.md":
            here = release / (name.removeprefix("numprune/") if "/" in name else f"checkpoint/{name}")
            assert content == here.read_bytes(), name
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0

    again = hub.push(release, "team/tiny-pruned")
    assert (again.files, stand_in.repositories["team/tiny-pruned"]) == (pushed.files, files)


def test_the_card_has_the_figures_of_the_report(release: Path, stand_in: Hub) -> None:
    hub.push(release, "team/tiny")
    text = stand_in.repositories["team/tiny"]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "| NLL, nats per token |" in text
    assert "Not measured yet" not in text
    assert text.count("## Quality") == 1
    assert text.index("## Quality") < text.index("## Use")
    assert "Not measured yet" in (release / "checkpoint" / "README.md").read_text()


def test_hub_refusals_are_reported_with_the_remedy(
    release: Path, stand_in: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(HubError, match=r"team/tiny: .*401.*give a token with write access: set \$HF_TOKEN"):
        hub.push(release, "team/tiny")
    with pytest.raises(HubError, match=r"a/b/c: .*check the name, the network and \$HF_ENDPOINT"):
        hub.push(release, "a/b/c")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"team/tiny: .*check the name, the network"):
        hub.push(release, "team/tiny")
    assert stand_in.repositories == {}


def test_a_release_that_is_damaged_or_has_no_card_is_not_pushed(release: Path, stand_in: Hub, tmp_path: Path) -> None:
    bare = make_release(write_checkpoint(tmp_path / "dense"), tmp_path / "release")
    with pytest.raises(IntegrityError, match=r"README\.md: missing; .*run `numprune optimize` again"):
        hub.push(bare, "team/tiny")
    (bare / "report.md").write_text("better")
    with pytest.raises(IntegrityError, match=r"report\.md"):
        hub.push(bare, "team/tiny")
    assert stand_in.repositories == {}
