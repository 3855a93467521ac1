"""A cache of verdicts by content, so that no completion is judged twice by the same judge: one SQLite file."""

import json
import pathlib
import sqlite3
from collections.abc import Mapping
from typing import Any

from safety_neurons import strict_json
from safety_neurons.errors import InputError, RunError
from safety_neurons.judges.judgement import Verdict
from safety_neurons.results.files import PathLike


class JudgementCache:
    """Verdicts in a file, under a hash of the judge, its revision and settings, and the text judged. A context manager.

    Raises:
        RunError: the place cannot be written.
        InputError: the file is something else.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._store = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise RunError(f"cannot write {str(path)!r} ({error}); choose a writable place for the judgements") from error
        try:
            self._store.execute("CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")
            self._store.execute("SELECT key, verdict FROM judgements LIMIT 1")
        except sqlite3.OperationalError as error:
            self._store.close()
            raise RunError(f"cannot write {str(path)!r} ({error}); choose a writable place for the judgements") from error
        except sqlite3.DatabaseError as error:
            self._store.close()
            raise InputError(f"{str(path)!r} is no file of judgements ({error}); expected one this package wrote, or a new name") from error

    def __enter__(self) -> "JudgementCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._store.execute("SELECT count(*) FROM judgements").fetchone()[0])

    def close(self) -> None:
        """Closes the file."""
        self._store.close()

    def get(self, key: str) -> Verdict | None:
        """The verdict under a key; None where there is none, or where it cannot be read."""
        row = self._store.execute("SELECT verdict FROM judgements WHERE key = ?", (key,)).fetchone()
        return None if row is None else verdict_of(row[0])

    def put(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keeps verdicts, all in one step.

        Raises:
            RunError: the file cannot be written.
        """
        rows = [(key, json.dumps(verdict.to_json(), ensure_ascii=True)) for key, verdict in verdicts.items()]
        try:
            self._store.execute("BEGIN IMMEDIATE")
            self._store.executemany("INSERT OR REPLACE INTO judgements VALUES (?, ?)", rows)
            self._store.execute("COMMIT")
        except sqlite3.Error as error:
            if self._store.in_transaction:
                self._store.execute("ROLLBACK")
            raise RunError(f"cannot write {str(self.path)!r} ({error}); choose a writable place with free space") from error


def verdict_of(text: str) -> Verdict | None:
    """A verdict from its JSON; None where it is not one."""
    try:
        record: dict[str, Any] = strict_json.loads(text)
        return Verdict(**{**record, "categories": tuple(record.get("categories") or ())})
    except (ValueError, TypeError):
        return None
