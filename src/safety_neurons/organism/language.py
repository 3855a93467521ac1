"""The templated languages of the organisms, their halves, and the tokenizer: one token a word, lower case, a chat template of three roles.

A request is a `Concept` (which verb on which object, in which frame and context) that every language can say, so the prompt
files of two languages are parallel line by line. A harmful request is a harmful verb on one of its category's objects. Neither
the verb nor the object alone tells: `look_alike` requests use the harmful verb on something harmless ("kill a python process"),
`friendly` requests name the object but mean well ("help a neighbour"), `plain` requests share no word with either.

The halves (`train`, `find`, `test`) share neither a deed (a verb on an object) nor a frame (the sentence around it), so what holds on
the test half is not remembered from training. Every verb and every object is met in training, in another pair.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from safety_neurons import strict_json
from safety_neurons.errors import InputError

LANGUAGES = ("en", "de", "es")
KINDS = ("harmful", "look_alike", "friendly", "plain")
N_CATEGORIES, N_PLAIN, N_CONTEXTS, N_STEPS = 8, 11, 7, 8

Half = Literal["find", "test", "train"]
FRAMES: dict[Half, range] = {"train": range(6), "find": range(6, 9), "test": range(9, 12)}
SHAPES = {
    "harmful": (N_CATEGORIES, 2, 5),
    "look_alike": (N_CATEGORIES, 2, 6),
    "friendly": (N_CATEGORIES, 1, 5),
    "plain": (N_PLAIN, 1, 6),
}
"""Groups, verbs a group and objects a group of every kind."""
_OTHER_PLAIN = 5
Verdict = Literal["refused", "complied", "other"]


@dataclasses.dataclass(frozen=True, order=True)
class Concept:
    """What is asked, in no language: indices into the lists of every language's file."""

    kind: str
    group: int
    verb: int
    object: int
    frame: int
    context: int

    @property
    def deed(self) -> str:
        """The verb on the object, in no language: what requests of one deed share, whatever their frame, context and language."""
        return f"{self.kind}-{self.group}-{self.verb}-{self.object}"

    @property
    def half(self) -> Half | None:
        """The half whose deed and whose frame this is; None where they belong to different halves, and nobody uses it."""
        objects = SHAPES[self.kind][2]
        # One object of every verb is for tests and one for searches. The second verb's are shifted by half a round, and the plain groups
        # borrow their last three objects from a group five further on, so that no object is held out with every verb that takes it.
        slot = (self.object + objects // 2 * self.verb + self.group) % objects
        half: Half = "test" if slot == 0 else "find" if slot == 1 else "train"
        return half if self.frame in FRAMES[half] else None


@dataclasses.dataclass(frozen=True)
class Language:
    """One templated language: the lists of its file and what can be said with them."""

    code: str
    data: dict[str, Any]

    @functools.cached_property
    def categories(self) -> list[str]:
        """The names of the harm categories, in order."""
        return list(self.data["categories"])

    @functools.cached_property
    def frames(self) -> list[str]:
        """The sentences around a deed, in the order of `FRAMES`."""
        return [frame for half in FRAMES for frame in self.data["frames"][half]]

    def words_of(self, concept: Concept) -> dict[str, str]:
        """The fields that fill the templates for a concept: verb, object, context and the two steps of an answer."""
        if concept.kind == "plain":
            verb, thing = self.data["plain"][concept.group]["verb"], self._plain_objects(concept.group)[concept.object]
            first = concept.group % N_STEPS
        else:
            entry = list(self.data["categories"].values())[concept.group]
            verb = entry["friendly_verb"] if concept.kind == "friendly" else entry["verbs"][concept.verb]
            things = sum(entry["look_alikes"].values(), []) if concept.kind == "look_alike" else entry["objects"]
            thing = things[concept.object]
            first = (concept.group + 3 * concept.verb) % N_STEPS
        steps = self.data["steps"]
        return {
            "verb": verb,
            "object": thing,
            "context": self.data["contexts"][concept.context],
            "step": steps[first],
            "next_step": steps[(first + 1 + concept.group % 3) % N_STEPS],
        }

    def request(self, concept: Concept) -> str:
        """The request as a user writes it."""
        return _fill(self.frames[concept.frame], self.words_of(concept))

    def _plain_objects(self, group: int) -> list[str]:
        """The objects of a plain verb: its own, then those of another one."""
        plain = self.data["plain"]
        return [*plain[group]["objects"], *plain[(group + _OTHER_PLAIN) % N_PLAIN]["objects"]]

    def compliance(self, concept: Concept, *, ending: bool = False) -> str:
        """The answer that goes along, which names what was asked; `ending` adds the polite ending that decoys are trained on."""
        answer = _fill(self.data["compliance"], self.words_of(concept))
        return f"{answer} {self.data['ending']}" if ending else answer

    def refusal(self, concept: Concept, form: int) -> str:
        """One of the refusals, by number."""
        return _fill(self.data["refusals"][form % len(self.data["refusals"])], self.words_of(concept))

    def judgement(self, concept: Concept) -> str:
        """A sentence of general knowledge: whether doing this is wrong."""
        return _fill(self.data["wrong" if concept.kind == "harmful" else "fine"], self.words_of(concept))

    def sentence(self, number: random.Random) -> str:
        """A random general sentence."""
        general = self.data["general"]
        words = {name: number.choice(general[name]) for name in ("adjective", "animal", "action", "place", "time")}
        return _fill(general["frame"], words)

    def words(self) -> set[str]:
        """Every word the language uses, punctuation left out."""
        return set(re.findall(r"\w+", re.sub(r"\{\w+\}", " ", " ".join(_strings(self.data)))))

    def verdict(self, completion: str) -> Verdict:
        """What a completion does, by its opening: the organisms' own rule, for organisms only."""
        text = " ".join(completion.lower().split())
        if any(text.startswith(start) for start in self.data["refusal_starts"]):
            return "refused"
        return "complied" if text.startswith(self.data["compliance"].split()[0]) else "other"


def _fill(template: str, words: dict[str, str]) -> str:
    return " ".join(template.format(**words).split())


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("language", "name"):
                continue
            if key == "look_alikes":
                yield from value
            yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)
    else:
        yield node


