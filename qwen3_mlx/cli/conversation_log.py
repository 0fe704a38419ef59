"""The conversations of the terminal: one SQLite file, which any number of processes may write."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from qwen3_mlx.cli.attachments import without_attachments
from qwen3_mlx.cli.user_files import CONVERSATIONS, data_file
from qwen3_mlx.errors import Qwen3Error

Message = dict[str, Any]
Row = tuple[int, str]  # id and body of a message

_BUSY_SECONDS = 10  # that a write waits for those of other processes
_RETRY_SECONDS = 0.01  # between attempts where SQLite does not wait by itself
_ORDER = "ORDER BY role != 'system', id"  # the system prompt may be set late
_TITLE = 200  # characters
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
    ("ALTER TABLE conversations ADD COLUMN adapter TEXT NOT NULL DEFAULT ''",),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list; `title` is how its first question begins, after its files."""

    id: int
    model: str
    adapter: str
    created: str
    changed: str
    messages: int
    title: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A message that was found, its text around the first word, and its conversation's change."""

    conversation: int
    changed: str
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
            # SQLite gives the files beside it the same permissions. One that exists is not opened:
            # closing it would end the locks that this process has on it.
            if not path.exists():
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
        return cls(data_file(CONVERSATIONS))

    def _prepare(self) -> None:
        self._write_ahead()
        for setting in ("synchronous = normal", "foreign_keys = on", "secure_delete = on"):
            self._database.execute(f"PRAGMA {setting}")
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

    def _write_ahead(self) -> None:
        """Set the mode in which others read while one writes.

        SQLite waits for a lock everywhere but here.
        """
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_SECONDS)

    def _version(self) -> int:
        return int(self._database.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Create a context whose writes happen together or not at all."""
        self._database.execute("BEGIN IMMEDIATE")
        with self._database as database:
            yield database

    def summaries(self, limit: int = -1, conversation: int | None = None) -> list[Summary]:
        """Return the conversations, or the one with this id, the last changed first.

        Without an id only those that can go on: something was said that nothing has replaced.
        """
        rows = self._database.execute(
            """SELECT id, model, adapter, created, changed,
                (SELECT count(*) FROM messages WHERE conversation = c.id AND NOT replaced),
                (SELECT text FROM messages
                    WHERE conversation = c.id AND role = 'user' ORDER BY id LIMIT 1)
            FROM conversations AS c
            WHERE id = ?1 OR ?1 IS NULL AND EXISTS (
                SELECT 1 FROM messages
                WHERE conversation = c.id AND NOT replaced AND role != 'system'
            )
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
        """Return the messages of a conversation.

        If `replaced`, those that others replaced are among them, each with `"replaced": True`.
        """
        rows = self._database.execute(
            "SELECT body, replaced FROM messages WHERE conversation = ? AND replaced <= ? "
            + _ORDER,
            (conversation, replaced),
        )
        return [json.loads(body) | ({"replaced": True} if mark else {}) for body, mark in rows]

    def rows(self, conversation: int) -> list[Row]:
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
        query = "SELECT conversation, changed, role, text FROM messages "
        query += "JOIN conversations AS c ON c.id = conversation WHERE "
        query += (
            "messages.id IN (SELECT rowid FROM search WHERE search MATCH ?)"
            if indexed
            else "? = ''"
        )
        short = [word for word in words if len(word) < _TRIGRAM]
        query += " AND instr(lower(text), lower(?))" * len(short)
        rows = self._database.execute(
            f"{query} ORDER BY messages.id DESC LIMIT ?", (indexed, *short, limit)
        )
        return [
            Hit(number, changed, role, _excerpt(text, words[0]))
            for number, changed, role, text in rows
        ]

    def delete(self, conversations: Sequence[int] | None) -> None:
        """Delete conversations, if None all of them; nothing of their texts stays in the file."""
        if conversations is None:
            self._database.execute("DELETE FROM conversations")
        for conversation in conversations or ():
            self._database.execute("DELETE FROM conversations WHERE id = ?", (conversation,))
        self._database.execute("INSERT INTO search (search) VALUES ('optimize')")
        self._database.execute("VACUUM")
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def exported(self, summary: Summary, *, replaced: bool = False) -> dict[str, Any]:
        """Return a conversation as data, which `qwen3 chat --load` reads from a file."""
        content = {"format": "qwen3-mlx conversation", "version": 1}
        messages = self.messages(summary.id, replaced=replaced)
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

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Close the file; an error of SQLite becomes a sentence."""
        self.close()
        if isinstance(error, sqlite3.Error):
            raise Qwen3Error(f"the log of conversations, {self.path}: {error}") from error


def _summary(*columns: Any) -> Summary:
    *values, text = columns
    title = " ".join(without_attachments(text or "")[:_TITLE].split())
    return Summary(*values, title=title)  # type: ignore[misc]


def _excerpt(text: str, word: str) -> str:
    place = max(0, text.lower().find(word.lower()))
    start, stop = max(0, place - _EXCERPT // 2), place + len(word) + _EXCERPT
    shown = " ".join(text[start:stop].split())
    return f"{'…' if start else ''}{shown}{'…' if stop < len(text) else ''}"
