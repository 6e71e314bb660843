"""Fixed texts for comparing a checkpoint with its exports and servers."""

from collections.abc import Mapping
from types import MappingProxyType

TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "prose": "The committee met on Tuesday to discuss the budget, and after three hours it had agreed on almost "
        "nothing: the library would stay open, the bridge would be painted, and everything else would be decided in "
        "spring.",
        "code": "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('empty')\n"
        "    return sum(values) / len(values)\n\n\nclass Reader:\n    def __init__(self, path):\n",
        "figures": "In 1998 there were 12,345 of them; by 2004 only 3.14 % remained (see table 7, columns a-f).",
        "other scripts": "Zażółć gęślą jaźń. Der Fluß steigt. 天地玄黃 宇宙洪荒。 Привет, мир! 🙂 "
        "<tag attribute='x'/> ",
    }
)
