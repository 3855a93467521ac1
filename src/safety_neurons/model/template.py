"""Prompts to token ids: chat templates, the plain template, system prompts; one BOS, never two, never none where the tokenizer adds one."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safety_neurons.errors import InputError, ModelError, UsageError
from safety_neurons.model.conversation import Turns, render_turns
from safety_neurons.prompts.records import Message, Prompt
from safety_neurons.results.thoughts import behind_thoughts, end_of_opened, without_start


@dataclass(frozen=True)
class Template:
    """How a prompt becomes text.

    Attributes:
        kind: `chat` (the tokenizer's template), `file` (a template of the caller's), `plain`, `tulu` or `none`.
        source: Text of the caller's Jinja template; empty otherwise.
        system: System prompt put before prompts that bring none.
        arguments: Variables given to a Jinja template, such as `enable_thinking`.
    """

    kind: str
    source: str = ""
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def render(self, tokenizer: Any, prompt: Prompt, notes: list[str] | None = None) -> str:
        """The text that is fed for a prompt, up to where the answer starts; every turn of the prompt stands in it.

        Args:
            tokenizer: Whose chat template and special tokens are used.
            prompt: Its turns, or its text as one.
            notes: Gets a line for what a Jinja template made different (white space it trims, a system text put into the user's turn).

        Raises:
            InputError: A Jinja template that refuses the turns, leaves something of them out, does not end, or is damaged.
        """
        turns = self._turns(prompt)
        if self.kind == "none":
            return "\n".join(turn.content for turn in turns)
        if self.kind == "plain":
            return _plain(turns)
        if self.kind == "tulu":
            return _tulu(turns, tokenizer.eos_token or "")
        return self._jinja(tokenizer, turns, notes=notes)

    def _turns(self, prompt: Prompt) -> list[Message]:
        """What is to be said: the prompt's own turns, behind the system prompt where they bring none."""
        turns = list(prompt.messages) or [Message("user", prompt.text)]
        if self.system is not None and turns[0].role != "system":
            turns.insert(0, Message("system", self.system))
        return turns

    @staticmethod
    def opens_thinking(text: str) -> bool:
        """Whether a rendered text ends in an opened thinking part: the first words behind it are thoughts without a mark of their own."""
        return end_of_opened(text) is not None

    def answered(self, tokenizer: Any, prompt: Prompt, answer: str) -> tuple[str, str, str]:
        """The texts of a prompt, of its answer behind it, and of what ends the answer's turn (empty where the template writes nothing).

        The first is what `render` gives, so that an answer is learnt behind exactly what is fed when one is asked for; a thinking part
        that the prompt's text opens is closed before the answer.

        Raises:
            InputError: A Jinja template that refuses the turns.
        """
        asked = self.render(tokenizer, prompt)
        turns = list(prompt.messages) or [Message("user", prompt.text)]
        if turns[-1].role == "assistant":
            return asked, answer, ""
        whole = Prompt(prompt.id, prompt.text, (*turns, Message("assistant", answer)))
        try:
            opened = self.render(tokenizer, whole)
        except InputError:  # some templates take the thoughts out of an answer; it is learnt whole all the same
            opened = ""
        behind = opened[len(asked) :] if opened.startswith(asked) and opened.rstrip().endswith(answer.rstrip()) else None
        if behind is not None and not behind.endswith(answer):  # templates cut white space at the end of an answer, which is part of it
            behind = behind.rstrip() + answer[len(answer.rstrip()) :]
        if behind is None:
            mark = end_of_opened(asked)
            behind = without_start(answer).lstrip("\n") if mark and behind_thoughts(answer) else answer
            behind = f"{mark}\n\n{answer}" if mark and not behind_thoughts(answer) else behind
        return asked, behind, self._end(tokenizer, (*turns, Message("assistant", behind_thoughts(answer) or answer)))

    def _end(self, tokenizer: Any, turns: Turns) -> str:
        """What the template writes behind an answer, the last of the turns."""
        if self.kind == "tulu":
            return tokenizer.eos_token or ""
        if self.kind in ("plain", "none"):
            return ""
        whole = self._turns(Prompt("", "", tuple(turns)))
        opened, closed = self._jinja(tokenizer, whole), self._jinja(tokenizer, whole, closed=True)
        return closed[len(opened) :] if closed.startswith(opened) else ""

    def _jinja(self, tokenizer: Any, turns: Turns, *, closed: bool = False, notes: list[str] | None = None) -> str:
        answering = turns[-1].role == "assistant"
        rendered = render_turns(
            tokenizer,
            turns,
            template=self.source or None,
            arguments=self.arguments,
            go_on=answering and not closed,
            answer_next=not answering,
        )
        if notes is not None:
            notes.extend(note for note in rendered.notes if note not in notes)
        return rendered.text


def template_for(
    tokenizer: Any, template: str | Path = "auto", *, system: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Template:
    """The template that `--template` means for a tokenizer.

    Args:
        tokenizer: The model's tokenizer; it is not changed.
        template: `auto` (its chat template, else `Question: … / Answer:`), `none`, `tulu`, or the path of a Jinja file.
        system: System prompt for prompts that bring none.
        arguments: Variables for a Jinja template.

    Raises:
        UsageError: A system prompt or template arguments where nothing would use them.
        InputError: A file that cannot be read.
    """
    name = str(template)
    if name == "auto":
        kind = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    elif name in ("none", "tulu"):
        kind = name
    else:
        kind = "file"
    if kind == "none" and system is not None:
        raise UsageError("a system prompt with template 'none', which feeds the text as it is: leave --system out or choose a template")
    if arguments and kind not in ("chat", "file"):
        raise UsageError(f"template arguments {sorted(arguments)} with template {kind!r}: only a chat template takes any")
    source = _read(Path(name)) if kind == "file" else ""
    return Template(kind, source, system, dict(arguments or {}))


def encode_text(tokenizer: Any, text: str, *, templated: bool) -> list[int]:
    """Token ids of a text: exactly one BOS where the tokenizer adds or the text brings one.

    Args:
        tokenizer: Not changed, its truncation and padding state included.
        text: What `Template.render` gave.
        templated: Leave out what the tokenizer would put behind the text (an EOS); False takes the tokenizer's ids as they are.
    """
    bos = tokenizer.bos_token_id
    with untouched(tokenizer):
        ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
        added = list(tokenizer("", verbose=False)["input_ids"]) if templated else []  # the text may be long: it is read once
    if bos is not None and added[:1] == [bos]:
        ids = [bos, *ids]
    if bos is not None and ids[:2] == [bos, bos]:
        return ids[1:]
    return ids


@contextlib.contextmanager
def untouched(tokenizer: Any) -> Iterator[None]:
    """Puts a fast tokenizer's truncation and padding back as they were, since every call of it sets them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "truncation"):
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if backend.truncation != truncation and truncation is not None:
            backend.enable_truncation(**truncation)
        if backend.padding != padding and padding is not None:
            backend.enable_padding(**padding)


def _plain(turns: Turns) -> str:
    parts = []
    for turn in turns:
        word = {"user": "Question: ", "assistant": "Answer: "}.get(turn.role, "")
        parts.append(f"{word}{turn.content}" + ("\n" if turn.role == "user" else "\n\n"))
    if turns[-1].role == "assistant":
        return "".join(parts).removesuffix("\n\n")
    return "".join(parts) + "Answer:"


def _tulu(turns: Turns, eos: str) -> str:
    parts = [f"<|{turn.role}|>\n{turn.content}" + (f"{eos}\n" if turn.role == "assistant" else "\n") for turn in turns]
    if turns[-1].role == "assistant":
        return "".join(parts).removesuffix(f"{eos}\n")
    return "".join(parts) + "<|assistant|>\n"


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        expected = "'auto', 'none', 'tulu' or the path of a Jinja file in UTF-8"
        raise InputError(f"template {str(path)!r}: cannot be read ({type(error).__name__}); expected {expected}") from error
    if not text.strip():
        raise InputError(f"template {str(path)!r}: the file is empty; expected a Jinja chat template")
    return text


def require_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or an error that says it is missing."""
    if tokenizer is None:
        raise ModelError("this model came without a tokenizer, and text was given: pass one to LanguageModel(model, tokenizer)")
    return tokenizer
