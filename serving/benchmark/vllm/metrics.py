"""What a vLLM server says of its KV cache, in the metrics that Prometheus would scrape."""

import re
from dataclasses import dataclass

import httpx

from numprune.errors import IntegrityError

_INFO = "vllm:cache_config_info"
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class KvCache:
    """`tokens`: how many positions of sequences it holds, over all blocks; `blocks` of `block_size` positions each."""

    tokens: int
    blocks: int
    block_size: int


def read_kv_cache(url: str) -> KvCache:
    """Of the server at `url`. Raises IntegrityError when it does not tell."""
    return parse_kv_cache(httpx.get(f"{url}/metrics", timeout=30.0).text)


def parse_kv_cache(text: str) -> KvCache:
    """From the text of /metrics. Raises IntegrityError."""
    labels = [
        dict(_LABEL.findall(line.partition("{")[2])) for line in text.splitlines() if line.startswith(_INFO + "{")
    ]
    if len(labels) != 1:
        raise IntegrityError(f"/metrics of vLLM has {len(labels)} times {_INFO}, not once: one engine is expected")
    try:
        blocks, size = int(labels[0]["num_gpu_blocks"]), int(labels[0]["block_size"])
        tokens = int(labels[0]["kv_cache_size_tokens"])
    except (KeyError, ValueError) as error:
        raise IntegrityError(f"/metrics of vLLM: {_INFO} does not tell the size of the KV cache ({error})") from None
    if min(blocks, size, tokens) < 1:
        raise IntegrityError(f"/metrics of vLLM: {_INFO} tells of {blocks} blocks of {size} positions")
    return KvCache(tokens=tokens, blocks=blocks, block_size=size)
