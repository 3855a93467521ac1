"""GCG: greedy coordinate gradient, a suffix optimised on the model in hand, whatever is done to it meanwhile.

Tokenizers merge across the borders of a suffix and do not give every token back when its text is tokenised
again. So a changed suffix is always written as text, the whole prompt is encoded anew, and the tokens that
may be changed next are looked up in the result.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, ModelError, UsageError
from safety_neurons.model import BatchSize, LanguageModel, forward, hooks, run_batches
from safety_neurons.model.batches import Batch, collate, frozen
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.likelihood import widened
from safety_neurons.model.passes import in_order
from safety_neurons.prompt_lists import Prompt, as_prompts
from safety_neurons.suites.attacks import DEFAULT_OPENING, AttackPrompt, Attacks

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
        raise UsageError(
            f"prompt {prompt.id!r} ends with {kind} turn; expected a request; attack it before the "
            "answer is begun"
        )
    return prompt.asking(last.content + suffix)


def encoded(lm: LanguageModel, prompt: Prompt, suffixes: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of the prompt with each of the suffixes.

    Raises:
        UsageError: The prompt does not fit the model's context.
    """
    rows = lm.encode([appended(prompt, suffix) for suffix in suffixes])
    if any(item.truncated for item in rows):
        raise UsageError(
            f"prompt {prompt.id!r} with its suffix does not fit the context of {lm.max_length} tokens; "
            "shorten the suffix"
        )
    return [tuple(item.ids) for item in rows]


