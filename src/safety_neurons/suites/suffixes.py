"""A suffix of a request as tokens that can be changed one at a time, without ever leaving text: what is measured is what is fed.

Tokenizers merge across the borders of a suffix and do not give every token back when its text is tokenised again. So a changed suffix is
always written as text, the whole prompt is encoded anew, and the tokens that may be changed next are looked up in the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safety_neurons.errors import InputError, ModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.prompts import Prompt

_WORDS = ("!", "x", "*", "the")


@dataclass(frozen=True)
class Suffixed:
    """A request with a suffix, as the model gets it.

    Attributes:
        prompt: The request with its suffix.
        suffix: The suffix's text, the space before it included.
        ids: Token ids of the whole prompt, template included.
        start: First token that lies wholly inside the suffix.
        stop: The token behind the last one.
        head: The suffix's text before the first such token.
        tail: The suffix's text behind the last.
    """

    prompt: Prompt
    suffix: str
    ids: tuple[int, ...]
    start: int
    stop: int
    head: str = ""
    tail: str = ""

    @property
    def n_tokens(self) -> int:
        """Tokens that can be changed."""
        return self.stop - self.start

    def __len__(self) -> int:
        return len(self.ids)


def appended(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt with a text behind its request."""
    last = prompt.turns[-1]
    if last.role != "user":
        kind = "an assistant's" if last.role == "assistant" else f"a {last.role}"
        raise UsageError(f"prompt {prompt.id!r} ends with {kind} turn; expected a request; attack it before the answer is begun")
    return prompt.asking(last.content + suffix)


def encoded(lm: LanguageModel, prompt: Prompt, suffixes: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of the prompt with each of the suffixes.

    Raises:
        UsageError: The prompt does not fit the model's context.
    """
    found = lm.encode([appended(prompt, suffix) for suffix in suffixes])
    if any(item.truncated for item in found):
        raise UsageError(f"prompt {prompt.id!r} with its suffix does not fit the context of {lm.max_length} tokens; shorten the suffix")
    return [tuple(item.ids) for item in found]


def located(lm: LanguageModel, prompt: Prompt, suffix: str, ids: Sequence[int], bare: Sequence[int]) -> Suffixed | None:
    """The suffix's tokens in an encoded prompt; None where the tokenizer does not give its text back.

    Args:
        lm: The model.
        prompt: The request without the suffix.
        suffix: The suffix's text.
        ids: Token ids of the prompt with the suffix.
        bare: Token ids of the prompt without, whose common beginning is not decoded again.
    """
    common = next((place for place, (one, other) in enumerate(zip(ids, bare, strict=False)) if one != other), min(len(ids), len(bare)))
    anchor = max(0, common - 2)
    lengths = [len(decoded(lm, ids[anchor:stop])) for stop in range(anchor, len(ids) + 1)]
    at = decoded(lm, ids[anchor:]).rfind(suffix)
    if at < 0:
        return None
    end = at + len(suffix)
    inside = [
        place
        for place in range(len(ids) - anchor)
        if at <= lengths[place] < lengths[place + 1] <= end and ids[anchor + place] not in _special(lm)
    ]
    if not inside or inside != list(range(inside[0], inside[-1] + 1)):
        return None
    return Suffixed(
        appended(prompt, suffix),
        suffix,
        tuple(ids),
        anchor + inside[0],
        anchor + inside[-1] + 1,
        suffix[: lengths[inside[0]] - at],
        suffix[len(suffix) - (end - lengths[inside[-1] + 1]) :] if end > lengths[inside[-1] + 1] else "",
    )


def initial(lm: LanguageModel, prompt: Prompt, n_tokens: int, allowed: torch.Tensor, generator: torch.Generator) -> Suffixed:
    """A suffix of so many tokens to begin with: exclamation marks where the tokenizer knows them, else drawn words.

    Raises:
        ModelError: The tokenizer gives back none of the suffixes that were tried.
    """
    bare = encoded(lm, prompt, [""])[0]
    drawn = allowed[torch.randint(len(allowed), (8, n_tokens), generator=generator)].tolist()
    texts = [" " + " ".join([word] * n_tokens) for word in _WORDS] + [" " + decoded(lm, ids).strip() for ids in drawn]
    tried = [located(lm, prompt, text, ids, bare) for text, ids in zip(texts, encoded(lm, prompt, texts), strict=True)]
    fitting = [
        item for item in tried if item is not None and all(token in set(allowed.tolist()) for token in item.ids[item.start : item.stop])
    ]
    if not fitting:
        raise ModelError(
            f"{lm.name}: its tokenizer gives no suffix back as it was written; expected one that keeps text; use another attack"
        )
    return min(fitting, key=lambda item: abs(item.n_tokens - n_tokens))


def changed(lm: LanguageModel, current: Suffixed, ids: Sequence[int]) -> str:
    """The suffix's text with other tokens in place of those that can be changed."""
    before = list(current.ids[max(0, current.start - 1) : current.start])
    return current.head + decoded(lm, [*before, *ids])[len(decoded(lm, before)) :] + current.tail


def printable_ids(lm: LanguageModel) -> torch.Tensor:
    """Tokens a suffix may be made of: printable ASCII with something to see, no special ones."""
    tokenizer = lm.tokenizer
    size = min(len(tokenizer), lm.n_ids)
    texts = tokenizer.batch_decode([[token] for token in range(size)], clean_up_tokenization_spaces=False)
    special = _special(lm)
    kept = [token for token, text in enumerate(texts) if token not in special and text.strip() and text.isascii() and text.isprintable()]
    if len(kept) < 2:
        raise InputError(f"{lm.name}: its tokenizer has {len(kept)} printable tokens; expected some; use another attack")
    return torch.tensor(kept)


def decoded(lm: LanguageModel, ids: Sequence[int]) -> str:
    """Text of ids, special tokens and all spaces kept."""
    return str(lm.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _special(lm: LanguageModel) -> set[int]:
    known = getattr(lm.tokenizer, "all_special_ids", None) or []
    added = getattr(lm.tokenizer, "added_tokens_decoder", None) or {}
    unknown = getattr(lm.tokenizer, "unk_token_id", None)
    return {
        int(token)
        for token in (*known, *(token for token, entry in added.items() if getattr(entry, "special", False)), unknown)
        if token is not None
    }
