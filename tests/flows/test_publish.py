"""Tensors are compared with the configuration before publication and when a release is fetched."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from numprune.errors import IntegrityError
from numprune.flows.steps.publish import publish
from tests.flows.conftest import Answered
from tests.serving import releases
from tests.serving.releases import make_release, write_checkpoint


def test_weights_with_wrong_shapes_are_refused_by_name_despite_valid_digests(
    tmp_path: Path, numprune: Callable[..., Answered]
) -> None:
    def widen(checkpoint: Path) -> None:
        wide = write_checkpoint(tmp_path / "wide", intermediate_size=128)
        shutil.copyfile(wide / "model.safetensors", checkpoint / "model.safetensors")

    release = make_release(write_checkpoint(tmp_path / "model"), tmp_path / "release", widen)
    with pytest.raises(IntegrityError, match=r"model\.layers\.0\.mlp\.\w+\.weight has shape"):
        publish(tmp_path / "w", "workspace", release, "tiny")
    refused = numprune("registry", "publish", release, "tiny", "--workspace", tmp_path / "w")
    assert refused.code == 1
    assert "model.layers.0.mlp" in refused.err
    assert not (tmp_path / "w").exists()

    releases.publish(release, tmp_path / "w", "tiny")  # around the command line; a pod's init container is the next
    refused = numprune("registry", "fetch", "tiny", tmp_path / "out", "--workspace", tmp_path / "w")
    assert (refused.code, refused.out) == (1, "")
    assert "model.layers.0.mlp" in refused.err


def test_a_folder_that_is_not_a_release_is_reported_as_such(tmp_path: Path, numprune: Callable[..., Answered]) -> None:
    refused = numprune("registry", "publish", tmp_path / "nothing", "tiny", "--workspace", tmp_path / "w")
    assert refused.code == 1
    assert "nothing" in refused.err


def test_nan_weights_are_not_published(tmp_path: Path, numprune: Callable[..., Answered]) -> None:
    """Nor are they fetched: vLLM would serve them."""

    def spoil(checkpoint: Path) -> None:
        weights = load_file(checkpoint / "model.safetensors")
        weights["model.norm.weight"][3] = torch.nan
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})

    release = make_release(write_checkpoint(tmp_path / "model"), tmp_path / "release", spoil)
    where = ["--workspace", tmp_path / "w"]
    refused = numprune("registry", "publish", release, "tiny", *where)
    assert refused.code == 1
    assert "model.norm.weight has values that are NaN or infinite" in refused.err
    releases.publish(release, tmp_path / "w", "tiny")
    refused = numprune("registry", "fetch", "tiny", tmp_path / "out", *where)
    assert (refused.code, refused.out) == (1, "")
    assert "model.norm.weight has values that are NaN or infinite" in refused.err
