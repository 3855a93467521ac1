"""What reaches the terminal: this package's own lines, in which no text of anybody's is markup or an
escape.
"""

import contextlib
import io
import json
import logging
import pathlib
import re
import subprocess
import sys

import pytest
from running import Terminal, command, done
from test_identity import VERBS, made, place  # fixtures

from safety_neurons import cli
from safety_neurons.cli import console
from safety_neurons.cli.session import Session
from safety_neurons.results.notebook import UNSEEN

__all__ = ["made", "place"]

CHATTER = """
import logging, sys, warnings
handler = logging.StreamHandler()
logging.getLogger("chatty").addHandler(handler)
def use():
    print("CHATTER on standard output")
    print("CHATTER on standard error", file=sys.stderr)
    print("CHATTER on the first standard error", file=sys.__stderr__)
    sys.stderr.write("CHATTER written")
    logging.getLogger("chatty").warning("CHATTER logged")
    logging.getLogger("other").error("CHATTER without a handler")
    if "pytest" not in sys.modules:  # which takes them for itself
        warnings.warn("CHATTER warned", stacklevel=2)
use()
"""


def chatter():
    """Import a library that talks while it is imported, and use it."""
    scope = {"__name__": "chatty"}
    try:
        exec(CHATTER, scope)
        scope["use"]()
    finally:
        logging.getLogger("chatty").handlers.clear()


@pytest.mark.parametrize("name", VERBS)
def test_other_libraries_talk_to_nobody_and_to_standard_error_with_debug(name, place, tmp_path, monkeypatch):
    def work(self, _work):
        chatter()
        self.notes.append("a note")
        self.folder.finish({"healthy": True}, notes=self.notes)

    monkeypatch.setattr(Session, "_work", work)
    monkeypatch.setattr(Session, "_show", lambda *_: console.say("shown"))
    words = [*name.split(), *VERBS[name][0](place)]
    said = command(*words, "--out", tmp_path / "a")
    assert said.code == 0
    assert said.err == "note: a note\n"
    assert said.out.splitlines()[0] == "shown"
    assert "CHATTER" not in said.out
    quiet = command(*words, "--out", tmp_path / "b", "--json")
    assert quiet.err == ""
    assert quiet.json["healthy"]
    debug = command(*words, "--out", tmp_path / "c", "--json", "--debug")
    assert debug.json["healthy"]
    assert {line.rpartition("CHATTER ")[2] for line in debug.err.splitlines() if "CHATTER" in line} >= {
        "on standard output",
        "logged",
    }


def test_an_error_of_our_own_is_said_whatever_others_say(tmp_path, monkeypatch):
    def talk(*_):
        chatter()
        raise RuntimeError("something [/red] broke")

    monkeypatch.setattr(Session, "foresee", talk)
    said = command("doctor", "--model", "x", "--out", tmp_path / "a")
    assert said.code == 1
    assert said.err.startswith("safety-neurons: RuntimeError: something [/red] broke")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_thread_that_dies_is_said():
    import threading

    def die():
        raise ValueError("in [/red] a thread")

    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), console.ours(debug=False):
        thread = threading.Thread(target=die)
        thread.start()
        thread.join()
    assert stream.getvalue() == "safety-neurons: a thread ended: ValueError: in [/red] a thread\n"


