"""Published LlamaGen files become checkpoints."""

import argparse
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from numprune.errors import InputError, IntegrityError
from numprune.export import checkpoint, llamagen
from numprune.export.tasks import load_task
from numprune.tasks.codes import ImageCodes
from tests.numprune.llamagen import reference
from tests.numprune.llamagen.reference import CODES, GRID, HEADS


def convert(state, tmp_path, *, wrapper=None, name="published.pt"):
    if name.endswith(".pt"):
        torch.save({wrapper: state, "optimizer": {}} if wrapper else state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    return llamagen.convert(tmp_path / name, tmp_path / "out", codes_per_image=GRID * GRID, heads=HEADS)


@pytest.mark.parametrize(
    ("wrapper", "name"), [(None, "a.pt"), ("model", "a.pt"), ("state_dict", "a.pt"), (None, "a.safetensors")]
)
def test_the_checkpoint_computes_what_the_published_file_does(tmp_path, wrapper, name):
    state = reference.random_state()
    convert(state, tmp_path, wrapper=wrapper, name=name)
    model, tokenizer = checkpoint.load(tmp_path / "out")
    codes = torch.randint(CODES, (2, GRID * GRID), generator=torch.Generator().manual_seed(1))
    expected = reference.logits(state, torch.tensor([1, 0]), codes)
    with torch.no_grad():
        found = model(torch.cat([torch.tensor([[CODES + 1], [CODES]]), codes], 1)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    task = load_task(tmp_path / "out")
    assert isinstance(task, ImageCodes)
    assert (task.vocabulary.codes, task.vocabulary.classes) == (CODES, 3)
    assert tokenizer.encode("3 39 <class:1> <start>") == [3, 39, 41, 43]


def test_a_training_checkpoint_of_the_published_code_is_read(tmp_path):
    """It also holds the trainer's arguments; some files hold the rotary table, and old ones are no zip archives."""
    state = reference.random_state()
    trained = {"model": state | {"freqs_cis": torch.zeros(17, 8, 2)}, "steps": 3, "args": argparse.Namespace(lr=1e-4)}
    for number, zipped in enumerate((True, False)):
        torch.save(trained, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        llamagen.convert(tmp_path / "a.pt", tmp_path / str(number), codes_per_image=GRID * GRID, heads=HEADS)
        model = checkpoint.load_model(tmp_path / str(number))
        assert torch.equal(model.lm_head.weight, state["output.weight"])


def test_the_stored_precision_is_kept(tmp_path):
    state = {name: tensor.to(torch.bfloat16) for name, tensor in reference.random_state().items()}
    convert(state, tmp_path)
    assert checkpoint.read_config(tmp_path / "out").dtype == torch.bfloat16


def test_a_failed_conversion_leaves_nothing(tmp_path):
    state = reference.random_state()
    state["layers.1.feed_forward.w2.weight"][0, 0] = torch.inf
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        convert(state, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["published.pt"]


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match=f"{name}: not a file of tensors"):
            llamagen.convert(tmp_path / name, tmp_path / "out", codes_per_image=16)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.pt: no such file"),
        ({"model": {"step": 3}}, "a.pt: not a state dict"),
        ([torch.ones(1)], "a.pt: not a state dict"),
        ({1: torch.ones(1)}, "a.pt: not a state dict"),
        ({"weight": torch.ones(2).to_sparse()}, "a.pt: not a state dict"),
        ({"weight": torch.ones(1)}, "it lacks 'cls_embedding.embedding_table.weight' and has the unknown 'weight'"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    if content is not None:
        torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=re.escape(message)):
        llamagen.convert(tmp_path / "a.pt", tmp_path / "out", codes_per_image=16)
