"""Small models with random weights, created for each test."""

import os
import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that spin while they wait take the processors from the servers and stages that a test runs beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Models are tiny: a second thread costs more than it computes, and waits for a processor that another test has.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from numprune.serving import loopback
from tests.processes import pytest_configure  # noqa: F401 - a hook

# Large libraries are imported where they are used: xdist's controller reads this file, and runs no test.
if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from numprune.tasks import TaskName

# Started in the background by a shell without job control, we and our children would inherit an ignored SIGINT, and
# what is tested of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
loopback.exempt()  # what tests ask of their own servers goes through no proxy


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logged may be no text (a file's name can be any bytes), and reports go from workers as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: where several processes share the files, the short ones fill up the end.

    The first of all are those in this folder, each of which goes through all families or sets up environments.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent != HERE))


TINY = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer that needs no training: one token a byte, and three special ones."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = _bytes("<s>", "</s>", "<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def encoder_tokenizer() -> "PreTrainedTokenizerFast":
    """The same with an encoder's special tokens, which are put around each text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = _bytes("[CLS]", "[SEP]", "[MASK]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 257), ("[CLS]", 256))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def image_processor(size: int = 8) -> Any:
    """A ViT's processor of grey images, without torchvision."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5], image_std=[0.5])


def write_images(folder: Path, count: int = 24, classes: Sequence[str] = (), seed: int = 0) -> Path:
    """Write `count` grey images of 12 x 10, each into the subfolder of one of the `classes` in turn, if any."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    for index in range(count):
        inside = folder / classes[index % len(classes)] if classes else folder
        inside.mkdir(parents=True, exist_ok=True)
        # Smooth, so that images differ after they are resized.
        coarse = Image.fromarray(generator.integers(0, 256, (3, 3), dtype=np.uint8))
        coarse.resize((12, 10), Image.Resampling.BILINEAR).save(inside / f"{index:03}.png")
    return folder


def _bytes(*special: str) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# The families that are one network with or without some biases and norms.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")

_LAYER_TYPES = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_IMAGES = {"image_size": 8, "patch_size": 2, "num_channels": 1}
# What makes an architecture differ from Llama must show in its logits.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma2": {
        "sliding_window": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 9,
    },
    "gemma3_text": {"sliding_window": 8, "layer_types": _LAYER_TYPES, "query_pre_attn_scalar": 9},
    "gpt2": {"n_inner": 96},
    "imagegpt": {"n_inner": 96, "vocab_size": 260},
    "llamagen": {"vocab_size": 263, "num_classes": 3, "max_position_embeddings": 257, "pad_token_id": None},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "stablelm": {"use_qkv_bias": True},
    "bert": {"pad_token_id": 0},
    "roberta": {"pad_token_id": 1},
    "distilbert": {"pad_token_id": 0, "hidden_dim": 96},
    "electra": {"pad_token_id": 0, "embedding_size": 32},
    "vit": _IMAGES,
    "deit": _IMAGES,
    "dinov2": {**_IMAGES, "mlp_ratio": 2},
    # 64 tokens in windows of 3 x 3, every second time shifted; then 16 of twice the width. Neither grid is a multiple.
    "swin": {
        **_IMAGES,
        "patch_size": 1,
        "embed_dim": 32,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 3,
        "mlp_ratio": 1.5,
    },
    "mixtral": {"num_local_experts": 5, "intermediate_size": 24},
    # The first layer has an MLP, the second has experts and one that all tokens share.
    "qwen2_moe": {**_EXPERTS, "num_experts": 5, "mlp_only_layers": [0], "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_EXPERTS, "num_local_experts": 5, "norm_topk_prob": True},
    "gpt_oss": {
        **_EXPERTS,
        "num_local_experts": 5,
        "intermediate_size": 24,
        "sliding_window": 8,
        "layer_types": _LAYER_TYPES,
        "rope_parameters": {
            "rope_type": "yarn",  # vLLM knows no other for it
            "rope_theta": 10000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    },
}


def tiny_config(family: str, **overrides: Any) -> "PreTrainedConfig":
    from transformers import AutoConfig

    from numprune.families import FAMILIES

    # The sizes of a model in stages are those of its own fields.
    sizes = {} if FAMILIES[family.removeprefix("numprune_")].stages else TINY
    fields = {**sizes, "sliding_window": None, **OF_FAMILY.get(family, {}), **overrides}
    return AutoConfig.for_model(family, **fields)


def build_tiny(
    family: str = "llama", seed: int = 0, task: "TaskName | None" = None, **overrides: Any
) -> "PreTrainedModel":
    """A random model of `family` in float32, for its first task if not another; its biases are not zero."""
    import torch

    from numprune.configs import class_name
    from numprune.families import FAMILIES
    from numprune.modeling import AUTO_OF

    torch.manual_seed(seed)
    config = tiny_config(family, **overrides)
    known = FAMILIES[family.removeprefix("numprune_")]
    task = task or known.tasks[0]
    auto, config.architectures = AUTO_OF[task], [class_name(config, task)]  # some families have several for a task
    model = auto.from_config(config, attn_implementation=known.attention_implementation).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than the initialiser's: with nearly zero logits every comparison would pass.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def write_checkpoint(model: "PreTrainedModel", folder: Path) -> Path:
    from numprune.anatomy import task_name

    model.save_pretrained(folder)
    if task_name(model.config) == "image-classification":
        image_processor().save_pretrained(folder)
        return folder
    tokenizer = byte_tokenizer() if task_name(model.config) == "causal-lm" else encoder_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


def recast(folder: Path, dtype: "torch.dtype", **others: "torch.dtype") -> Path:
    """Store the tensors of a checkpoint of one file in `dtype`, or `others` by name, whatever its config.json says."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    cast = {name: tensor.to(others.get(name, dtype)) for name, tensor in load_file(path).items()}
    save_file(cast, path, {"format": "pt"})
    return folder


@pytest.fixture
def tiny_model() -> "Callable[..., PreTrainedModel]":
    return build_tiny


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_checkpoint(family="llama", name="base", seed=0, **config)` writes a random model and a byte tokenizer."""

    def write(family: str = "llama", name: str = "base", seed: int = 0, **overrides: Any) -> Path:
        return write_checkpoint(build_tiny(family, seed, **overrides), tmp_path / name)

    return write
