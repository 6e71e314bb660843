"""The size of a vLLM server's KV cache, from its Prometheus metrics."""

import math
import re
from dataclasses import dataclass

from numprune.errors import IntegrityError
from numprune.serving import loopback

_INFO = "vllm:cache_config_info"
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class KvCache:
    """`tokens`: sequence positions that it holds, in `blocks` of `block_size` positions."""

    tokens: int
    blocks: int
    block_size: int


def read_kv_cache(url: str, max_model_len: int) -> KvCache:
    """Read the KV cache of the server at `url`, started with this limit. Raises IntegrityError."""
    return parse_kv_cache(loopback.get(f"{url}/metrics", timeout=30.0).text, max_model_len)


def parse_kv_cache(text: str, max_model_len: int) -> KvCache:
    """From the text of /metrics. Raises IntegrityError.

    Tokens are those of the longest sequences, in whole blocks, times the number of such sequences that vLLM reports it
    can hold. Blocks alone would count a token several times if different kinds of layers have their own blocks, and
    vLLM's `kv_cache_size_tokens` excludes what a shorter sequence leaves unused in its last block.
    """
    labels = [
        dict(_LABEL.findall(line.partition("{")[2])) for line in text.splitlines() if line.startswith(_INFO + "{")
    ]
    if len(labels) != 1:
        raise IntegrityError(f"/metrics of vLLM has {len(labels)} samples of {_INFO}; one engine is expected")
    try:
        blocks, size = int(labels[0]["num_gpu_blocks"]), int(labels[0]["block_size"])
        sequences = float(labels[0]["kv_cache_max_concurrency"])
        tokens = round(sequences * math.ceil(max_model_len / size) * size)
    except (KeyError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise IntegrityError(f"/metrics of vLLM: {_INFO} does not report the size of the KV cache ({error})") from None
    if min(blocks, size, tokens) < 1:
        raise IntegrityError(f"/metrics of vLLM: {_INFO} reports {blocks} blocks of {size} positions")
    return KvCache(tokens=tokens, blocks=blocks, block_size=size)
