"""A network that computes no numbers: its checkpoint is named, instead of garbage being said."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from qwen3_mlx import LLM, CheckpointError, SamplingParams, load
from qwen3_mlx.model.qwen3 import Qwen3
from tests.cli.conftest import no_terminal  # noqa: F401 - which acts on every test here
from tests.cli.harness import call
from tests.server.serving import serving
from tests.support import read_weights, write_tiny

GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=0.7, presence_penalty=0.5)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = write_tiny(tmp_path / "damaged")
    weights = read_weights(folder)
    norm = weights["model.norm.weight"]
    weights["model.norm.weight"] = norm.at[5].add(mx.nan)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture
def own(tiny_folder: Path) -> Iterator[LLM]:
    """The tiny checkpoint, to be damaged."""
    with load(tiny_folder) as llm:
        yield llm


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_the_first_logits_are_checked(damaged: Path, sampling: SamplingParams) -> None:
    with load(damaged) as llm:
        for _ in range(2):  # nothing of it is kept
            with pytest.raises(CheckpointError) as raised:
                llm.chat("Hello", sampling=sampling, max_tokens=4)
            assert str(raised.value) == (
                f"the logits of {damaged} have NaN or infinity among them, so it cannot choose a "
                "token: its weights are damaged, or computing exceeds the range of float32; "
                "download or convert it again"
            )
        with pytest.raises(CheckpointError, match="have NaN or infinity"):
            llm.complete("Once", max_tokens=4)
        with pytest.raises(CheckpointError, match="have NaN or infinity"):
            llm.batch(["Hello", "You"], max_tokens=4)


@pytest.mark.heavy
def test_the_command_says_so_in_one_line(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["Hello", "--model", str(damaged), "--dtype", "float16"]
    code, out, err = call(arguments, capsys)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "have NaN or infinity" in err
    assert "of float16; download or convert it again, or load it with --dtype float32\n" in err


def spoil(model: Qwen3) -> mx.array:
    """Make a network compute infinities from now on."""
    model.model.norm.weight = model.model.norm.weight * mx.inf
    return model.model.norm.weight


@pytest.mark.parametrize("thinking", [True, False])
def test_they_are_checked_again_when_a_reply_goes_in_circles(
    own: LLM, thinking: bool, short_circles: None
) -> None:
    with own.stream("Hello", thinking=thinking, sampling=GREEDY, max_tokens=1500) as stream:
        next(stream)
        own.compute(spoil)
        with pytest.raises(CheckpointError, match="have NaN or infinity among them"):
            list(stream)


def test_circles_of_a_sound_network_are_no_damage(own: LLM, short_circles: None) -> None:
    bias = SamplingParams(temperature=0.0, logit_bias={50: 1000.0})
    reply = own.chat("Hello", thinking=False, sampling=bias, max_tokens=1500)
    assert reply.finish_reason == "stop"


def test_a_form_that_fails_with_the_network_names_the_checkpoint(own: LLM) -> None:
    long = {"type": "array", "items": {"type": "integer"}, "minItems": 200}
    with own.stream("Hello", thinking=False, schema=long, max_tokens=900) as stream:
        next(stream)
        own.compute(spoil)
        with pytest.raises(CheckpointError, match="have NaN or infinity among them"):
            list(stream)


def test_clients_are_not_told_to_try_again(damaged: Path) -> None:
    with load(damaged) as llm, serving(llm) as served:
        response = served.chat("Hello", max_tokens=4)
        assert response.status_code == 500 and "have NaN or infinity" in response.text
