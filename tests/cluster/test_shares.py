"""Shares of a network: computed together they are the network, and each has its own bytes alone."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen3_mlx import convert
from qwen3_mlx.cache.attention import NoCache
from qwen3_mlx.checkpoint.description import fetch_weights
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.shard import Share, open_share
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.cluster.part import PartQwen3
from qwen3_mlx.cluster.shares import Host, Model, divide, pipeline, tensor
from qwen3_mlx.engine.memory import Workload
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.linear import whole
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import SIZES, published_model_config
from tests.cluster.harness import Ranks
from tests.golden import twins
from tests.model.test_parity import CASES, golden

FLOAT32 = LoadOptions(mx.float32, dequantize=False)


def load_whole(folder: Path) -> Qwen3:
    config = read_json(folder / "config.json")
    return load_model(config, Weights(folder), FLOAT32, lambda *_: None)


def load_share(folder: Path, share: Share, reduce: Callable[[mx.array], mx.array]) -> PartQwen3:
    config, weights = open_share(
        folder, read_json(folder / "config.json"), mx.float32, share, in_floats=False
    )
    group: Any = None  # what would be summed in it, `reduce` sums
    build = partial(PartQwen3, share=share, group=group)
    model = load_model(config, weights, FLOAT32, lambda *_: None, build=build)
    assert isinstance(model, PartQwen3)
    for layer in model.layers:
        layer.self_attn.reduce = layer.mlp.reduce = reduce
    return model


def run_tensor(folder: Path, shares: Sequence[Share], ids: mx.array) -> list[Any]:
    ranks = Ranks(len(shares))
    tokens = np.array(ids)

    def job(rank: int) -> mx.array:
        model = load_share(folder, shares[rank], ranks.reduce(rank))
        return model(mx.array(tokens))

    return ranks.run([partial(job, rank) for rank in range(len(shares))])


def run_pipeline(folder: Path, shares: Sequence[Share], ids: mx.array) -> mx.array:
    x: Any = None
    for share in reversed(shares):
        model = load_share(folder, share, whole)
        x = model.model.embed_tokens(ids) if share.is_first else x
        _, x = model.model.after_embedding(x, [NoCache()] * len(model.layers), None)
    return model.head(x)


@pytest.fixture(scope="module")
def quantized_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "demo"
    convert("demo", folder, bits=4, group_size=32)
    return folder


def folders_of(case: Path, tmp_path: Path) -> tuple[Path, mx.array]:
    config, expected = golden(case)
    twins.write_checkpoint(config, tmp_path, shards=3)
    return tmp_path, mx.array([expected["ids"].tolist()])


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_goldens_in_parts(case: Path, tmp_path: Path) -> None:
    folder, ids = folders_of(case, tmp_path)
    network = ModelConfig.from_dict(read_json(folder / "config.json"))
    expected = np.array(load_whole(folder)(ids))
    count = network.num_hidden_layers
    for counts in ((1, count - 1), (count - 1, 1), (1, 1, count - 2)):
        if min(counts) > 0:
            staged = np.array(run_pipeline(folder, pipeline(network, counts), ids))
            assert (staged == expected).all(), counts
    for ranks in range(2, min(network.num_key_value_heads, 3) + 1):
        found = run_tensor(folder, tensor(network, [1] * ranks), ids)
        assert all((one == found[0]).all() for one in found)  # all ranks have the same sums
        assert np.abs(found[0] - expected).max() <= 1e-5 * np.abs(expected).max(), ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_demo_in_4_bits(quantized_demo: Path, ranks: int) -> None:
    network = ModelConfig.from_dict(read_json(quantized_demo / "config.json"))
    ids = mx.array([[5, 9, 700, 3, 81]])
    model = load_whole(quantized_demo)
    expected = np.array(model(ids))
    counts = [1] * (ranks - 1) + [network.num_hidden_layers - ranks + 1]
    found = np.array(run_pipeline(quantized_demo, pipeline(network, counts), ids))
    assert (found == expected).all()
    if ranks <= network.num_key_value_heads:
        for one in run_tensor(quantized_demo, tensor(network, [1] * ranks, 32), ids):
            assert np.abs(one - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_uneven_tensor_split_sums_to_the_whole(tmp_path: Path) -> None:
    """Three heads for one rank and two for another, as of eight heads on three ranks."""
    folder, ids = folders_of(next(case for case in CASES if case.stem == "heads_64_8"), tmp_path)
    network = ModelConfig.from_dict(read_json(folder / "config.json"))
    shares = tensor(network, [1] * 3)
    assert [share.heads for share in shares] == [(0, 3), (3, 5), (5, 8)]
    expected = np.array(load_whole(folder)(ids))
    for one in run_tensor(folder, shares, ids):
        assert np.abs(one - expected).max() <= 1e-5 * np.abs(expected).max()


def test_parts_are_fused_and_keep_the_path_of_a_single_token(tmp_path: Path) -> None:
    folder, _ = folders_of(CASES[0], tmp_path)
    network = ModelConfig.from_dict(read_json(folder / "config.json"))
    model = load_share(folder, tensor(network, [1] * 2)[1], whole)
    for layer in model.layers:
        assert layer.self_attn.fused and layer.self_attn.fused.holds(layer.self_attn)


def test_a_stage_reads_its_own_files_alone(tmp_path: Path) -> None:
    """The others are not even there."""
    folder, ids = folders_of(next(case for case in CASES if case.stem == "moe"), tmp_path)
    config = read_json(folder / "config.json")
    network = ModelConfig.from_dict(config)
    expected = np.array(load_whole(folder)(ids))
    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    shares = pipeline(network, [1, network.num_hidden_layers - 1])
    x: Any = None
    kept = {file: (folder / file).read_bytes() for file in set(index.values())}
    for share in reversed(shares):
        has = share.has_tensor(network)
        own = {file for name, file in index.items() if has(name)}
        assert len(own) < len(kept)
        for file, content in kept.items():
            (folder / file).unlink(missing_ok=True)
            if file in own:
                (folder / file).write_bytes(content)
        model = load_share(folder, share, whole)
        x = model.model.embed_tokens(ids) if share.is_first else x
        _, x = model.model.after_embedding(x, [NoCache()] * len(model.layers), None)
    assert (np.array(model.head(x)) == expected).all()


def test_only_the_files_of_its_layers_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = folders_of(next(case for case in CASES if case.stem == "moe"), tmp_path)
    network = ModelConfig.from_dict(read_json(folder / "config.json"))
    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    place, asked = Source(str(folder)), list[str]()

    def fetch(self: Source, files: Sequence[str]) -> Path:
        asked.extend(files)
        return folder

    monkeypatch.setattr(Source, "fetch", fetch)
    for share in pipeline(network, [1, network.num_hidden_layers - 1]):
        asked.clear()
        has = share.has_tensor(network)
        fetch_weights(place, folder, wanted=has)
        assert sorted(asked) == sorted({file for name, file in index.items() if has(name)})
        assert len(asked) < len(set(index.values()))


@pytest.mark.parametrize("split", ["pipeline", "tensor"])
@pytest.mark.parametrize("kind", ["demo", "moe"])
def test_memory_of_a_share(split: str, kind: str, quantized_demo: Path, tmp_path: Path) -> None:
    """What a rank holds is its share, at most a large module more while it loads."""
    folder = quantized_demo
    if kind == "moe":
        folder, _ = folders_of(next(case for case in CASES if case.stem == "moe"), tmp_path)
    network = ModelConfig.from_dict(read_json(folder / "config.json"))
    if split == "tensor":
        shares = tensor(network, [1] * 2, 32 if kind == "demo" else 1)
    else:
        shares = pipeline(network, [1, network.num_hidden_layers - 1])
    fmt = Format(4, 32) if kind == "demo" else None
    model = Model("it", network, lambda path: fmt, Workload(16, itemsize=4))
    for share in shares:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        loaded = load_share(folder, share, whole)
        mx.eval(loaded.parameters())
        planned, held = model.plan(share).weights, loaded.nbytes
        assert abs(held - planned) <= 0.02 * planned
        assert mx.get_active_memory() - before <= 1.02 * held + 4096 * len(loaded.tensors())
        del loaded


def test_layers_follow_the_memory() -> None:
    network = published_model_config("32B")
    fmt = Format(4, 64)
    model = Model("32B", network, lambda path: fmt, Workload(4096))
    small, large = divide(model, [Host("a", 12_000_000_000), Host("b", 24_000_000_000)])
    assert small.layers[1] == large.count == 64 and large.layers[0] == 0
    assert small.layers[0] == large.layers[1]
    counts = [stop - start for start, stop in (small.layers, large.layers)]
    assert 17 <= counts[0] <= 23  # about a third
    stated = divide(model, [Host("a", 20 << 30), Host("b", 20 << 30)], layers=[40, 24])
    assert [share.layers for share in stated] == [(24, 64), (0, 24)]


def test_what_does_not_fit_is_refused_with_the_sums() -> None:
    model = Model("32B", published_model_config("32B"), lambda path: None, Workload(4096))
    hosts = [Host("mac1", 24_000_000_000), Host("mac2", 36_000_000_000)]
    message = r"32B does not fit with 4,096 tokens\. mac1: weights .* of 24\.0 GB; mac2: weights "
    with pytest.raises(Qwen3Error, match=message):
        divide(model, hosts)
    with pytest.raises(ValueError, match="layers must be a number for each of the 2 hosts.* 64 in"):
        divide(model, hosts, layers=[32, 31])
    with pytest.raises(ValueError, match="layers: they belong to a pipeline"):
        divide(model, hosts, "tensor", layers=[32, 32])
    with pytest.raises(ValueError, match="split must be pipeline or tensor, not 'rows'"):
        divide(model, hosts, "rows")


def test_parts_of_layers_are_even_unless_memory_forbids_it() -> None:
    fmt = Format(4, 64)
    model = Model("32B", published_model_config("32B"), lambda path: fmt, Workload(4096))
    for small, heads, columns in (
        (24, [(0, 4), (4, 8)], [(0, 12_800), (12_800, 25_600)]),
        (10, [(0, 2), (2, 8)], [(0, 6400), (6400, 25_600)]),
    ):
        hosts = [Host("mac1", small * 10**9), Host("mac2", 30 * 10**9)]
        shares = divide(model, hosts, "tensor")
        assert [share.heads for share in shares] == heads
        assert [share.columns for share in shares] == columns
    assert [share.heads for share in tensor(model.network, [1, 1000])] == [(0, 1), (1, 8)]


def test_tensor_cuts_at_whole_groups_only() -> None:
    network = published_model_config("30B-A3B")
    assert [share.expert_columns for share in tensor(network, [1] * 4, 64)][:2] == [
        (0, 192),
        (192, 384),
    ]
    for share in tensor(network, [1] * 4, 128):
        assert all(end % 128 == 0 for end in share.expert_columns)
    with pytest.raises(Qwen3Error, match="4 key/value heads cannot be divided among 5"):
        tensor(network, [1] * 5, 64)
    with pytest.raises(Qwen3Error, match="feed-forward columns cannot be divided among 4"):
        tensor(network, [1] * 4, 256)


@pytest.mark.parametrize("size", SIZES)
def test_shares_of_all_sizes_add_up(size: str) -> None:
    network = published_model_config(size)
    fmt = Format(4, 64)
    model = Model(size, network, lambda path: fmt, Workload(64))
    whole_of = model.plan(pipeline(network, [network.num_hidden_layers])[0]).weights
    stages = [
        model.plan(share).weights
        for share in pipeline(network, [3, 5, network.num_hidden_layers - 8])
    ]
    tied = fmt.nbytes((network.vocab_size, network.hidden_size), 2) * network.tie_word_embeddings
    assert sum(stages) == whole_of + tied
