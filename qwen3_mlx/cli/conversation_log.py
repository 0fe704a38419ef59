"""The conversations of the terminal: one SQLite file, which any number of processes may write."""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from difflib import SequenceMatcher
from pathlib import Path
from threading import RLock, Timer
from typing import Any, Self

from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.user_files import data_file
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.sizes import hub_name, size_named
from qwen3_mlx.text.events import Event, Reasoning, Text

Message = dict[str, Any]
_Row = tuple[int, str]  # id and body of a message

DEMO = "demo"
"""The model of a conversation that names none."""
_FILE = "conversations.db"
_BUSY_SECONDS = 10  # that a write waits for those of other processes
_FLUSH_SECONDS = 0.5  # from a piece of a reply to its place on the disk, at most
_ORDER = "ORDER BY role != 'system', id"  # the system prompt may be set late
_EXCERPT = 60  # characters around what was searched for
_TRIGRAM = 3  # characters that the index can find
# The file's user_version counts those that were applied. What users have is never edited here.
_MIGRATIONS = (
    (
        """CREATE TABLE conversations (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            model TEXT NOT NULL, created TEXT NOT NULL, changed TEXT NOT NULL
        )""",
        # Ids grow and are never used again: the last one shows whether others have written.
        # Replaced messages were retried, edited or dropped: they are kept, and not continued.
        """CREATE TABLE messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation INTEGER NOT NULL REFERENCES conversations ON DELETE CASCADE,
            body TEXT NOT NULL, replaced INTEGER NOT NULL DEFAULT 0,
            role TEXT AS (json_extract(body, '$.role')),
            text TEXT AS (json_extract(body, '$.content'))
        )""",
        "CREATE INDEX messages_by_conversation ON messages (conversation, id)",
        # Trigrams find parts of words, code, and languages without spaces.
        """CREATE VIRTUAL TABLE search USING fts5 (
            text, content='messages', content_rowid='id', tokenize='trigram'
        )""",
        """CREATE TRIGGER message_added AFTER INSERT ON messages BEGIN
            INSERT INTO search (rowid, text) VALUES (new.id, new.text);
        END""",
        """CREATE TRIGGER message_changed AFTER UPDATE OF body ON messages BEGIN
            INSERT INTO search (search, rowid, text) VALUES ('delete', old.id, old.text);
            INSERT INTO search (rowid, text) VALUES (new.id, new.text);
        END""",
        """CREATE TRIGGER message_removed AFTER DELETE ON messages BEGIN
            INSERT INTO search (search, rowid, text) VALUES ('delete', old.id, old.text);
        END""",
    ),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list; `title` is how its first question begins."""

    id: int
    model: str
    created: str
    changed: str
    messages: int
    title: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A message that was found, and its text around the first word."""

    conversation: int
    role: str
    excerpt: str


class ConversationLog:
    """All recorded conversations."""

    def __init__(self, path: Path) -> None:
        """Open the file, or create it; older files are brought up to date.

        Raises:
            Qwen3Error: the file is damaged, of a newer version, or cannot be opened.
        """
        self.path = path
        try:
            # SQLite gives the files beside it the same permissions.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._database = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            with ExitStack() as undo:
                undo.callback(self._database.close)
                self._prepare()
                undo.pop_all()
        except (sqlite3.Error, OSError) as error:
            raise Qwen3Error(
                f"the log of conversations, {path}, cannot be used: {error}"
            ) from error

    @classmethod
    def open(cls) -> Self:
        """Open the log in the user's data folder; raises also what `data_file` raises."""
        return cls(data_file(_FILE))

    def _prepare(self) -> None:
        for setting in ("journal_mode = wal", "synchronous = normal", "foreign_keys = on"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("PRAGMA secure_delete = on")
        if self._version() == len(_MIGRATIONS):
            return
        with self.transaction():  # in which another process may have done it meanwhile
            version = self._version()
            if version > len(_MIGRATIONS):
                raise Qwen3Error(f"{self.path} was written by a newer version of qwen3-mlx")
            for statements in _MIGRATIONS[version:]:
                for statement in statements:
                    self._database.execute(statement)
            self._database.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    def _version(self) -> int:
        return int(self._database.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Create a context whose writes happen together or not at all."""
        self._database.execute("BEGIN IMMEDIATE")
        with self._database as database:
            yield database

    def summaries(self, limit: int = -1, conversation: int | None = None) -> list[Summary]:
        """Return the conversations, or the one with this id, the last changed first."""
        rows = self._database.execute(
            """SELECT id, model, created, changed,
                (SELECT count(*) FROM messages WHERE conversation = c.id),
                (SELECT substr(text, 1, 200) FROM messages
                    WHERE conversation = c.id AND role = 'user' ORDER BY id LIMIT 1)
            FROM conversations AS c WHERE ?1 IS NULL OR id = ?1
            ORDER BY changed DESC, id DESC LIMIT ?2""",
            (conversation, limit),
        )
        return [_summary(*row) for row in rows]

    def find(self, conversation: int | None = None) -> Summary:
        """Return a conversation, by default the last changed.

        Raises:
            Qwen3Error: there is none.
        """
        if found := self.summaries(1, conversation):
            return found[0]
        if conversation is None:
            raise Qwen3Error("no conversation has been recorded")
        raise Qwen3Error(f"there is no conversation {conversation}; qwen3 logs lists them")

    def messages(self, conversation: int, *, replaced: bool = False) -> list[Message]:
        """Return the messages of a conversation, if `replaced` with those that others replaced."""
        rows = self._database.execute(
            "SELECT body FROM messages WHERE conversation = ? AND replaced <= ? " + _ORDER,
            (conversation, replaced),
        )
        return [json.loads(body) for (body,) in rows]

    def rows(self, conversation: int) -> list[_Row]:
        """Return the messages that a conversation continues from, as stored, with their ids."""
        query = "SELECT id, body FROM messages WHERE conversation = ? AND NOT replaced " + _ORDER
        return self._database.execute(query, (conversation,)).fetchall()

    def last_id(self, conversation: int) -> int | None:
        """Return the id of the newest message of a conversation; None if there is none."""
        query = "SELECT max(id) FROM messages WHERE conversation = ?"
        found: int | None = self._database.execute(query, (conversation,)).fetchone()[0]
        return found

    def search(self, text: str, limit: int = -1) -> list[Hit]:
        """Return the messages that contain every word of a text, in any case, newest first."""
        words = text.split()
        quoted = ['"' + word.replace('"', '""') + '"' for word in words if len(word) >= _TRIGRAM]
        indexed = " ".join(quoted)
        query = "SELECT conversation, role, text FROM messages WHERE "
        query += "id IN (SELECT rowid FROM search WHERE search MATCH ?)" if indexed else "? = ''"
        short = [word for word in words if len(word) < _TRIGRAM]
        query += " AND instr(lower(text), lower(?))" * len(short)
        rows = self._database.execute(f"{query} ORDER BY id DESC LIMIT ?", (indexed, *short, limit))
        return [Hit(number, role, _excerpt(text, words[0])) for number, role, text in rows]

    def delete(self, conversations: Sequence[int]) -> None:
        """Delete conversations; nothing of their texts stays in the file."""
        for conversation in conversations:
            self._database.execute("DELETE FROM conversations WHERE id = ?", (conversation,))
        self._database.execute("INSERT INTO search (search) VALUES ('optimize')")
        self._database.execute("VACUUM")
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def exported(self, summary: Summary) -> dict[str, Any]:
        """Return a conversation as data, which `qwen3 chat --load` reads from a file."""
        content = {"format": "qwen3-mlx conversation", "version": 1}
        messages = self.messages(summary.id, replaced=True)
        return {**content, **asdict(summary), "messages": messages}

    def is_announced(self) -> bool:
        """Return whether the user knows of this file: False once, the first time."""
        if self._database.execute("PRAGMA application_id").fetchone()[0]:
            return True
        self._database.execute("PRAGMA application_id = 1")
        return False

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _summary(*columns: Any) -> Summary:
    *values, text = columns
    return Summary(*values, title=" ".join((text or "").split()))  # type: ignore[misc]


def _excerpt(text: str, word: str) -> str:
    place = max(0, text.lower().find(word.lower()))
    start, stop = max(0, place - _EXCERPT // 2), place + len(word) + _EXCERPT
    shown = " ".join(text[start:stop].split())
    return f"{'…' if start else ''}{shown}{'…' if stop < len(text) else ''}"


def _difference(stored: list[_Row], bodies: list[str]) -> tuple[list[_Row], list[int], list[_Row]]:
    """Return the rows that stay, the places of bodies to add, and the rows that are replaced.

    What is added comes last in the file, so after it nothing stays; the system prompt is always
    first.
    """
    kept: list[_Row] = []
    added: list[int] = []
    replaced: list[_Row] = []
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
    if model is None:
        return DEMO
    folder = Path(model).expanduser()
    is_folder = size_named(model) is None and folder.is_dir()
    return str(folder.resolve()) if is_folder else hub_name(model)


class Recorder:
    """Records one conversation as it goes on; a failure is reported once, and ends the recording.

    Without a log it records nothing.
    """

    def __init__(
        self, log: ConversationLog | None, model: str | None, *, conversation: int | None = None
    ) -> None:
        """Record a new conversation with `model`, or one of the log that goes on."""
        self._log = log
        self.model = model
        self.conversation = conversation
        self._stored: list[_Row] = []
        self._last: int | None = None
        if log and conversation is not None:
            self._stored, self._last = log.rows(conversation), log.last_id(conversation)
        self._has_partial = False  # the last of those stored is a reply that has not ended
        self._history: list[str] = []
        self._pieces: list[Event] = []  # of a reply that has not ended
        self._timer: Timer | None = None
        self._lock = RLock()
        self._failure: Exception | None = None

    def another(self) -> "Recorder":
        """Return a recorder of a new conversation."""
        return Recorder(self._log and ConversationLog(self._log.path), self.model)

    def record(self, messages: Sequence[Message]) -> None:
        """Record the conversation as it is now: after each message, and after a reply has ended."""
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
        changed = "UPDATE conversations SET changed = ?, model = ? WHERE id = ?"
        database.execute(changed, (now, _model_source(self.model), conversation))
        self.conversation, self._stored, self._last = conversation, kept, log.last_id(conversation)
        self._has_partial = bool(self._pieces)
