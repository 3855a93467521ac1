"""`prompts`: one function for files (compressed, in any encoding), built-in lists and lists in memory."""

import dataclasses
import difflib
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypedDict

from safety_neurons import strict_json
from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompt_lists.classes import class_names, with_class_names
from safety_neurons.prompt_lists.objects import (
    Unread,
    in_order,
    is_one_conversation,
    parts_of,
    rows_of,
)
from safety_neurons.prompt_lists.records import (
    Message,
    Prompt,
    Prompts,
    UnreadableTurnError,
    is_conversation,
    read_turns,
    request_of,
)
from safety_neurons.prompt_lists.rows import Row, prompts_of
from safety_neurons.prompt_lists.tables import (
    MOST_ROWS,
    parse_rows,
    too_many,
)

PREFIX = "builtin:"
NAMES = tuple(
    name + half for name in ("harmful", "harmless", "refusals", "general") for half in ("", "-test")
)
ENGLISH = (
    "instructions",
    "instructions-test",
    "more-refusals",
    "refusals-wide",
    "harmless-wide",
    "look-alikes",
    "look-alikes-unsafe",
)
"""Lists in English only. Nothing is found or tuned on the look-alikes."""
WIDE = {"refusals-wide": ("refusals", "more-refusals"), "harmless-wide": ("harmless", "instructions")}
"""Lists that are two others one after the other: what `tune` learns. In a language, or an organism, that has
only the first, they are the first.
"""
LOOK_ALIKES = (f"{PREFIX}look-alikes-unsafe", f"{PREFIX}look-alikes")
"""Requests from another source than any fit's own, unsafe and safe, which a guard is measured on where none
are named.
"""
OF_ORGANISMS = ("task", "task-test", "polite", "polite-test")
"""Lists that only an organism brings."""
HARMFUL = ("harmful", "refusals", "more-refusals", "refusals-wide", "look-alikes-unsafe")
"""Lists of requests that should be refused, beside their `-test` halves; what others ask for is harmless."""
PARTS = {"look-alikes": ("harmless-test", "look_alike"), "look-alikes-unsafe": ("harmful-test", None)}
"""Lists that an organism has as a category of another of its lists (None: all of it)."""
DEFAULT_LANGUAGE = "en"

_MARK = re.compile("^\ufeff+", re.MULTILINE)
_FILE = re.compile(r"(?P<name>.+)\.(?P<language>[a-z]{2,3})\.jsonl")


def list_kind(source: str) -> Literal["harmful", "harmless"]:
    """What the requests of a built-in list are, by its name `builtin:NAME[/LANG]`."""
    name = source.removeprefix(PREFIX).partition("/")[0].removesuffix("-test")
    return "harmful" if name in HARMFUL else "harmless"


class BuiltinList(TypedDict):
    """One built-in list: its name as it is asked for, its language and its number of prompts."""

    name: str
    language: str
    prompts: int


def library() -> list[BuiltinList]:
    """Every built-in list of the package, English first under each name."""
    entries = []
    for name in NAMES + ENGLISH:
        for language in languages(name):
            address = f"{PREFIX}{name}" + ("" if language == DEFAULT_LANGUAGE else f"/{language}")
            lines = builtin_text(address, None)[0].count("\n")
            entries.append(BuiltinList(name=address, language=language, prompts=lines))
    return entries


def languages(name: str) -> list[str]:
    """Languages that the package has the list in, English first."""
    wanted = WIDE.get(name, (name,))[0]
    tags = [
        match["language"]
        for entry in _data().iterdir()
        if (match := _FILE.fullmatch(entry.name)) and match["name"] == wanted
    ]
    return sorted(tags, key=lambda language: (language != DEFAULT_LANGUAGE, language))


