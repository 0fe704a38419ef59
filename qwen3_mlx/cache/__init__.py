"""KV caches: plain, quantized, several sequences in one pass, prefixes in memory and on disk."""
