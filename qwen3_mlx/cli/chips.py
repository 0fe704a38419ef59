"""Chips of Macs: the bandwidth of their memory, and what was measured on one of them."""

from collections.abc import Mapping
from itertools import groupby

from qwen3_mlx import backend
from qwen3_mlx.engine.memory import Workload, bytes_read_per_token
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.sizes import published_model_config

# Memory bandwidth in GB/s, from Apple's technical specifications (support.apple.com, the page of
# each Mac, read on 2026-11-29). A chip that comes with less bandwidth and fewer GPU cores has both
# in its second name. There is no M4 Ultra, and Apple had no M5 Ultra on that date.
BANDWIDTHS: Mapping[str, float] = dict(
    [("M1", 68), ("M1 Pro", 200), ("M1 Max", 400), ("M1 Ultra", 800)]
    + [("M2", 100), ("M2 Pro", 200), ("M2 Max", 400), ("M2 Ultra", 800)]
    + [("M3", 100), ("M3 Pro", 150), ("M3 Max 30-core", 300), ("M3 Max", 400), ("M3 Ultra", 819)]
    + [("M4", 120), ("M4 Pro", 273), ("M4 Max 32-core", 410), ("M4 Max", 546)]
    + [("M5", 153), ("M5 Pro", 307), ("M5 Max 32-core", 460), ("M5 Max", 614)]
)
# Tokens a second of mlx-lm by bits of the weights, 16 for bfloat16: Qwen3-4B-Instruct-2507 on an M4
# Max, 128 tokens after a prompt of 2,048 (BENCHMARKS.md of ml-explore/mlx-lm).
_PUBLISHED = {4: 134.52, 6: 104.68, 8: 86.91, 16: 52.47}
_PUBLISHED_SIZE, _PUBLISHED_CHIP, _PUBLISHED_CONTEXT = "4B", "M4 Max", 2048 + 128 // 2


def chip_named(name: str) -> str | None:
    """Return the chip that `name` names, in any case, with or without "Apple"; None if none."""
    words = name.lower().removeprefix("apple ").split()
    return next((chip for chip in BANDWIDTHS if chip.lower().split() == words), None)


def this_chip() -> str | None:
    """Return the chip of this Mac; None if this is another machine, or the chip is not known.

    MLX does not tell how many cores the GPU has: of two variants it is the faster.
    """
    return chip_named(backend.device_name()) if backend.on_metal() else None


def by_bandwidth() -> dict[float, list[str]]:
    """Return the chips with each bandwidth, the slowest first."""
    chips = sorted(BANDWIDTHS, key=BANDWIDTHS.__getitem__)
    return {speed: list(same) for speed, same in groupby(chips, BANDWIDTHS.__getitem__)}


def published_shares() -> dict[int, float]:
    """Return the share of the bandwidth that mlx-lm used where it was measured, by bits."""
    config, work = published_model_config(_PUBLISHED_SIZE), Workload(_PUBLISHED_CONTEXT)

    def share(bits: int, tokens_per_second: float) -> float:
        fmt = Format(bits, 64) if bits < 16 else None
        read = bytes_read_per_token(config, lambda path: fmt, work)
        return tokens_per_second * read / (BANDWIDTHS[_PUBLISHED_CHIP] * 1e9)

    return {bits: share(bits, speed) for bits, speed in _PUBLISHED.items()}


def published() -> str:
    """Return the same as a sentence."""
    shares = published_shares()
    others = ", ".join(f"{bits} bits {share:.0%}" for bits, share in shares.items() if bits != 4)
    return (
        f"mlx-lm, measured: {shares[4]:.0%} of it for {_PUBLISHED_SIZE} in 4 bits on an "
        f"{_PUBLISHED_CHIP} ({others})"
    )