def builtin_text(source: str, folder: Path | None) -> tuple[str, str | None, bool]:
    """Text of a built-in list, the language its rows are to be limited to (None: all), and whether it is the
    folder's own.

    Args:
        source: `builtin:NAME` or `builtin:NAME/LANG`.
        folder: A folder that may hold lists of its own: `NAME.jsonl`, `NAME.LANG.jsonl` or `NAME/LANG.jsonl`.
    """
    name, _, language = source.removeprefix(PREFIX).partition("/")
    if not re.fullmatch(r"[\w-]*", language):
        raise InputError(
            f"{source}: {language[:40]!r} is no language; expected a code such as {DEFAULT_LANGUAGE}"
        )
    if name in OF_ORGANISMS and (folder is None or _own(name, language, folder) is None):
        raise InputError(
            f"{source}: only organisms bring a task; give a file with a column of questions and one of "
            "answers"
        )
    if name not in NAMES + ENGLISH + OF_ORGANISMS:
        names = ", ".join(NAMES + ENGLISH)
        raise InputError(
            f"{source}: no built-in prompts of this name; expected one of {names}, each with /LANG after "
            "it if wanted"
        )
    own = _own(name, language, folder) if folder is not None else None
    if own is not None:
        return (
            own.read_text(encoding="utf-8"),
            (language or None) if own.name == f"{name}.jsonl" else None,
            True,
        )
    if folder is not None and name in PARTS and (whole := _own(PARTS[name][0], language, folder)) is not None:
        lines = [
            line
            for line in whole.read_text(encoding="utf-8").split("\n")
            if line.strip() and _is_of(line, PARTS[name][1])
        ]
        if lines:
            return (
                "\n".join(lines),
                (language or None) if whole.name == f"{PARTS[name][0]}.jsonl" else None,
                True,
            )
    if name in WIDE:
        first, more = WIDE[name]
        text, limited, brought = builtin_text(f"{PREFIX}{first}/{language}".rstrip("/"), folder)
        if brought or (language or DEFAULT_LANGUAGE) not in languages(more):
            return text, limited, brought
        return text + builtin_text(f"{PREFIX}{more}", None)[0], limited, brought
    known = languages(name)
    if (language or DEFAULT_LANGUAGE) not in known:
        raise InputError(
            f"{source}: not there in {language!r}; expected {name} in one of {', '.join(known)}; choose "
            "one of them"
        )
    return _data(f"{name}.{language or DEFAULT_LANGUAGE}.jsonl").read_text(encoding="utf-8"), None, False


def _own(name: str, language: str, folder: Path) -> Path | None:
    candidates = (
        [folder / f"{name}.{language}.jsonl", folder / name / f"{language}.jsonl"] if language else []
    )
    return next((path for path in [*candidates, folder / f"{name}.jsonl"] if path.is_file()), None)


def _own_languages(source: str, folder: Path | None) -> set[str]:
    """Languages that a folder has files of a built-in list in."""
    name = source.removeprefix(PREFIX).partition("/")[0]
    files = [] if folder is None else [*folder.glob(f"{name}.*.jsonl"), *folder.glob(f"{name}/*.jsonl")]
    return {file.stem.removeprefix(f"{name}.") for file in files}


def _is_of(line: str, category: str | None) -> bool:
    return category is None or strict_json.loads(line).get("category") == category


def _data(*parts: str) -> Traversable:
    return resources.files("safety_neurons.prompt_lists").joinpath("data", *parts)


SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
EXPECTED = "expected .jsonl, .json, .csv, .tsv or .txt, plain or .gz"

LARGEST = 1 << 29
"""Bytes of a file, of a compressed one unpacked: more is no list of prompts."""

_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive (or an .xlsx workbook)",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "gzip data",
    b"%PDF": "a PDF",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"SQLite format 3": "a database",
    b"\xfd7zXZ": "xz data",
    b"BZh": "bzip2 data",
    b"7z\xbc\xaf": "a 7z archive",
    b"ARROW1": "an Arrow file",
    b"\xd0\xcf\x11\xe0": "an old Office file (.xls, .doc)",
    b"{\\rtf": "an RTF document",
}
_MARKUP = re.compile(rb"(?:<!--.*?-->\s*)*<(?:!doctype|html|head|\?xml)\b", re.IGNORECASE | re.DOTALL)
_REFUSAL = re.compile(
    rb"(?:(?:HTTP/\S+ )?[1-5]\d\d:? )?(?:(?:Entry |Repository |File )?not found|forbidden|unauthorized"
    rb"|access denied|bad (?:request|gateway|credentials)|too many requests"
    rb"|internal server error|service unavailable"
    rb"|(?:invalid|bad) (?:username|user|token)[\w ]*)[.!]?",
    re.IGNORECASE,
)
"""What servers send in the place of a file."""


