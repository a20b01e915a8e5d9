"""Systems as people say them: in sentences, tables and charts."""

from __future__ import annotations

_SYSTEMS = {
    "flashmoe": "FlashMoE under transformers",
    "flashmoe-fast": "FlashMoE, fast arithmetic",
    "flashmoe-no-prefetch": "FlashMoE without prefetching",
    "flashmoe-lru": "FlashMoE with LRU",
    "flashmoe-lfu": "FlashMoE with LFU",
    "flashmoe-checked": "FlashMoE, every read checked",
    "flashmoe-in-place": "FlashMoE, not packed",
    "flashmoe run llama-server": "FlashMoE under llama.cpp",
    "llama-server": "plain llama.cpp, repacked",
    "llama-server --no-repack": "plain llama.cpp, memory-mapped",
    "llama-cpp": "plain llama.cpp, memory-mapped",
    "os-paging": "transformers, memory-mapped",
    "os-paging-willneed": "transformers, memory-mapped, told ahead",
    "os-paging-random": "transformers, memory-mapped, no read-ahead",
    "in-memory": "transformers, all in memory",
    "transformers": "transformers",
    "accelerate-disk": "accelerate, from disk",
    "on-demand": "FlashMoE's reader without a cache",
    "airllm": "AirLLM",
    "fiddler": "Fiddler, re-implemented",
    "daop": "DAOP, re-implemented",
}
_WITH_POLICY = "flashmoe:"


def system(name: str) -> str:
    """What follows a comma, as in `flashmoe run llama-server, 3 guessed`, stays."""
    if name.startswith(_WITH_POLICY):
        return f"FlashMoE with {name.removeprefix(_WITH_POLICY)}"
    known, comma, rest = name.partition(", ")
    return _SYSTEMS.get(known, known) + comma + rest
