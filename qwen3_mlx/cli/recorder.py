"""Records a conversation while it goes on: each message, and a reply as far as it has come."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from difflib import SequenceMatcher
from pathlib import Path
from threading import RLock, Timer
from typing import Self

from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.conversation_log import ConversationLog, Message, Row
from qwen3_mlx.model.sizes import DEMO, hub_name, is_demo, size_named
from qwen3_mlx.text.events import Event, Reasoning, Text

_FLUSH_SECONDS = 0.5  # from a piece of a reply to its place on the disk, at most


class Recorder:
    """Records one conversation as it goes on; a failure is reported once, and ends the recording.

    A new conversation is in the log from its first message on. Without a log nothing is recorded.
    """

    def __init__(
        self,
        log: ConversationLog | None,
        model: str | None,
        *,
        adapter: str = "",
        conversation: int | None = None,
    ) -> None:
        """Record a new conversation with a model, or one of the log that goes on."""
        self._log = log
        self.model, self.adapter = model, adapter
        self.conversation = conversation
        self._stored: list[Row] = []
        self._last: int | None = None
        if log and conversation is not None:
            self._stored, self._last = log.rows(conversation), log.last_id(conversation)
        self._has_partial = False  # the last of those stored is a reply that has not ended
        self._history: list[str] = []
        self._pieces: list[Event] = []  # of a reply that has not ended
        self._timer: Timer | None = None
        self._lock = RLock()
        self._failure: Exception | None = None

    @property
    def is_recording(self) -> bool:
        """True if what is said is recorded."""
        return self._log is not None

    def another(self, conversation: int | None = None) -> "Recorder":
        """Return a recorder of a new conversation, or of one of the log that goes on."""
        log = self._log and ConversationLog(self._log.path)
        return Recorder(log, self.model, adapter=self.adapter, conversation=conversation)

    def record(self, messages: Sequence[Message]) -> None:
        """Record the conversation as it is now: after each message, and after a reply has ended."""
        if self.conversation is None and all(message["role"] == "system" for message in messages):
            return
        with self._lock:
            self._history = [json.dumps(message, ensure_ascii=False) for message in messages]
            self._pieces = []
            self._write()
        if self._failure and self._log:
            note(f"qwen3: the conversation is not recorded: {self._failure}")
            self.close()

    def add(self, event: Event) -> None:
        """Record a piece of the reply; what is shown is on the disk within a second."""
        if self._log is None:
            return
        with self._lock:
            self._pieces.append(event)
            if self._timer is None:
                self._timer = Timer(_FLUSH_SECONDS, self._write)
                self._timer.daemon = True
                self._timer.start()

    def recorded(self, events: Iterable[Event]) -> Iterator[Event]:
        """Yield the events of a reply, each recorded before it is shown."""
        for event in events:
            self.add(event)
            yield event

    def close(self) -> None:
        """Record what is left, and close the log."""
        with self._lock:
            if self._pieces:
                self._write()
            if self._log:
                self._log.close()
                self._log = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        """Store the history and the reply as far as it came, from any thread."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
                self._timer = None
            if self._log is None or self._failure:
                return
            bodies = list(self._history)
            if self._pieces:
                bodies.append(json.dumps(_partial_message(self._pieces), ensure_ascii=False))
            try:
                with self._log.transaction() as database:
                    self._store(database, self._log, bodies)
            except (sqlite3.Error, ValueError) as error:  # a full disk, or what is no Unicode
                self._failure = error

    def _store(self, database: sqlite3.Connection, log: ConversationLog, bodies: list[str]) -> None:
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        conversation, kept = self.conversation, list(self._stored)
        if conversation is None or log.last_id(conversation) != self._last:
            # Another process continues the same conversation, or has deleted it.
            insert = "INSERT INTO conversations (model, created, changed) VALUES (?, ?, ?)"
            conversation = int(database.execute(insert, ("", now, now)).lastrowid or 0)
            kept = []
        elif self._has_partial:
            database.execute("DELETE FROM messages WHERE id = ?", kept.pop()[:1])
        kept, added, replaced = _difference(kept, bodies)
        update = "UPDATE messages SET replaced = 1 WHERE id = ?"
        database.executemany(update, [(row,) for row, _ in replaced])
        for place in added:
            insert = "INSERT INTO messages (conversation, body) VALUES (?, ?)"
            row = database.execute(insert, (conversation, bodies[place])).lastrowid
            kept.insert(place, (int(row or 0), bodies[place]))
        changed = "UPDATE conversations SET changed = ?, model = ?, adapter = ? WHERE id = ?"
        values = (now, _model_source(self.model), self.adapter, conversation)
        database.execute(changed, values)
        self.conversation, self._stored, self._last = conversation, kept, log.last_id(conversation)
        self._has_partial = bool(self._pieces)


def _difference(stored: list[Row], bodies: list[str]) -> tuple[list[Row], list[int], list[Row]]:
    """Return the rows that stay, the places of bodies to add, and the rows that are replaced.

    What is added comes last in the file, so after it nothing stays; the system prompt is always
    first.
    """
    kept: list[Row] = []
    added: list[int] = []
    replaced: list[Row] = []
    system_is_first = bool(bodies) and json.loads(bodies[0])["role"] == "system"
    changes = SequenceMatcher(None, [body for _, body in stored], bodies, autojunk=False)
    for tag, start, stop, first, end in changes.get_opcodes():
        if tag == "equal" and (not added or (added == [0] and system_is_first)):
            kept += stored[start:stop]
        else:
            replaced += stored[start:stop]
            added += range(first, end)
    return kept, added, replaced


def _partial_message(pieces: Sequence[Event]) -> Message:
    """Return what a reply says so far, as the assistant's message."""
    text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    thinking = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    message = {"role": "assistant", "content": text}
    return {**message, "reasoning_content": thinking} if thinking else message


def _model_source(model: str | None) -> str:
    """Return the name by which a model is found from any folder."""
    if model is None or is_demo(model):
        return DEMO
    folder = Path(model).expanduser()
    is_folder = size_named(model) is None and folder.is_dir()
    return str(folder.resolve()) if is_folder else hub_name(model)
