"""Conversations: their history, their second turn, and what happens at their edges."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3_mlx import LLM, ContextError, Finish, Qwen3Error, SamplingParams, load
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.sizes import published_config, with_yarn
from tests.api.harness import settle
from tests.support import TINY, write_tiny
from tests.text.harness import calculator

GREEDY = SamplingParams(temperature=0)
QUESTIONS = ["What is 123 + 456?", "What is 5 + 6?", "Who are you?", "What is 99 + 1?"]


@pytest.mark.heavy
def test_a_conversation_is_what_chat_makes_of_its_messages(demo: LLM) -> None:
    conversation = demo.conversation(system="You are brief.", sampling=GREEDY)
    for question in QUESTIONS[1:]:
        history = [*conversation.messages, {"role": "user", "content": question}]
        expected = demo.chat(history, sampling=GREEDY)
        reply = conversation.chat(question)
        assert (reply.text, reply.reasoning) == (expected.text, expected.reasoning)
        assert conversation.messages == [*history, *reply.messages]
        assert conversation.messages[-1]["reasoning_content"] == reply.reasoning


@pytest.mark.heavy
@pytest.mark.parametrize("thinking", [True, False])
def test_the_next_turn_reads_the_new_message_only(demo: LLM, thinking: bool) -> None:
    settle(demo)
    demo.forget()
    conversation = demo.conversation(thinking=thinking, sampling=GREEDY)
    conversation.chat(QUESTIONS[0])
    for question in QUESTIONS[1:]:
        settle(demo)
        usage = conversation.chat(question).usage
        read = usage.prompt_tokens - usage.cached_tokens
        # Without thinking the empty block of the prompt is read, too.
        assert read <= len(demo.tokenizer.encode(question)) + (8 if thinking else 12)


def test_without_idle_work_the_answer_is_read_again(demo: LLM) -> None:
    settle(demo)
    demo.forget()
    conversation = demo.conversation(sampling=GREEDY, prefetch_next_turn=False)
    first = conversation.chat(QUESTIONS[0])
    settle(demo)
    second = conversation.chat(QUESTIONS[1])
    assert second.usage.cached_tokens == first.usage.prompt_tokens
    asked = demo.chat(QUESTIONS[2], sampling=GREEDY)
    assert asked.usage.cached_tokens < 10


@pytest.mark.heavy
def test_idle_work_changes_nothing_and_yields(demo: LLM) -> None:
    conversation = demo.conversation(sampling=GREEDY)
    conversation.chat(QUESTIONS[0])
    at_once = conversation.chat(QUESTIONS[1])  # perhaps while the idle work runs
    demo.forget()
    plain = demo.conversation(sampling=GREEDY, prefetch_next_turn=False)
    plain.chat(QUESTIONS[0])
    assert plain.chat(QUESTIONS[1]).text == at_once.text


def test_after_calls_of_tools_the_thinking_stays(demo: LLM) -> None:
    conversation = demo.conversation(tools=[calculator], thinking=True, sampling=GREEDY)
    reply = conversation.chat("What is 1234 + 4321?")
    assert reply.finish_reason == "tool_calls"
    settle(demo)
    conversation.messages.append(
        {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "5555"}
    )
    usage = conversation.chat().usage
    seen = reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert usage.cached_tokens >= seen - 2
    assert conversation.messages[-1]["role"] == "assistant"


def test_a_call_that_is_not_whole_is_not_made(demo: LLM) -> None:
    """By this program none gets into the history; by others it may."""
    made = []

    def note(words: str = "") -> str:
        """Note something."""
        made.append(words)
        return "noted"

    history: list[dict[str, Any]] = [
        {"role": "user", "content": "Note it."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": name, "type": "function", "function": {"name": "note", "arguments": written}}
                for name, written in (("a", '{"words": "12'), ("b", ""), ("c", "[1]"), ("d", None))
            ],
        },
    ]
    talk = demo.conversation(messages=history)
    talk.answer_calls([note])
    assert not made
    assert [message["tool_call_id"] for message in talk.messages[2:]] == ["a", "b", "c", "d"]
    for message in talk.messages[2:]:
        assert message["content"].startswith("Error: the arguments are not a whole JSON object")


def test_retry_edit_and_branch(demo: LLM) -> None:
    conversation = demo.conversation(sampling=GREEDY, thinking=False)
    first = conversation.chat("What is 5 + 6?")
    branch = conversation.branch()
    conversation.chat("What is 1 + 2?")
    early = conversation.branch(0)
    assert early.messages == []
    for _ in conversation.retry(seed=1):
        pass
    assert [m["content"] for m in conversation.messages[::2]] == [
        "What is 5 + 6?",
        "What is 1 + 2?",
    ]
    for _ in conversation.edit("What is 2 + 2?", turn=0):
        pass
    assert [m["content"] for m in conversation.messages] == ["What is 2 + 2?", "2 + 2 = 4"]
    assert [m["content"] for m in branch.messages] == ["What is 5 + 6?", first.text]
    with pytest.raises(ValueError, match="there is no turn 5: the conversation has 1"):
        conversation.edit("What?", turn=5)
    with pytest.raises(ValueError, match="there is nothing to reply to"):
        conversation.chat()
    with pytest.raises(ValueError, match="nothing has been asked yet"):
        early.retry()


def test_what_is_cancelled_stays_and_what_fails_does_not(demo: LLM) -> None:
    conversation = demo.conversation(thinking=False, sampling=GREEDY)
    stream = conversation.stream("Who are you?")
    next(stream)
    with pytest.raises(Qwen3Error, match="the last reply is not finished"):
        conversation.stream("Hello?")
    with pytest.raises(Qwen3Error, match="the last reply is not finished"):
        conversation.retry()
    stream.close()
    *_, last = stream
    assert isinstance(last, Finish) and last.reason == "cancelled"
    said = conversation.messages[-1]["content"]
    assert said and "I am a tiny demo model: I can add, repeat".startswith(said[:5])
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="logit_bias"):
        conversation.chat("Hi", sampling=SamplingParams(logit_bias={-1: 1.0}))
    with pytest.raises(TypeError):
        conversation.chat("Hi", seed="x")  # type: ignore[arg-type]
    assert conversation.messages == before
    with pytest.raises(ValueError, match="max_tokens"):
        demo.conversation(max_tokens=0)


def test_a_conversation_is_saved_and_read(demo: LLM, tmp_path: Path) -> None:
    conversation = demo.conversation(system="Brief!", sampling=GREEDY)
    conversation.chat("123 + 456 等于多少？")
    file = tmp_path / "talk.json"
    conversation.save(file)
    assert "等于" in file.read_text(encoding="utf-8") and file.stat().st_mode & 0o077 == 0
    again = demo.conversation(file=file, sampling=GREEDY)
    assert again.messages == conversation.messages
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    file.write_text("{}")
    with pytest.raises(Qwen3Error, match="is not a saved conversation"):
        demo.conversation(file=file)
    file.write_text(json.dumps({"version": 9, "messages": []}))
    with pytest.raises(Qwen3Error, match="written by another version of qwen3-mlx"):
        demo.conversation(file=file)
    with pytest.raises(Qwen3Error, match="there is no file .*none.json"):
        demo.conversation(file=tmp_path / "none.json")
    with pytest.raises(OSError, match="No such file or directory: '.*no/talk.json'$"):
        conversation.save(tmp_path / "no" / "talk.json")
    with pytest.raises(Qwen3Error, match=f"^{tmp_path} cannot be read: Is a directory$"):
        demo.conversation(file=tmp_path)


# --- long contexts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tiny(tmp_path_factory.mktemp("short"))
    with load(folder, context=200) as llm:
        yield llm


def test_a_context_can_be_bounded(short: LLM) -> None:
    with pytest.raises(ContextError, match="the context window is 200; shorten the prompt"):
        short.chat("Hello " * 300)
    assert short.chat("Hi", seed=1).usage.completion_tokens < 200
    for wrong in (0, -1, "4k", True):
        with pytest.raises(ValueError, match="context must be a number of tokens"):
            load(context=wrong)  # type: ignore[arg-type]


@pytest.mark.heavy
def test_the_oldest_turns_are_dropped_on_request(short: LLM) -> None:
    conversation = short.conversation(system="Be brief.", max_tokens=20, thinking=False, seed=1)
    with pytest.raises(ContextError):
        for number in range(20):
            conversation.chat(f"Tell me about number {number}.")
    assert conversation.messages[-1]["role"] == "assistant"  # as before the turn that failed
    going_on = short.conversation(
        messages=conversation.messages, max_tokens=20, thinking=False, seed=1, drop_oldest=True
    )
    told = [going_on.chat(f"Tell me about number {number}.").details for number in range(4)]
    assert {"dropped_turns": "1"} in told
    roles = [message["role"] for message in going_on.messages]
    assert roles[:2] == ["system", "user"]
    free = short.conversation(thinking=False, seed=1, drop_oldest=True)
    for number in range(2):
        reply = free.chat(f"Tell me about number {number}.")
        assert reply.usage.completion_tokens >= 20 or reply.finish_reason == "stop"
    with pytest.raises(ContextError):
        going_on.chat("Hello " * 300)


def test_yarn_is_switched_on_for_those_it_is_published_for() -> None:
    config = published_config("8B")
    assert with_yarn(config, 40960) == config
    long = ModelConfig.from_dict(with_yarn(config, 131072))
    assert long.yarn and long.yarn.factor == 4 and long.context_window == 131072
    assert long.yarn.original_max_position_embeddings == 32768
    double = ModelConfig.from_dict(with_yarn(config, 65536))
    assert double.yarn and double.yarn.factor == 2
    with pytest.raises(Qwen3Error, match=r"is beyond this model: .* 40,960, and with YaRN 131,072"):
        with_yarn(config, 131073)
    with pytest.raises(Qwen3Error, match="its window is 40,960$"):
        with_yarn(published_config("0.6B"), 65536)
    with pytest.raises(Qwen3Error, match="its window is 2,048$"):
        with_yarn(TINY, 4096)


def test_a_context_that_memory_cannot_hold_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, whole_memory: None
) -> None:
    monkeypatch.setattr("qwen3_mlx.backend.available_memory", lambda: 530_000_000)
    load(tiny_folder, context=64).close()
    monkeypatch.setattr("qwen3_mlx.backend.available_memory", lambda: 1_000)
    with pytest.raises(Qwen3Error, match=r"with 2,000 tokens; .*a shorter context than 2,000 may"):
        load(tiny_folder, context=2000)