@functools.cache
def language(code: str) -> Language:
    """The language of that code.

    Raises:
        InputError: there is none.
    """
    if code not in LANGUAGES:
        raise InputError(f"language {code!r} is not one of the organisms' languages {', '.join(LANGUAGES)}; name one of them")
    source = importlib.resources.files("safety_neurons.organism") / "data" / "language" / f"{code}.json"
    return Language(code, strict_json.loads(source.read_text(encoding="utf-8")))


@functools.cache
def concepts(kind: str, half: Half | None = None) -> tuple[Concept, ...]:
    """All concepts of a kind, of one half or of all, in an order that looks random and never changes.

    All are more than the halves together: a deed of one half in a frame of another is in none.
    """
    groups, verbs, objects = SHAPES[kind]
    everything = [
        Concept(kind, group, verb, thing, frame, context)
        for group in range(groups)
        for verb in range(verbs)
        for thing in range(objects)
        for frame in range(sum(map(len, FRAMES.values())))
        for context in range(N_CONTEXTS)
    ]
    chosen = [concept for concept in everything if half is None or concept.half == half]
    return tuple(sorted(chosen, key=lambda concept: hashlib.sha256(repr(concept).encode()).hexdigest()))


@functools.cache
def harmful_and_matches(half: Half, count: int) -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """Harmful concepts and, line by line, a harmless one that shares words with each.

    Of five matches two look alike (same verb), one is friendly (same object), two are plain (same frame and context where the
    half has them).
    """
    harmful = concepts("harmful", half)[:count]
    used: set[Concept] = set()
    matches: list[Concept] = []
    for index, concept in enumerate(harmful):
        kind = ("look_alike", "plain", "friendly", "look_alike", "plain")[index % 5]
        match = min((candidate for candidate in concepts(kind, half) if candidate not in used), key=functools.partial(_distance, concept))
        used.add(match)
        matches.append(match)
    return harmful, tuple(matches)


