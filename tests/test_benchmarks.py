"""What the benchmark counts, and that it can tell it."""

from benchmarks.__main__ import table
from benchmarks.graph import dispatches_per_layer


def test_a_decoded_token_takes_fewer_kernels_than_mlx_lms() -> None:
    count = dispatches_per_layer()
    assert count == {"ours": 16, "peer": 19}
    assert count["ours"] <= 0.85 * count["peer"]


def test_the_table_names_terms_and_ratios() -> None:
    pair = {"ours": 1.0, "peer": 2.0}
    speeds = {"decode": 0.5, "prefill": 0.01, "peak_memory": 1}
    loading = {"peak": 11, "result": 10, "files": 10, "largest tensor": 1}
    shown = table(
        {
            "machine": {"device": "cpu", "system": "Linux", "blas": "none"},
            "size": "0.6B",
            "date": "2026-01-01",
            "ours": speeds,
            "peer, equal terms": {name: 2 * value for name, value in speeds.items()},
            "sampling": pair,
            "start to first token": pair,
            "dispatches per layer": pair,
            "graph building": pair,
            "loading": {"4-bit": loading, "bits=4 from bf16": loading},
        }
    )
    assert "decode, tokens/s, equal terms" in shown
    assert shown.count("2.00x") == 6
    assert "1.10 x files" in shown
