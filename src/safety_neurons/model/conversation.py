"""A finished conversation as a guard model is asked about it: the checkpoint's own chat template around both turns."""

from collections.abc import Sequence
from typing import Any

from safety_neurons.errors import InputError
from safety_neurons.model.adapters import first_line


def conversation_text(tokenizer: Any, turns: Sequence[tuple[str, str]], *, parts: bool = False, **arguments: Any) -> str:
    """The text a guard is fed, up to where its verdict starts.

    Args:
        tokenizer: With a chat template.
        turns: Roles and contents.
        parts: Try contents as lists of parts first (multimodal guards); the other way is tried where a turn's text is lost or refused.
        **arguments: Variables for the template.

    Raises:
        InputError: The template refuses the turns or leaves one out.
    """
    why = "leaves out what was said"
    for listed in (parts, not parts):
        messages = [{"role": role, "content": [{"type": "text", "text": text}] if listed else text} for role, text in turns]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
        except Exception as error:  # a template is a program: it raises what it likes
            why = first_line(error)
            continue
        if all(content.strip() in text for _, content in turns) and (not listed or "'type': 'text'" not in text):
            return str(text)
    raise InputError(f"the judge's chat template cannot take a conversation of {', '.join(role for role, _ in turns)} ({why})")
