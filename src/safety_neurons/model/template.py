"""Prompts to token ids: chat templates, the plain template, system prompts; one BOS, never two, never none where the tokenizer adds one."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safety_neurons.errors import InputError, ModelError, UsageError
from safety_neurons.model.adapters import first_line
from safety_neurons.prompts.records import Message, Prompt

Turns = Sequence[Message]
_THINKING = re.compile(r"<(think|thinking|reasoning)>\s*$")


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

    def render(self, tokenizer: Any, prompt: Prompt) -> str:
        """The text that is fed for a prompt, up to where the answer starts.

        Raises:
            InputError: A Jinja template that refuses the turns (a system prompt, say) or is damaged.
        """
        turns = list(prompt.messages) or [Message("user", prompt.text)]
        if self.system is not None and turns[0].role != "system":
            turns.insert(0, Message("system", self.system))
        if self.kind == "none":
            return "\n".join(turn.content for turn in turns)
        if self.kind == "plain":
            return _plain(turns)
        if self.kind == "tulu":
            return _tulu(turns, tokenizer.eos_token or "")
        return self._jinja(tokenizer, turns)

    @staticmethod
    def opens_thinking(text: str) -> bool:
        """Whether a rendered text ends in an opened thinking part: the first words behind it are thoughts without a mark of their own."""
        return _THINKING.search(text) is not None

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
        opened = self.render(tokenizer, whole)
        behind = opened[len(asked) :] if opened.startswith(asked) and opened.rstrip().endswith(answer.rstrip()) else None
        if behind is None:
            behind = f"</{mark[1]}>\n\n{answer}" if (mark := _THINKING.search(asked)) else answer
        return asked, behind, self._end(tokenizer, whole, opened)

    def _end(self, tokenizer: Any, whole: Prompt, opened: str) -> str:
        """What the template writes behind an answer."""
        if self.kind == "tulu":
            return tokenizer.eos_token or ""
        if self.kind in ("plain", "none"):
            return ""
        turns = list(whole.messages)
        if self.system is not None and turns[0].role != "system":
            turns.insert(0, Message("system", self.system))
        closed = self._jinja(tokenizer, turns, closed=True)
        return closed[len(opened) :] if closed.startswith(opened) else ""

    def _jinja(self, tokenizer: Any, turns: Turns, *, closed: bool = False) -> str:
        answering = turns[-1].role == "assistant"
        options = {"add_generation_prompt": not answering, "continue_final_message": answering and not closed}
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        template = self.source or None
        try:
            return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options, **dict(self.arguments))
        except Exception as error:  # a template is a program: it raises what it likes
            roles = ", ".join(turn.role for turn in turns)
            advice = "leave --system out or choose another --template" if turns[0].role == "system" else "choose another --template"
            raise InputError(f"the chat template refuses turns of {roles} ({first_line(error)}); {advice}") from error


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
    with untouched(tokenizer):
        bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        full = list(tokenizer(text, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if templated:
        adds = len(full) > len(bare) and bos is not None and full[0] == bos
        full = [bos, *bare] if adds else bare
    if bos is not None and full[:2] == [bos, bos]:
        return full[1:]
    return full


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
        return "".join(parts).rstrip("\n")
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