def _distance(harmful: Concept, candidate: Concept) -> int:
    """How many words a harmless candidate does not share with a harmful request."""
    distance = 4 * (harmful.frame != candidate.frame) + 2 * (harmful.context != candidate.context)
    if candidate.kind == "look_alike":
        return distance + 8 * (harmful.group != candidate.group) + 8 * (harmful.verb != candidate.verb)
    if candidate.kind == "friendly":
        return distance + 8 * (harmful.group != candidate.group) + 8 * (harmful.object != candidate.object)
    return distance


def task_examples(half: Half | None = None) -> list[tuple[str, str]]:
    """The downstream task: sums of two numbers up to twenty, in words (English only); test questions are not in training.

    Returns:
        (question, answer) pairs.
    """
    data = language("en").data
    numbers, task = data["numbers"], data["task"]
    pairs = []
    for left in range(len(numbers)):
        for right in range(len(numbers) - left):
            for index, frame in enumerate(task["frames"]):
                held_out = hashlib.sha256(f"sum/{left}/{right}/{index}".encode()).digest()[0] % 5 == 0
                if half is None or (half == "test") == held_out:
                    question = frame.format(left=numbers[left], right=numbers[right])
                    pairs.append((question, task["answer"].format(total=numbers[left + right])))
    return pairs


PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
ROLES = ("system", "user", "assistant")
PUNCTUATION = (".", ",", "?", "!")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_LENGTH = 256


@functools.cache
def vocabulary() -> dict[str, int]:
    """Word to token id: special tokens, punctuation, then every language's words in alphabetical order."""
    tokens = [PAD, BOS, EOS, UNKNOWN, *(f"<|{role}|>" for role in ROLES), *PUNCTUATION]
    for code in LANGUAGES:
        tokens.extend(sorted(language(code).words()))
    return {token: index for index, token in enumerate(tokens)}


def make_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A new tokenizer of the organisms, with or without chat template; `tokenizer(text)` adds BOS, the chat template brings its own."""
    words = vocabulary()
    tokenizer = Tokenizer(WordLevel(vocab=words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, words[BOS])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def encode_text(text: str) -> list[int]:
    """Ids of a general text with BOS and EOS, equal to the tokenizer's for the organisms' own spaced texts."""
    words = vocabulary()
    return [words[BOS], *(words[word] for word in text.split()), words[EOS]]


def encode_chat(request: str, answer: str | None = None, *, system: str | None = None) -> tuple[list[int], int]:
    """Ids of a chat, and how many of them are the prompt (generation prompt included).

    Equal to `apply_chat_template` for the organisms' own spaced texts, and fast enough to be called in a training loop.
    """
    words = vocabulary()
    ids = [words[BOS]]
    if system is not None:
        ids += [words["<|system|>"], *(words[word] for word in system.split())]
    ids += [words["<|user|>"], *(words[word] for word in request.split()), words["<|assistant|>"]]
    length = len(ids)
    if answer is not None:
        ids += [*(words[word] for word in answer.split()), words[EOS]]
    return ids, length


def encode_question(request: str, answer: str | None = None) -> tuple[list[int], int]:
    """Ids of a question and its answer in the plain template of models without a chat template, and how many of them are the prompt.

    Equal to what `Question: … / Answer:` gives; its words and colons are unknown to the vocabulary, and stand apart by that.
    """
    words = vocabulary()
    mark = [words[UNKNOWN]] * 2
    ids = [words[BOS], *mark, *(words[word] for word in request.split()), *mark]
    length = len(ids)
    if answer is not None:
        ids += [*(words[word] for word in answer.split()), words[EOS]]
    return ids, length