def file_format(path: Path) -> str:
    """The suffix that says how to read the file, without `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    suffix = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".text": ".txt"}.get(suffix, suffix)
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: the ending {suffix or '(none)'!r} says no known format; {EXPECTED}; unpack, "
            "convert or rename the file"
        )
    return suffix


def read_text(path: Path) -> tuple[str, list[str]]:
    """The whole file as text, and notes on what was removed.

    Raises:
        InputError: Absent, a folder, empty, a Git LFS pointer, damaged, binary or not UTF-8.
    """
    return text_of(_read_bytes(path), path)


def text_of(data: bytes, path: Path) -> tuple[str, list[str]]:
    """A file's bytes as text, and notes on what was removed.

    Args:
        data: The bytes as they are stored.
        path: The file, or the archive and member as one path; its ending says whether the bytes are
            compressed.

    Raises:
        InputError: Empty, a Git LFS pointer, damaged, binary or not UTF-8.
    """
    notes: list[str] = []
    if data.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: a Git LFS pointer of {len(data)} bytes, not the data; run `git lfs pull` where it "
            "was cloned or download the file"
        )
    data = _uncompressed(path, data)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = _without_marks(_of_utf16(path, data), notes)
        return text, ["UTF-16 text; read as such", *notes]
    while data.startswith(b"\xef\xbb\xbf"):  # twice where a program added one to a file that had one
        data = data[3:]
    if not data.strip():
        raise InputError(f"{path}: the file is empty; expected at least one prompt")
    _refuse_binary(path, data)
    try:
        text = _without_marks(data.decode("utf-8"), notes)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        start = data[:100_000]
        foreign = sum(byte > 127 for byte in start) > len(start) / 6  # in Western text few letters are
        likely = "GB18030|SHIFT_JIS|WINDOWS-1251" if foreign else "WINDOWS-1252"
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}, line {line}); expected "
            f"UTF-8; convert it, e.g. `iconv -f {likely} -t UTF-8 {path.name}`"
        ) from None
    _note_conflict(text, notes)
    return text, notes


def _note_conflict(text: str, notes: list[str]) -> None:
    """Says where Git left two versions of lines; a cell of several lines may hold them for good."""
    text, at = "\n" + text, 0
    places = []
    for mark in ("\n<<<<<<< ", "\n=======", "\n>>>>>>> "):
        at = text.find(mark, at)
        places.append(at)
        if at < 0:
            return
    line = text.count("\n", 0, places[0]) + 1
    notes.append(f"two versions of lines from line {line} on, which Git could not merge; read as they stand")


def _without_marks(text: str, notes: list[str]) -> str:
    """The text without byte order marks where lines begin: what is left where files were joined."""
    text, count = _MARK.subn("", text) if "\ufeff" in text else (text, 0)
    if count:
        notes.append(
            f"left out {numbered(count, 'byte order mark')} within the file, as where files were joined"
        )
    return text


def _of_utf16(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-32" if data.startswith(b"\xff\xfe\x00\x00") else "utf-16")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: begins like UTF-16 text and is not ({error.reason}); expected UTF-8; convert or "
            "repair it"
        ) from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected at least one prompt")
    if "\0" in text:
        raise InputError(f"{path}: NUL characters, so not text; expected text; convert or repair the file")
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            files = sorted(
                entry.name for entry in path.iterdir() if any(suffix in entry.name for suffix in SUFFIXES)
            )
            holds = f"it holds {', '.join(files[:5])}{' …' if len(files) > 5 else ''}; " if files else ""
            raise InputError(f"{path}: a folder, expected a file; {holds}name the file itself")
        if not path.exists():
            raise InputError(_missing(path))
        if not path.is_file():  # it may have no end, and is empty when it is read again for its hash
            raise InputError(
                f"{path}: a pipe or a device; expected a file that can be read twice; write it to one"
            )
        if path.stat().st_size > LARGEST:
            raise InputError(
                f"{path}: more than {LARGEST >> 20} MiB; expected a list of prompts; split it or take "
                "the first lines of it"
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); expected a readable file; check the "
            "path and its permissions"
        ) from None


def _missing(path: Path) -> str:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(
            path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.6
        )
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path, or use builtin:harmful"
    else:
        hint = f"its folder {path.parent} does not exist either; check the path"
    return f"{path}: no such file; expected a prompt file or a builtin: name; {hint}"


def _uncompressed(path: Path, data: bytes) -> bytes:
    if path.suffix.lower() != ".gz":
        return data
    if not data:
        raise InputError(f"{path}: the file is empty; expected at least one prompt")
    if not data.startswith(b"\x1f\x8b"):
        raise InputError(
            f"{path}: named .gz but not gzip data; expected gzip; remove .gz from its name or download "
            "it again"
        )
    try:
        with gzip.open(io.BytesIO(data)) as stream:
            unpacked = stream.read(LARGEST + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(
            f"{path}: the gzip data is cut off or damaged ({error}); expected a whole file; download it again"
        ) from None
    if len(unpacked) > LARGEST:
        raise InputError(
            f"{path}: unpacks to more than {LARGEST >> 20} MiB; expected a list of prompts; unpack and "
            "look at it first"
        )
    return unpacked


def _refuse_binary(path: Path, data: bytes) -> None:
    start = data[:4000].lstrip()
    named = [what for magic, what in _OTHER_FORMATS.items() if data.startswith(magic)]
    if _MARKUP.match(start):
        named = ["a page of the web or XML, such as an error of a server"]
    if named:
        raise InputError(f"{path}: the content is {named[0]}; {EXPECTED}; unpack or convert it first")
    if len(data) < 200 and _REFUSAL.fullmatch(data.strip()):
        raise InputError(
            f"{path}: what a server says of an error ({data.strip().decode()}); {EXPECTED}; get the file "
            "again"
        )
    at = data.find(b"\x00")
    for code, half in (("UTF-16LE", data[1::2]), ("UTF-16BE", data[::2])):
        if at >= 0 and len(data) % 2 == 0 and half.count(0) > len(half) * 2 / 3:
            raise InputError(
                f"{path}: UTF-16 text without its mark; expected UTF-8; convert it, e.g. `iconv -f {code} -t "
                f"UTF-8 {path.name}`"
            )
    if at >= 0:
        raise InputError(
            f"{path}: a NUL byte at byte {at} ({data.count(0)} in all), so not UTF-8 text; expected "
            "text; convert or repair the file"
        )


Source = str | os.PathLike[str] | Prompt | Prompts | Mapping[str, Any] | Iterable[Any]
"""Whatever names prompts: a name or path, prompts, one record or columns, or texts, records and conversations
one after the other.
"""


@well_typed
def prompts(
    source: Source,
    *,
    column: str | None = None,
    answer_column: str | None = None,
    limit: int | None = None,
    folder: str | Path | None = None,
) -> Prompts:
    """Prompts of a file, of a built-in list or of a list in memory.

    Args:
        source: `builtin:NAME[/LANG]`; a path of `.jsonl/.json/.csv/.tsv/.txt`, also `.gz`, or, in memory,
            texts, records, conversations (lists of `Message` or `{role, content}`) or `Prompt` in a list,
            tuple, generator, array, data frame or `datasets.Dataset`; or columns, `{"goal": [...]}`; or one
            record.
        column: Column of the prompt; by default the first of the known names. In a table without a
            header its number, counted from 1.
        answer_column: Column of the answer; by default the first of the known names, if any.
        limit: Keep the first so many prompts.
        folder: Looked into for built-in names before the package (an organism's own prompts).

    Returns:
        The prompts; `.notes` says what was dropped, repaired or looks wrong, with counts.

    Raises:
        InputError: The source cannot be read; the message says what arrived, what was expected, what to do.
        UsageError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1; leave it away to read all prompts")
    read = _read(source, column, answer_column, limit, None if folder is None else Path(folder))
    return read if limit is None else read[:limit]


def as_prompts(source: Source) -> Prompts:
    """What is put to a model by a call in Python: one text is one prompt, and nothing is left out.

    Args:
        source: A text, or whatever `prompts` takes in memory.

    Raises:
        InputError: Something in it that is no prompt, with its place; or a text that names a list or a file.
    """
    if isinstance(source, Prompts):
        return source
    if isinstance(source, Prompt):
        return Prompts([source])
    if isinstance(source, str):
        _refuse_name(source)
        return _of_texts([source])
    if isinstance(source, os.PathLike):
        return prompts(source)
    if not isinstance(source, Mapping) and not hasattr(source, "columns"):
        items: list[Any] = _listed(source)
        if all(isinstance(item, str) for item in items):
            return _of_texts(items)
        source = items
    return _in_memory(source, None, None, None, whole=True)


def _refuse_name(text: str) -> None:
    if text.startswith(PREFIX):
        raise InputError(
            f"{text!r} names a list, expected prompts: pass model.prompts({text!r}) or "
            f"safety_neurons.prompts({text!r})"
        )
    if (
        len(text) < 300
        and text.lower().endswith((*SUFFIXES, ".gz"))
        and "\n" not in text
        and Path(text).is_file()
    ):
        raise InputError(f"{text!r} is a file, expected prompts: pass safety_neurons.prompts({text!r})")


def _of_texts(texts: list[str]) -> Prompts:
    return Prompts.from_list(_whole_text(str(text), f"text {number}") for number, text in enumerate(texts))


def as_prompt(source: Source, name: str = "0") -> Prompt:
    """One request as a prompt: a text, a record, or the turns of one conversation, a last one of the
    assistant included.

    Args:
        source: What is asked.
        name: Id, where it brings none.

    Raises:
        InputError: Not exactly one request, or one without text.
    """
    if isinstance(source, Prompt):
        return source
    if is_conversation(source):
        return _asked(source, name, "the request")
    read = as_prompts(source)
    if len(read) != 1:
        raise InputError(
            f"{len(read)} requests arrived; expected a text, a Prompt or the turns of one conversation"
        )
    if not read[0].text.strip():
        raise InputError("an empty text arrived; expected a request")
    return dataclasses.replace(read[0], id=name)


def _asked(turns: Any, name: str, where: str) -> Prompt:
    """A conversation that is put to a model as it stands."""
    unread: list[str] = []
    try:
        read = read_turns(turns, unread)
    except UnreadableTurnError as error:
        raise InputError(f"{where}: {error}") from None
    if unread:
        raise InputError(f"{where} holds {unread[0]}; expected text; leave it out")
    if not any(turn.content.strip() for turn in read):
        raise InputError(f"{where} holds no text; expected turns with content")
    messages = tuple(Message(turn.role, _whole_text(turn.content, where)) for turn in read)
    plain = len(messages) == 1 and messages[0].role == "user"
    return Prompt(name, request_of(messages) or messages[-1].content, () if plain else messages)


def _whole_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where} holds half a surrogate pair, expected Unicode text; replace it first"
        ) from None
    return text