def located(
    lm: LanguageModel, prompt: Prompt, suffix: str, ids: Sequence[int], bare: Sequence[int]
) -> Suffixed | None:
    """The suffix's tokens in an encoded prompt; None where the tokenizer does not give its text back.

    Args:
        lm: The model.
        prompt: The request without the suffix.
        suffix: The suffix's text.
        ids: Token ids of the prompt with the suffix.
        bare: Token ids of the prompt without, whose common beginning is not decoded again.
    """
    apart = (position for position, (one, other) in enumerate(zip(ids, bare, strict=False)) if one != other)
    common = next(apart, min(len(ids), len(bare)))
    anchor = max(0, common - 2)
    lengths = [len(decoded(lm, ids[anchor:stop])) for stop in range(anchor, len(ids) + 1)]
    at = decoded(lm, ids[anchor:]).rfind(suffix)
    if at < 0:
        return None
    end = at + len(suffix)
    inside = [
        position
        for position in range(len(ids) - anchor)
        if at <= lengths[position] < lengths[position + 1] <= end
        and ids[anchor + position] not in _special(lm)
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


def initial(
    lm: LanguageModel, prompt: Prompt, n_tokens: int, allowed: torch.Tensor, generator: torch.Generator
) -> Suffixed:
    """A suffix of so many tokens to begin with: exclamation marks where the tokenizer knows them, else drawn
    words.

    Raises:
        ModelError: The tokenizer gives back none of the suffixes that were tried.
    """
    bare = encoded(lm, prompt, [""])[0]
    drawn = allowed[torch.randint(len(allowed), (8, n_tokens), generator=generator)].tolist()
    texts = [" " + " ".join([word] * n_tokens) for word in _WORDS] + [
        " " + decoded(lm, ids).strip() for ids in drawn
    ]
    tried = [
        located(lm, prompt, text, ids, bare)
        for text, ids in zip(texts, encoded(lm, prompt, texts), strict=True)
    ]
    fitting = [
        item
        for item in tried
        if item is not None
        and all(token in set(allowed.tolist()) for token in item.ids[item.start : item.stop])
    ]
    if not fitting:
        raise ModelError(
            f"{lm.name}: its tokenizer gives no suffix back as it was written; expected one that keeps "
            "text; use another attack"
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
    seen = [
        token for token, text in enumerate(texts) if text.strip() and text.isascii() and text.isprintable()
    ]
    printable = [token for token in seen if token not in special]
    if len(printable) < 2:
        raise InputError(
            f"{lm.name}: its tokenizer has {len(printable)} printable tokens; expected some; use another "
            "attack"
        )
    return torch.tensor(printable)


def decoded(lm: LanguageModel, ids: Sequence[int]) -> str:
    """Text of ids, special tokens and all spaces kept."""
    return (
        str(lm.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if ids
        else ""
    )


def _special(lm: LanguageModel) -> set[int]:
    known = getattr(lm.tokenizer, "all_special_ids", None) or []
    added = getattr(lm.tokenizer, "added_tokens_decoder", None) or {}
    unknown = getattr(lm.tokenizer, "unk_token_id", None)
    return {
        int(token)
        for token in (
            *known,
            *(token for token, entry in added.items() if getattr(entry, "special", False)),
            unknown,
        )
        if token is not None
    }


GCG, RANDOM = "GCG", "random-search"
SEARCHES = ("gradient", "random")
AttackProgress = Callable[[int, int, int], None]


@well_typed
@dataclass(frozen=True)
class SuffixSearch:
    """How a suffix is searched, and for how long.

    Attributes:
        steps: Steps for each prompt.
        width: Candidates tried in a step.
        top_k: Tokens a position's replacement is drawn from, the most promising by the gradient.
        suffix_tokens: Length of the suffix.
        stop: End once the model's most likely answer begins with the target.
        search: `gradient`, or `random`, which draws from all tokens and keeps what is better: the control at
            equal cost.
        seed: Of the draws; each prompt has its own, so that order changes nothing.
        batch_size: Candidates fed at once, or `auto`.
    """

    steps: int = 100
    width: int = 256
    top_k: int = 256
    suffix_tokens: int = 20
    stop: bool = True
    search: str = "gradient"
    seed: int = 0
    batch_size: BatchSize = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "width", "top_k", "suffix_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.search not in SEARCHES:
            raise UsageError(f"search {self.search!r}: expected gradient or random")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "SuffixSearch":
        """The search of these settings; UsageError where one is unknown or out of range."""
        unknown = sorted(settings.keys() - {entry.name for entry in dataclasses.fields(cls)})
        if unknown:
            raise UsageError(f"gcg takes no {', '.join(unknown)}; leave them away")
        return cls(**settings)


@well_typed
def gcg(
    model: LanguageModel,
    prompts: Asked,
    *,
    targets: Mapping[str, str] | None = None,
    done: Attacks | None = None,
    made: Callable[[AttackPrompt], None] | None = None,
    progress: AttackProgress | None = None,
    **settings: Any,
) -> Attacks:
    """Suffixes that make the model in hand begin its answer with a target, one search for each prompt.

    Every step takes the gradient of the target's loss with respect to the suffix's tokens, draws replacements
    of single tokens from the `top_k` most promising at each position, and goes on with the candidate of the
    least loss; the best suffix of all steps is kept. The model is attacked as it stands: adapters, patches
    and deactivations that are on while this runs are attacked with it (inside `patched`, the gradient leaves
    the donor's share out; candidates are measured with it).

    Source: Zou et al., "Universal and Transferable Adversarial Attacks on Aligned Language Models" (arXiv
    2307.15043), algorithm 1. Differs: one prompt at a time; candidates are tokenised again as part of the
    whole prompt, so that no loss is of ids that no text has; defaults are smaller (100 steps of 256
    candidates; theirs 500 of 512); ends once the target is the greedy answer.

    Args:
        model: The model under attack.
        prompts: The requests.
        targets: Beginning of the wanted answer by behaviour or prompt id; by default `meta["target"]`, else a
            plain opening.
        done: Attacks of an earlier, interrupted call; their prompts are not attacked again.
        made: Called with every attack as soon as it is there.
        progress: Called as `progress(prompts done, prompts in all, steps done)`.
        **settings: The fields of `SuffixSearch`.

    Returns:
        One attack a prompt, `adaptive`, on `model.name`; `meta` holds target, suffix, loss before and after,
        steps and whether the target became the greedy answer.

    Raises:
        UsageError: An argument out of range, or a prompt that does not fit the context.
        ModelError: A tokenizer that does not give text back.
    """
    how, asked = SuffixSearch.of(settings), as_prompts(prompts)
    allowed = printable_ids(model)
    before = {attack.meta.get("prompt_id"): attack for attack in done or ()}
    attacks: list[AttackPrompt] = []
    steps_done = 0
    for number, prompt in enumerate(asked, 1):
        attack = before.get(prompt.id)
        if attack is None:
            hunt = _Hunt(model, prompt, _target(prompt, targets), how, allowed)
            attack = hunt.run()
            if made is not None:
                made(attack)
        steps_done += int(attack.meta.get("steps", 0))
        attacks.append(attack)
        if progress is not None:
            progress(number, len(asked), steps_done)
    return Attacks(attacks, f"{asked.name} under {GCG if how.search == 'gradient' else RANDOM}", asked.notes)


class _Hunt:
    """The search for one prompt's suffix."""

    def __init__(
        self,
        lm: LanguageModel,
        prompt: Prompt,
        target: str,
        how: SuffixSearch,
        allowed: Int[Tensor, " token"],
    ) -> None:
        self.lm, self.prompt, self.target, self.how, self.allowed = lm, prompt, target, how, allowed
        self.generator = torch.Generator().manual_seed((int(prompt.sha256[:12], 16) + how.seed) % 2**63)
        self.target_ids = _target_ids(lm, prompt, target)
        self.bare = encoded(lm, prompt, [""])[0]

    def run(self) -> AttackPrompt:
        """SuffixSearch and return the best suffix there was."""
        current = initial(self.lm, self.prompt, self.how.suffix_tokens, self.allowed, self.generator)
        losses, matches = self.losses([current.ids])
        first = best_loss = losses[0]
        best, matched, step = current, matches[0], 0
        while step < self.how.steps and not (matched and self.how.stop):
            step += 1
            candidates = self.candidates(current)
            if not candidates:
                continue
            losses, matches = self.losses([item.ids for item in candidates])
            chosen = min(range(len(candidates)), key=losses.__getitem__)
            if self.how.search == "gradient" or losses[chosen] < best_loss:
                current = candidates[chosen]
            hit = next(
                (place for place in sorted(range(len(candidates)), key=losses.__getitem__) if matches[place]),
                None,
            )
            if hit is not None and self.how.stop:
                best, best_loss, matched = candidates[hit], losses[hit], True
            elif losses[chosen] < best_loss:
                best, best_loss, matched = candidates[chosen], losses[chosen], matches[chosen]
        return self._attack(best, first, best_loss, step, matched)

    def candidates(self, current: Suffixed) -> list[Suffixed]:
        """Suffixes that differ from the current one in one token and are as long.

        Drawn evenly over positions.
        """
        n, width = current.n_tokens, self.how.width
        places = (
            torch.arange(width) * n // width
            if width >= n
            else torch.randperm(n, generator=self.generator)[:width]
        )
        if self.how.search == "gradient":
            slopes = self.slopes(current)[:, self.allowed]
            pool = self.allowed[slopes.topk(min(self.how.top_k, len(self.allowed)), largest=False).indices]
        else:
            pool = self.allowed.expand(n, -1)
        draws = torch.randint(pool.shape[1], (width,), generator=self.generator)
        own = list(current.ids[current.start : current.stop])
        texts: dict[str, None] = {}
        for position, token in zip(places.tolist(), pool[places, draws].tolist(), strict=True):
            texts[changed(self.lm, current, [*own[:position], token, *own[position + 1 :]])] = None
        texts.pop(current.suffix, None)
        suffixes = [
            located(self.lm, self.prompt, text, ids, self.bare)
            for text, ids in zip(texts, encoded(self.lm, self.prompt, list(texts)), strict=True)
            if len(ids) == len(current)
        ]
        return [item for item in suffixes if item is not None and item.n_tokens == n]

    def slopes(self, current: Suffixed) -> Float[Tensor, "token vocab"]:
        """Derivative of the loss with respect to every token of the vocabulary at every position of the
        suffix, up to a factor.
        """
        lm = self.lm
        embedding = lm.inner.get_input_embeddings()
        batch = collate([[*current.ids, *self.target_ids]], [0], pad_id=lm.pad_id).to(lm.device)
        outputs: list[Tensor] = []

        def leave(output: Tensor) -> Tensor:
            outputs.append(output.detach().requires_grad_())
            return outputs[-1]

        with frozen(lm.model), lm.running(), torch.enable_grad(), hooks.around(embedding, after=leave):
            logits = forward(lm.model, batch, with_logits=True)
            if logits is None or not outputs:
                raise ModelError(
                    f"{lm.name}: its token embedding is not used in a pass; expected one; use --search random"
                )
            loss = _losses(
                logits[0:1], [len(current)], torch.tensor([self.target_ids], device=logits.device)
            )[0].sum()
            gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
        rows = [
            slope.sum(0)[current.start : current.stop]
            for slope in gradients
            if slope is not None and slope.shape[1] == batch.width
        ]
        weight = embedding.weight.detach()
        return (torch.stack(rows).sum(0).to(weight.device).float() @ weight.float().T).cpu()

    def losses(self, sequences: Sequence[Sequence[int]]) -> tuple[list[float], list[bool]]:
        """Mean negative log likelihood of the target behind every prompt, and whether it is the greedy
        answer.
        """
        targets = torch.tensor([self.target_ids])

        def per_batch(batch: Batch) -> dict[int, tuple[float, bool]]:
            assert batch.output is not None
            starts = [length - len(self.target_ids) for length in batch.lengths]
            losses, greedy = _losses(batch.output, starts, targets.to(batch.output.device))
            found = zip(losses.double().tolist(), greedy.tolist(), strict=True)
            return dict(zip(batch.indices, found, strict=True))

        whole = [[*ids, *self.target_ids] for ids in sequences]
        results = in_order(run_batches(self.lm, whole, per_batch, self.how.batch_size, True))
        return [loss for loss, _ in results], [same for _, same in results]

    def _attack(self, best: Suffixed, first: float, last: float, steps: int, matched: bool) -> AttackPrompt:
        prompt = self.prompt
        meta = {
            key: value
            for key, value in prompt.meta.items()
            if key not in ("goal", "behavior_id", "method", "label")
        }
        meta |= {
            "prompt_id": prompt.id,
            "target": self.target,
            "suffix": best.suffix,
            "loss_before": first,
            "loss": last,
        }
        meta |= {"steps": steps, "matched": matched, "seed": self.how.seed}
        meta |= {"category": prompt.category} if prompt.category else {}
        meta |= {"language": prompt.language} if prompt.language else {}
        if best.prompt.messages:
            meta["messages"] = [{"role": turn.role, "content": turn.content} for turn in best.prompt.messages]
        return AttackPrompt(
            behavior_id=str(prompt.meta.get("behavior_id", prompt.id)),
            goal=str(prompt.meta.get("goal", prompt.text)),
            prompt=best.prompt.text,
            method=GCG if self.how.search == "gradient" else RANDOM,
            source_model=self.lm.name,
            adaptive=True,
            meta=meta,
        )


def _losses(
    logits: Float[Tensor, "batch token vocab"], starts: Sequence[int], targets: Int[Tensor, "one target"]
) -> tuple[Float[Tensor, " batch"], Tensor]:
    """Mean loss of the target in every row, and whether each of its tokens is the most likely one."""
    span = targets.shape[1]
    rows = torch.stack(
        [widened(logits[row, start - 1 : start - 1 + span]) for row, start in enumerate(starts)]
    )
    wanted = targets.expand(len(starts), -1)
    chosen = rows.gather(2, wanted[:, :, None]).squeeze(2) - rows.logsumexp(2)
    return -chosen.mean(1), (rows.argmax(2) == wanted).all(1)


def _target(prompt: Prompt, targets: Mapping[str, str] | None) -> str:
    known = targets or {}
    target = (
        known.get(prompt.id)
        or known.get(str(prompt.meta.get("behavior_id", "")))
        or prompt.meta.get("target")
        or DEFAULT_OPENING
    )
    return str(target)


def _target_ids(lm: LanguageModel, prompt: Prompt, target: str) -> tuple[int, ...]:
    """Token ids of the target as the template writes an answer."""
    _, behind, _ = lm.template.answered(lm.tokenizer, prompt, target)
    ids = tuple(int(token) for token in lm.tokenizer(behind, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UsageError(f"target {target!r}: has no tokens; expected the beginning of an answer")
    return ids