def test_streams_and_environment_are_put_back(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setenv("HF_HUB_VERBOSITY", "debug")
    before = sys.stdout, sys.stderr, sys.__stderr__
    import os

    def inside():
        with console.ours(debug=False):
            assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
            assert os.environ["HF_HUB_VERBOSITY"] == "debug"
            assert sys.stderr is not before[1]
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert (sys.stdout, sys.stderr, sys.__stderr__) == before
    assert "TRANSFORMERS_VERBOSITY" not in os.environ


# Texts

HOSTILE = "[/red]\x1b[31m\x07[bold]\x9b2J\u202etxt\u2028\x1b]0;title\x07\ud800"
FILE = "[red]\x1b[31m\x07[bold]\x9b2J\u202e\x1b]0;t\x07"


def harmless(text):
    """No unseen character but line breaks, and nothing dropped: what was named stands there."""
    assert not UNSEEN.search(text), repr(text)
    return text


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "show",
    [
        lambda text: console.say(text),
        lambda text: console.say(("bold", text), text),
        lambda text: console.rule(text),
        lambda text: console.print_table(
            text, [text, text], [[text, text], [text, console.styled(text)]], caption=text
        ),
        lambda text: console.print_table(
            "t", ["a"], [[{"value": None, "low": text}], [pathlib.PurePath(text)]], quiet={0}
        ),
        lambda text: console.print_notes([text, f"two\nlines {text}"]),
        lambda text: console.tell(console.line_of(text)),
    ],
)
def test_no_text_is_markup_or_an_escape(show, terminal):
    streams = [Terminal() if terminal else io.StringIO() for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        show(HOSTILE)
    text = "".join(stream.getvalue() for stream in streams)
    if terminal:
        text = re.sub(
            r"\x1b\[[\d;]*m", "", text
        )  # styles of our own; the hostile one's escape is named and no escape any more
    assert "U+001B" in harmless(text).replace("\n", "")


@pytest.mark.parametrize("step", [HOSTILE, "plain"])
def test_a_step_at_work_is_no_markup(step):
    stream = Terminal()
    with contextlib.redirect_stderr(stream), console.status(step, quiet=False) as report:
        report(step)
    with contextlib.redirect_stderr(stream), console.progress_bar(step, quiet=False) as report:
        report(1, 2, 3)
    assert "\x1b]0;" not in stream.getvalue()
    assert "\x07" not in stream.getvalue()


@pytest.mark.parametrize("value", [HOSTILE, {"a": [HOSTILE]}, {HOSTILE: 1}])
def test_json_holds_nothing_a_terminal_obeys_and_reads_back_the_same(value):
    line = console.json_line(value)
    harmless(line)
    assert json.loads(line) == value


def test_names_of_files_labels_and_models_reach_the_terminal_as_text(tiny_pair, made, tmp_path):
    folder = tmp_path / FILE
    folder.mkdir()
    for name in ("neurons", "others"):
        (folder / f"{FILE}{name}.safetensors").write_bytes((made / f"{name}.safetensors").read_bytes())
    prompts = folder / f"{FILE}.txt"
    prompts.write_text(f"how do i kill\n{HOSTILE.encode(errors='ignore').decode()}\n", encoding="utf-8")
    files = [f"[/red]\x1b[31m={folder / f'{FILE}neurons.safetensors'}", folder / f"{FILE}others.safetensors"]
    lines = [
        (0, ["analyze", "layers", *files, "--out", folder / "layers"]),
        (0, ["analyze", "overlap", *files, "--out", folder / "overlap"]),
        (
            0,
            [
                "find",
                "importance",
                "--model",
                tiny_pair.plain,
                "--prompts",
                prompts,
                "--top",
                "0.1",
                "--out",
                folder / "find",
            ],
        ),
        (
            0,
            [
                "find",
                "importance",
                "--model",
                tiny_pair.plain,
                "--prompts",
                prompts,
                "--top",
                "0.1",
                "--out",
                folder / "find",
            ],
        ),
        (0, ["report", folder / "find", "--out", folder / "report.html"]),
        (
            1,
            [
                "find",
                "importance",
                "--model",
                tiny_pair.plain,
                "--prompts",
                folder / FILE,
                "--out",
                folder / "none",
            ],
        ),
        (1, ["doctor", "--model", folder / FILE, "--out", folder / "none"]),
        (1, ["run", folder / FILE]),
        (2, ["find", FILE]),
        (2, [FILE]),
        (2, ["find", "importance", "--model", "x", "--sites", FILE]),
        (1, ["data", "verify", FILE]),
    ]
    for code, words in lines:
        for more in ([], ["--json"]):
            said = command(*words, *more)
            assert said.code == code, (words, said)
            harmless(said.out + said.err)


def test_a_result_that_cannot_be_shown_is_kept_and_the_run_is_done(tiny_pair, tmp_path, monkeypatch):
    def broken(_run):
        raise ValueError("closing tag '[/red]' does not match")

    monkeypatch.setattr(console, "show", broken)
    words = [
        "find",
        "importance",
        "--model",
        tiny_pair.plain,
        "--prompts",
        tiny_pair.harmful,
        "--limit",
        "2",
        "--top",
        "0.1",
    ]
    said = command(*words, "--out", tmp_path / "run")
    assert said.code == 0
    assert "note: the result cannot be shown (ValueError: closing tag" in said.err
    assert done(*words, "--out", tmp_path / "run")["n_neurons"]


def test_only_one_module_writes_to_the_terminal():
    allowed = {
        "console.py": "",
        "processes.py": "",  # takes the terminal away from all processes but the first
        "verb.py": r"sys\.stdout\.write\(f\"safety-neurons|error\.show\(file=sys\.stdout\)",
    }
    for file in pathlib.Path(cli.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name in allowed and not allowed[file.name]:
            continue
        text = re.sub(allowed.get(file.name) or "(?!)", "", text)
        found = re.findall(
            r"sys\.std(?:out|err)\b|\b(?:out|err)\(\)\.(?:print|rule|log)\b|^\s*print\(|from rich(?!\.progress)|\[/?(?:dim|bold|red|green)",  # noqa: E501
            text,
            re.M,
        )
        assert not found, (file.name, found)


def test_a_terminal_that_knows_few_letters_gets_all_of_the_result(tmp_path):
    program = (
        "from safety_neurons.cli import console\nwith console.ours(debug=False):\n    console.say('Größe – "
        "你好')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
    )
    assert run.stdout == b"Gr\\xf6\\xdfe \\u2013 \\u4f60\\u597d\n"


@pytest.mark.parametrize("width", [60, 80, 100])
def test_names_in_a_table_are_not_broken(width, monkeypatch):
    """A name that is copied from a table stands there whole, however long its neighbours are."""
    monkeypatch.setenv("COLUMNS", str(width))
    names = ["qwen2.5-coder-0.5b-instruct", "all-minilm-l6-v2"]
    rows = [[name, 94, "Apache-2.0 (upstream; unknown)", "a model that says nothing " * 4] for name in names]
    with contextlib.redirect_stdout(io.StringIO()) as written:
        console.print_table("models", ["name", "MB", "licence", "what it is"], rows)
    lines = written.getvalue().splitlines()
    for name in names:
        assert any(line.split()[:1] == [name] for line in lines)
    assert max(map(len, lines)) <= width