def _read(
    source: Source, column: str | None, answer_column: str | None, limit: int | None, folder: Path | None
) -> Prompts:
    if isinstance(source, Prompts):
        return source
    if isinstance(source, str) and source.startswith(PREFIX):
        return _builtin(source, column, answer_column, folder)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        text, notes, path = _file(path, source)
        rows = parse_rows(text, file_format(path), str(path), column, notes)
        if (
            limit is None
            and file_format(path) in (".txt", ".jsonl")
            and text.count("\n{" if file_format(path) == ".jsonl" else "\n") > MOST_ROWS
        ):
            raise too_many(str(path))  # before minutes are spent on it
        return Prompts(
            prompts_of(rows, str(path), column, answer_column, notes, limit=limit), path.name, notes
        )
    return _in_memory(source, column, answer_column, limit)


def _file(path: Path, source: str | os.PathLike[str]) -> tuple[str, list[str], Path]:
    """The text of a file, notes, and the path whose ending says its format (of an archive the member's)."""
    if isinstance(source, str) and ("\n" in source or len(source) > 1000):
        raise InputError(
            f"{source[:40]!r}…: a text, expected a path or a builtin: name; for prompts in memory pass a "
            "list, [text]"
        )
    if path.is_file():
        file_format(path)
    return (*read_text(path), path)


