"""GPU checks shared by pytest and this command. A check raises AssertionError."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from numprune import pruning
from numprune.criteria.obs import greedy_removal
from numprune.export.streaming import CheckpointLayers
from numprune.flows.studies.gpu.generation import Generation, random_llama
from numprune.flows.studies.gpu.sizes import MINIATURE, widths
from numprune.moments import Moments
from numprune.options import PruneOptions
from numprune.placement import is_spread, placed
from numprune.target import Target

CPU = torch.device("cpu")


def sums_to_float32(device: torch.device) -> None:
    """Gram matrices of float32 inputs have float32 accuracy, with several strips and slices of tokens."""
    x = torch.randn(3000, 2100, generator=torch.Generator().manual_seed(0))
    moments = Moments(2100, device=device)
    moments.add(x.to(device))
    expected = x.double().T @ x.double() / 3000
    error = float((moments.gram.cpu() - expected).abs().max())
    assert error < 1e-6, f"a mean of products is off by {error:.2g}"


def no_tf32(device: torch.device) -> None:
    """Sums on a GPU are refused while products may use TF32."""
    if device.type == "cpu":
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        Moments(3, device=device)
        refused = ""
    except ValueError as error:
        refused = str(error)
    finally:
        torch.set_float32_matmul_precision(before)
    assert "highest" in refused, "sums in TF32 were accepted"


def greedy_order(device: torch.device) -> None:
    """Greedy OBS removes the same units in the same order and at the same cost as on a CPU, for channels and heads."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(320, 320, generator=generator, dtype=torch.float64) / 18
    x = torch.randn(900, 320, generator=generator, dtype=torch.float64) @ mixing + 0.3
    weight = torch.randn(100, 320, generator=generator, dtype=torch.float64)
    gram = x.T @ x / 900
    for channels_per_unit in (1, 16):
        order, costs = greedy_removal(weight, gram, channels_per_unit)
        found = greedy_removal(weight.to(device), gram.to(device), channels_per_unit)
        assert found[0].tolist() == order.tolist()
        torch.testing.assert_close(found[1].cpu(), costs, rtol=1e-8, atol=0)


def pruned_on_the_device(device: torch.device) -> None:
    """A model pruned layer by layer from its files equals the one pruned in memory, and the one pruned on a CPU."""
    rows = torch.randint(0, MINIATURE.vocabulary, (80, MINIATURE.prompt), generator=torch.Generator().manual_seed(0))
    options = PruneOptions(
        0.4, criterion="numerical", allocation="uniform", compensation="sequential", target=Target(align=1)
    )
    base = random_llama(MINIATURE, widths(MINIATURE)[0], CPU, torch.float32)
    pruned = {
        where: pruning.prune(copy.deepcopy(base).to(where), rows, options).model.cpu().state_dict()
        for where in (device, CPU)
    }
    streamed: dict[str, Tensor] = {}
    with TemporaryDirectory() as name:
        base.save_pretrained(name)
        pruning.prune_layers(
            CheckpointLayers(Path(name), scratch=Path(name), device=device), rows, options, streamed.update
        )
    for tensors in pruned.values():
        assert streamed.keys() == {name for name in tensors if ".layers." in name}
        for name, tensor in streamed.items():
            torch.testing.assert_close(tensor.cpu(), tensors[name], atol=1e-5, rtol=1e-3)


def spread_over_two_gpus(device: torch.device) -> str | None:
    """A model whose layers lie on two GPUs is pruned as on one; returns the reason if it cannot be tested."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return "no second CUDA device"
    if importlib.util.find_spec("accelerate") is None:
        return "not installed: accelerate"
    rows = torch.randint(0, MINIATURE.vocabulary, (80, MINIATURE.prompt), generator=torch.Generator().manual_seed(0))
    options = PruneOptions(0.4, allocation="error", compensation="residual", target=Target(align=1))
    base = random_llama(MINIATURE, widths(MINIATURE)[0], CPU, torch.float32)
    size = sum(parameter.nbytes for parameter in base.parameters())
    memory = {torch.device("cuda", 0): int(0.75 * size), torch.device("cuda", 1): 2 * size}
    models = [copy.deepcopy(base).to(device), placed(copy.deepcopy(base), memory)]
    assert is_spread(models[1])
    one, two = (pruning.prune(model, rows, options) for model in models)
    assert one.plan == two.plan
    expected = one.model.state_dict()
    for name, tensor in two.model.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), expected[name].cpu(), atol=1e-6, rtol=1e-5)
    return None


def decoded_as_in_one_pass(device: torch.device) -> None:
    """The static cache, and the CUDA graph on a GPU, give the same tokens as full forward passes without a cache."""
    sizes = MINIATURE
    for width in widths(sizes):
        model = random_llama(sizes, width, device, torch.float32)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, sizes.vocabulary, (2, sizes.prompt), generator=generator).to(device)
        found = Generation(model, tokens, sizes.new).decoded()
        with torch.inference_mode():
            for _ in range(sizes.new + 1):
                tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert found.tolist() == tokens[:, sizes.prompt :].tolist(), f"{width.name}: other tokens"


def tensorrt_engine(device: torch.device) -> str | None:
    """A TensorRT engine computes what the checkpoint computes; returns the reason if it cannot be tested."""
    missing = [name for name in ("onnx", "onnxscript", "tensorrt") if importlib.util.find_spec(name) is None]
    if missing or device.type != "cuda":
        return f"not installed: {', '.join(missing)}" if missing else "no CUDA device"
    from numprune.export import manifest, parity, tensorrt
    from numprune.flows.studies import large

    with TemporaryDirectory() as name:
        base, engine = Path(name, "base"), Path(name, "engine")
        large.write_random(base, large.random_llama(7 * 10**6, 256, 4096))
        made = tensorrt.export(base, engine, max_batch=4, max_length=128)
        assert manifest.verify(engine) == made
        parity.check(base, engine, "tensorrt")
    return None


CHECKS: dict[str, Callable[[torch.device], str | None]] = {
    check.__name__: check
    for check in (
        sums_to_float32,
        no_tf32,
        greedy_order,
        pruned_on_the_device,
        spread_over_two_gpus,
        decoded_as_in_one_pass,
        tensorrt_engine,
    )
}
