"""Loading by a hub's name, from a hub of our own on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.checkpoint.harness import GIVEN, Hub, qwen3, serving, shards_of, with_head
from tests.support import DEMO, read_weights

GOLDEN = Path(__file__).parents[1] / "golden/formats"


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the tiny checkpoint."""
    with serving(tiny_folder) as running:
        yield running


def command(
    *arguments: str, home: Path, endpoint: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as users do, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qwen3_mlx", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={
            "PATH": "",
            "QWEN3_HOME": os.environ["QWEN3_HOME"],  # not the user's conversations
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "NO_PROXY": "*",
            **more,
        },
    )


def ask(name: str, home: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    return qwen3("Hello", "-n", "4", "-q", "--model", name, home=home, endpoint=endpoint)


@pytest.mark.heavy
def test_only_the_files_needed_are_downloaded_once(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = hub
    words = ("Hello", "-n", "4", "-q", "--model", "someone/tiny")
    done = qwen3(*words, home=tmp_path, endpoint=address)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(asked) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    asked.clear()
    again = command(*words, home=tmp_path, endpoint=address, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stderr) == (0, "")
    assert asked == []


def test_planning_fetches_the_config_alone(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    done = qwen3("plan", "someone/tiny", home=tmp_path, endpoint=address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("someone/tiny: 0.2 million weights")
    assert asked == ["config.json"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "offline", "complaint"),
    [
        ("someone/other", "0", "the hub has no someone/other, or it is private"),
        ("someone/tiny", "1", "is not downloaded yet and the hub cannot be reached"),
    ],
)
def test_what_the_hub_cannot_give(
    name: str, offline: str, complaint: str, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    if offline == "1":
        words = ("Hello", "-q", "--model", name)
        done = command(*words, home=tmp_path, endpoint=hub[0], HF_HUB_OFFLINE=offline)
    else:
        done = ask(name, tmp_path, hub[0])
    assert done.returncode == 1
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


class Doorkeeper(Hub):
    """Lets nothing through."""

    status: int
    page: bytes

    def _answer(self, *, body: bool) -> None:
        self._send(self.page if body else b"", status=self.status, length=len(self.page))


@pytest.mark.parametrize(
    ("status", "page", "complaint"),
    [
        (401, b'{"error": "Invalid"}', "the hub refuses the token; `hf auth login` takes another"),
        (
            200,
            b"<html>Sign in</html>",
            "the server that answers is not a hub; check HF_ENDPOINT, or sign in",
        ),
    ],
)
def test_a_hub_that_lets_nothing_through(
    status: int, page: bytes, complaint: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with serving(tiny_folder, Doorkeeper, status=status, page=page) as (address, _):
        done = ask("someone/tiny", tmp_path, address)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"qwen3: downloading someone/tiny failed: {complaint}")


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    done = ask("someone/tiny", tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1


def test_converting_by_name_and_uploading(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    output = tmp_path / "made"
    arguments = ("convert", "someone/tiny", str(output), "--upload-to", "me/made")
    done = qwen3(*arguments, home=tmp_path / "home", endpoint=address)
    assert done.returncode == 0, done.stderr
    assert f"{address}/me/made/commit/1" in done.stdout.replace("\n", "")
    assert "pytorch_model.bin" not in asked
    assert {name: (output / name).read_bytes() for name in GIVEN} == GIVEN
    assert set(GIVEN) == {file.name for file in output.iterdir()}
    assert b"base_model: someone/tiny" in GIVEN["README.md"]


def test_an_upload_that_fails_is_one_line(tmp_path: Path) -> None:
    arguments = ("convert", str(DEMO), str(tmp_path / "made"), "--upload-to")
    done = qwen3(*arguments, "me/made", home=tmp_path, endpoint="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("qwen3: uploading to me/made failed: ")
    assert (tmp_path / "made" / "config.json").is_file()  # what was made stays
    done = qwen3(*arguments, "no name", "--force", home=tmp_path, endpoint="http://127.0.0.1:9")
    assert done.stderr.startswith("qwen3: 'no name' is no hub name")
    other = ("convert", str(DEMO), str(tmp_path / "other"), "--upload-to", "no name")
    assert qwen3(*other, home=tmp_path, endpoint="http://127.0.0.1:9").returncode == 1
    assert not (tmp_path / "other").exists()  # said before any work


def edited(source: Path, folder: Path, **config: object) -> Path:
    """Copy a checkpoint, and change its config.json."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


@pytest.mark.parametrize("verb", ["ask", "convert", "plan", "eval"])
def test_what_is_not_read_is_refused_before_its_weights_are_fetched(
    verb: str, tiny_folder: Path, tmp_path: Path
) -> None:
    section = {"quant_method": "hqq"}
    folder = edited(tiny_folder, tmp_path / "hqq", quantization_config=section)
    arguments = {
        "ask": ["Hello", "--model", "someone/tiny"],
        "convert": ["convert", "someone/tiny", str(tmp_path / "out")],
        "plan": ["plan", "someone/tiny"],
        "eval": ["eval", "perplexity", "someone/tiny"],
    }[verb]
    with serving(folder) as (address, asked):
        done = qwen3(*arguments, home=tmp_path / "home", endpoint=address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (  # behind the bars of what is fetched
        "qwen3: config.json: the weights are quantized as 'hqq', which is not read (FP8, AWQ, "
        "GGUF, GPTQ, AutoRound, bitsandbytes, compressed-tensors and MLX's own formats are); take "
        "the original weights, or a build for MLX such as Qwen/Qwen3-8B-MLX-4bit"
    )
    assert "config.json" in asked
    assert not [name for name in asked if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_algo": "FP8"}, "config.json: the weights are quantized without quant_method ("),
        (
            {"quant_type": "int4_weight_only"},
            "without quant_method (quant_type), which is not read",
        ),
        ({"bits": 4, "group_size": 128, "sym": True}, "(bits, group_size, sym), which is not read"),
        (None, "hf_quant_config.json: the weights are quantized as modelopt's NVFP4, which is not"),
    ],
)
@pytest.mark.parametrize("verb", ["ask", "plan", "convert"])
def test_a_quantization_of_no_name_is_refused_unfetched(
    verb: str, section: dict[str, object] | None, words: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = edited(tiny_folder, tmp_path / "quantized", quantization_config=section)
    if section is None:
        stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    arguments = {
        "ask": ["Hello", "--model", "someone/tiny"],
        "convert": ["convert", "someone/tiny", str(tmp_path / "out")],
        "plan": ["plan", "someone/tiny"],
    }[verb]
    with serving(folder) as (address, asked):
        done = qwen3(*arguments, home=tmp_path / "home", endpoint=address)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr.splitlines()[-1]
    assert "take the original weights, or a build for MLX" in done.stderr
    assert not [name for name in asked if name.endswith(".safetensors")]


@pytest.mark.parametrize("kind", ["adapter", "adapter's weights"])
def test_a_name_that_is_no_whole_checkpoint_says_what_it_is(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    names = {"adapter": "adapter_config.json", "adapter's weights": "adapter_model.safetensors"}
    (folder / names[kind]).write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    with serving(folder) as (address, asked):
        done = qwen3("Hello", "--model", "someone/tiny", home=tmp_path / "home", endpoint=address)
    assert done.returncode == 1
    expected = {
        "adapter": "someone/tiny is an adapter for Qwen/Qwen3-8B, not a whole model",
        "adapter's weights": "someone/tiny is an adapter for another model, not a whole model",
    }
    assert expected[kind] in done.stderr.splitlines()[-1]
    assert not [name for name in asked if name.endswith(".safetensors")]
    if kind == "adapter's weights":  # nothing is fetched, so there is no bar either
        assert done.stderr.count("\n") == 1


@pytest.mark.heavy
def test_one_gguf_file_of_several_is_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(next((GOLDEN / "gguf_narrow_q4_k_m").glob("*.gguf")), folder / "tiny-Q4_K_M.gguf")
    (folder / "tiny-Q8_0.gguf").write_bytes(b"GGUF")
    arguments = ("Hi", "--max-tokens", "2")
    with serving(folder) as (address, asked):
        options: Any = {"home": tmp_path / "home", "endpoint": address}
        vague = qwen3(*arguments, "--model", "someone/tiny", **options)
        done = qwen3(*arguments, "--model", "someone/tiny:Q4_K_M", **options)
        got = {name for name in asked if name.endswith(".gguf")}
        asked.clear()
        again = command(*arguments, "--model", "someone/tiny:Q4_K_M", HF_HUB_OFFLINE="1", **options)
    assert vague.returncode == 1
    assert "someone/tiny has tiny-Q4_K_M.gguf, tiny-Q8_0.gguf; name one of them" in vague.stderr
    assert done.returncode == 0, done.stderr
    assert again.returncode == 0, again.stderr
    assert (got, asked) == ({"tiny-Q4_K_M.gguf"}, [])


@pytest.mark.parametrize("verb", ["plan", "convert", "bench", "eval"])
def test_what_has_no_config_is_refused_in_one_line(verb: str, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "model.bin").write_text("")
    arguments = {
        "plan": ["plan", "someone/tiny"],
        "convert": ["convert", "someone/tiny", str(tmp_path / "out"), "--report"],
        "bench": ["bench", "someone/tiny"],
        "eval": ["eval", "divergence", str(DEMO), "someone/tiny", "--tokens", "10"],
    }[verb]
    with serving(folder) as (address, _):
        done = qwen3(*arguments, home=tmp_path / "home", endpoint=address)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("qwen3: someone/tiny has no config.json")
    assert "No files matched" not in done.stderr and "Fetching" not in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "hf.co/Qwen/Qwen3-8B",
        "https://huggingface.co/Qwen/Qwen3-8B",
        "https://huggingface.co/Qwen/Qwen3-8B/tree/main",
    ],
)
def test_an_address_of_the_hub_is_no_name(name: str, tmp_path: Path) -> None:
    done = ask(name, tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr == f"qwen3: {name} is an address; give the name alone, Qwen/Qwen3-8B\n"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapters.safetensors"])
def test_the_file_of_an_adapter_says_what_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    done = ask(str(tmp_path / name), tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "is of an adapter for another model, not a whole model; load that" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_index_of_files_that_are_gone(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "stale")
    shard = "model-00001-of-00002.safetensors"
    index = {"weight_map": dict.fromkeys(read_weights(folder), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with serving(folder) as (address, asked):
        done = ask("someone/tiny", tmp_path / "home", address)
    assert done.returncode == 0, done.stderr
    assert "names files that are not there; model.safetensors is read" in done.stderr
    assert asked.count("model.safetensors") == 1


def test_a_broken_index_beside_whole_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "broken")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.bin"}}')
    with serving(folder) as (address, asked):
        done = ask("someone/tiny", tmp_path / "home", address)
    assert done.returncode == 0, done.stderr
    assert "names x.bin, and only safetensors files are read; model.safetensors is" in done.stderr
    assert asked.count("model.safetensors") == 1


def test_a_variant_beside_whole_weights_is_not_fetched(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "variant")
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    with serving(folder) as (address, asked):
        done = ask("someone/tiny", tmp_path / "home", address)
    assert done.returncode == 0, done.stderr
    assert "model.fp16.safetensors" not in asked


@pytest.mark.parametrize("index", [True, False])
def test_shards_beside_whole_weights_are_refused_unfetched(
    index: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = edited(tiny_folder, tmp_path / "two")
    shards_of(folder, index=index)
    with serving(folder) as (address, asked):
        done = ask("someone/tiny", tmp_path / "home", address)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "qwen3: someone/tiny has model.safetensors and model-00001-of-00002.safetensors, which are "
        "not parts of one set of weights; give a folder without the files that do not belong to "
        "this checkpoint"
    )
    assert not [name for name in asked if name.endswith(".safetensors")]


def test_shards_without_an_index_are_fetched(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "shards")
    shards_of(folder, index=False)
    (folder / "model.safetensors").unlink()
    with serving(folder) as (address, asked):
        done = ask("someone/tiny", tmp_path / "home", address)
    assert done.returncode == 0, done.stderr
    assert len([name for name in asked if name.endswith(".safetensors")]) == 2


def test_planning_says_that_a_head_may_be_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_folder, tmp_path / "shards")
    weights = read_weights(folder)
    weights["lm_head.weight"] = 2 * weights["model.embed_tokens.weight"]
    shard = "model-00001-of-00001.safetensors"
    mx.save_safetensors(str(folder / shard), weights)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with serving(folder) as (address, asked):
        done = qwen3("plan", "someone/tiny", home=tmp_path / "home", endpoint=address)
    assert done.returncode == 0, done.stderr
    assert "ties the head to the embedding, but there is an lm_head" in done.stderr
    assert sorted(asked) == ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("index", ["stale", "broken"])
def test_planning_says_nothing_of_a_head_that_is_not_known(
    index: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = edited(tiny_folder, tmp_path / "whole")
    names = dict.fromkeys(("lm_head.weight",), "model-00001-of-00001.safetensors")
    text = json.dumps({"weight_map": names}) if index == "stale" else "{"
    (folder / "model.safetensors.index.json").write_text(text)
    with serving(folder) as (address, _):
        done = qwen3("plan", "someone/tiny", home=tmp_path / "home", endpoint=address)
    assert done.returncode == 0, done.stderr
    assert "lm_head" not in done.stderr


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("model.pt", "model.pt, pytorch_model.bin, but only safetensors and GGUF files are read"),
        ("adapter_config.json", "is an adapter for another model, not a whole model"),
    ],
)
def test_planning_refuses_weights_that_are_not_read(
    file: str, complaint: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = edited(tiny_folder, tmp_path / "other", tie_word_embeddings=False)
    (folder / "model.safetensors").unlink()
    (folder / file).write_text("{}")
    with serving(folder) as (address, _):
        done = qwen3("plan", "someone/tiny", home=tmp_path / "home", endpoint=address)
        load = qwen3("Hi", "--model", "someone/tiny", home=tmp_path / "home", endpoint=address)
    assert (done.returncode, done.stdout) == (1, "")
    assert complaint in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1] == load.stderr.splitlines()[-1]


def test_a_head_of_its_own_is_seen_when_it_has_been_fetched(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = with_head(tiny_folder, tmp_path / "own", like="other")
    with serving(folder) as (address, _):
        said = [ask("someone/tiny", tmp_path / "home", address).stderr for _ in range(2)]
    for stderr in said:  # fetched first, and here the second time
        assert stderr.count("lm_head holds other numbers; it is used") == 1