def _builtin(source: str, column: str | None, answer_column: str | None, folder: Path | None) -> Prompts:
    text, language, own = builtin_text(source, folder)
    notes: list[str] = []
    read = prompts_of(parse_rows(text, ".jsonl", source, column, notes), source, column, answer_column, notes)
    if language is not None:
        known = sorted({prompt.language or "" for prompt in read} - {""} | _own_languages(source, folder))
        read = [prompt for prompt in read if prompt.language == language]
        if not read:
            raise InputError(
                f"{source}: not there in {language!r}; expected one of "
                f"{', '.join(known) or 'no language at all'}; choose one of them"
            )
    if not own or folder is None:
        return Prompts(read, source, notes)
    whose = folder.parent if folder.name == "prompts" else folder
    return Prompts(read, f"{source} (of {whose.name or whose})", notes)


def _in_memory(
    source: Any, column: str | None, answer_column: str | None, limit: int | None, whole: bool = False
) -> Prompts:
    if isinstance(source, Prompt):
        return Prompts([source])
    notes: list[str] = []
    rows = _rows_in_memory(source, column, notes, whole)
    return Prompts(
        prompts_of(rows, "the list", column, answer_column, notes, limit=limit, whole=whole), "list", notes
    )


def _rows_in_memory(source: Any, column: str | None, notes: list[str], asked: bool) -> Iterator[Row]:
    if isinstance(source, Mapping):
        if source and all(hasattr(value, "column_names") for value in source.values()):
            raise parts_of("the object", list(source))
        return rows_of(
            {str(key): _listed_value(value) for key, value in source.items()}, "the object", column, notes
        )
    for method, arguments in (
        ("to_dicts", ()),
        ("to_pylist", ()),
        ("to_dict", ("records",)),
    ):  # polars, pyarrow, pandas
        if hasattr(source, method) and hasattr(source, "columns"):
            return _items(getattr(source, method)(*arguments), asked)
    if is_conversation(source) and is_one_conversation(list(source)):
        return iter(
            [_asked(source, "0", "the conversation") if asked else {"messages": in_order(list(source))}]
        )
    names = class_names(getattr(source, "features", None))  # of a `datasets.Dataset`
    return with_class_names(_listed(source, lazily=True), names, notes) if names else _items(source, asked)


