"""Prefill and decoding of a Llama with random weights, each as one CUDA graph, so that only the device is timed."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, PreTrainedModel, StaticCache

from numprune.flows.studies.gpu.sizes import Sizes, Width

_WARM_UPS = 3  # before a capture, so that libraries choose their kernels and allocate memory


def random_llama(sizes: Sizes, width: Width, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose layers all have `width`, created on `device`.

    Llama's configuration refuses six KV heads of eight. Without a window, Mistral computes the same.
    """
    config = MistralConfig(
        sliding_window=None,
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.layer.hidden,
        intermediate_size=width.intermediate,
        num_attention_heads=width.kv_heads * (sizes.layer.heads // sizes.layer.kv_heads),
        num_key_value_heads=width.kv_heads,
        head_dim=sizes.head_dim,
        num_hidden_layers=sizes.layers,
        max_position_embeddings=sizes.prompt + sizes.new + _WARM_UPS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


class Generation:
    """Greedy generation for one batch of prompts of one length.

    Args:
        model: a causal language model.
        tokens: (B, S) int64, the prompts, on the model's device.
        new: number of tokens that `decoded` returns after the first.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, new: int) -> None:
        self._model, self._tokens, self._new = model, tokens, new
        self._cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + new + _WARM_UPS)
        self._token = torch.zeros_like(tokens[:, :1])
        self._position = torch.zeros_like(self._token)
        self.restart()

    @torch.inference_mode()
    def prefill(self) -> None:
        """Run the prompts through the model with their own cache."""
        cache = DynamicCache(config=self._model.config)
        self._model(self._tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def restart(self) -> None:
        """Fill the static cache with the prompts; the next token is the first output."""
        self._cache.reset()
        self._take(self._model(self._tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits)
        self._position.fill_(self._tokens.shape[1])

    @torch.inference_mode()
    def step(self) -> None:
        """Extend every row by one token. All state is in tensors at fixed addresses."""
        output = self._model(
            input_ids=self._token,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._take(output.logits)
        self._position.add_(1)

    def decoded(self) -> Tensor:
        """Return the greedy tokens (B, new + 1), decoded in the timed way."""
        step = captured(self.step, self._tokens.device)
        self.restart()
        tokens = [self._token.clone()]
        for _ in range(self._new):
            step()
            tokens.append(self._token.clone())
        return torch.cat(tokens, 1)

    def _take(self, logits: Tensor) -> None:
        self._token.copy_(logits[:, -1:].argmax(-1))


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return `work` as a replay of one CUDA graph, or unchanged on a CPU.

    Capturing runs it a few times first. Its inputs and outputs must stay at fixed addresses.
    """
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