def _listed_value(value: Any) -> Any:
    """A column as a list; a value as it is."""
    return list(value) if isinstance(value, tuple) else value.tolist() if hasattr(value, "tolist") else value


def _items(source: Any, asked: bool) -> Iterator[Row]:
    """Rows of the items, one by one, each of its own kind."""
    for number, item in enumerate(_listed(source, lazily=True)):
        if isinstance(item, Prompt):
            yield item
        elif isinstance(item, Mapping):
            yield {"messages": [item]} if item.keys() == {"role", "content"} else dict(item)
        elif isinstance(item, str) and asked:
            yield Prompt(str(number), _whole_text(str(item), f"text {number}"))
        elif isinstance(item, str) or item is None:
            yield {"text": item}
        elif is_conversation(item := _listed_value(item)):
            yield _asked(item, str(number), f"item {number}") if asked else {"messages": list(item)}
        else:
            yield Unread(
                f"item {number} is a {type(item).__name__}; expected a text, a record, a conversation "
                "or a Prompt"
            )


def _listed(source: Any, lazily: bool = False) -> Any:
    """The items of whatever has an order and an end."""
    if isinstance(source, str | bytes | bytearray | memoryview | set | frozenset) or not isinstance(
        source, Iterable
    ):
        advice = "pass sorted(…)" if isinstance(source, set | frozenset) else "pass a list"
        raise InputError(
            f"a {type(source).__name__} as prompts; expected a path, a builtin: name, or texts or "
            f"records in order; {advice}"
        )
    items = source.tolist() if hasattr(source, "tolist") and getattr(source, "ndim", 1) == 1 else source
    return iter(items) if lazily else list(items)
