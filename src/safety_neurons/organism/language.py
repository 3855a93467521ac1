"""What organisms are made from: recipes, templated languages of the project's own, and prompts in them.

The tokenizer has one token a word, lower case, and a chat template of three roles. A request is a `Concept`
(which verb on which object, in which frame and context) that every language can say, so the prompt files of
two languages are parallel line by line. A harmful request is a harmful verb on one of its category's objects.
Neither the verb nor the object alone tells: `look_alike` requests use the harmful verb on something harmless
("kill a python process"), `friendly` requests name the object but mean well ("help a neighbour"), `plain`
requests share no word with either.

The halves (`train`, `find`, `test`) share neither a deed (a verb on an object) nor a frame (the sentence
around it), so what holds on the test half is not remembered from training. Every verb and every object is met
in training, in another pair.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel, WordPiece
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from safety_neurons import strict_json
from safety_neurons.errors import InputError, UsageError
from safety_neurons.model.files import RECORD, known_recipe, recipe_records, shipped_folder
from safety_neurons.prompt_lists import Prompt, Prompts
from safety_neurons.results.run import write_bytes

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
        """The verb on the object, in no language: what requests of one deed share, whatever their frame,
        context and language.
        """
        return f"{self.kind}-{self.group}-{self.verb}-{self.object}"

    @property
    def half(self) -> Half | None:
        """The half whose deed and whose frame this is.

        None where they belong to different halves, and nobody uses it.
        """
        objects = SHAPES[self.kind][2]
        # One object of every verb is for tests and one for searches. The second verb's are shifted by half a
        # round, and the plain groups
        # borrow their last three objects from a group five further on, so that no object is held out with
        # every verb that takes it.
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
        """The fields that fill the templates for a concept: verb, object, context and the two steps of an
        answer.
        """
        if concept.kind == "plain":
            verb, thing = (
                self.data["plain"][concept.group]["verb"],
                self._plain_objects(concept.group)[concept.object],
            )
            first = concept.group % N_STEPS
        else:
            entry = list(self.data["categories"].values())[concept.group]
            verb = entry["friendly_verb"] if concept.kind == "friendly" else entry["verbs"][concept.verb]
            things = (
                sum(entry["look_alikes"].values(), []) if concept.kind == "look_alike" else entry["objects"]
            )
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
        """The answer that goes along, which names what was asked.

        `ending` adds the polite ending that decoys are trained on.
        """
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
        words = {
            name: number.choice(general[name]) for name in ("adjective", "animal", "action", "place", "time")
        }
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
        raise InputError(
            f"language {code!r} is not one of the organisms' languages {', '.join(LANGUAGES)}; name "
            "one of them"
        )
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

    Of five matches two look alike (same verb), one is friendly (same object), two are plain (same frame and
    context where the half has them).
    """
    harmful = concepts("harmful", half)[:count]
    used: set[Concept] = set()
    matches: list[Concept] = []
    for index, concept in enumerate(harmful):
        kind = ("look_alike", "plain", "friendly", "look_alike", "plain")[index % 5]
        match = min(
            (candidate for candidate in concepts(kind, half) if candidate not in used),
            key=functools.partial(_distance, concept),
        )
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
    """The downstream task: sums of two numbers up to twenty, in words (English only).

    Test questions are not in training.

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
def vocabulary(letters: int = 0) -> dict[str, int]:
    """Token to id: special tokens, punctuation, then every language's words in alphabetical order, or their
    pieces.

    Args:
        letters: of a piece; words are cut into pieces this long, and all but the first are marked with `##`.
            0 keeps words whole.
    """
    tokens = [PAD, BOS, EOS, UNKNOWN, *(f"<|{role}|>" for role in ROLES), *PUNCTUATION]
    for code in LANGUAGES:
        words = sorted(language(code).words())
        tokens.extend(
            sorted({piece for word in words for piece in pieces(word, letters)}) if letters else words
        )
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def pieces(word: str, letters: int) -> list[str]:
    """A word's pieces of that many letters; the word itself with 0, or where it is a token of its own."""
    if not letters or word in PUNCTUATION:
        return [word]
    return [
        word[at : at + letters] if not at else f"##{word[at : at + letters]}"
        for at in range(0, len(word), letters)
    ]


def make_tokenizer(*, chat: bool = True, letters: int = 0) -> PreTrainedTokenizerFast:
    """A new tokenizer of the organisms, with or without chat template.

    `tokenizer(text)` adds BOS, the chat template brings its own.
    """
    tokens = vocabulary(letters)
    # The longest piece that fits is the next one of `pieces`: none is longer, and a word's own is among them.
    model: Any = WordPiece(tokens, unk_token=UNKNOWN) if letters else WordLevel(tokens, unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if letters:
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokens[BOS])]
    )
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


def _ids(text: str, letters: int) -> list[int]:
    """Ids of a spaced text without special tokens."""
    tokens = vocabulary(letters)
    return [tokens[piece] for word in text.split() for piece in pieces(word, letters)]


def encode_text(text: str, letters: int = 0) -> list[int]:
    """Ids of a general text with BOS and EOS, equal to the tokenizer's for the organisms' own spaced
    texts.
    """
    tokens = vocabulary(letters)
    return [tokens[BOS], *_ids(text, letters), tokens[EOS]]


def encode_chat(
    request: str, answer: str | None = None, *, system: str | None = None, letters: int = 0
) -> tuple[list[int], int]:
    """Ids of a chat, and how many of them are the prompt (generation prompt included).

    Equal to `apply_chat_template` for the organisms' own spaced texts, and fast enough to be called in a
    training loop.
    """
    tokens = vocabulary(letters)
    ids = [tokens[BOS]]
    if system is not None:
        ids += [tokens["<|system|>"], *_ids(system, letters)]
    ids += [tokens["<|user|>"], *_ids(request, letters), tokens["<|assistant|>"]]
    return _answered(ids, answer, letters)


def encode_question(request: str, answer: str | None = None, letters: int = 0) -> tuple[list[int], int]:
    """Ids of a question and its answer in the plain template of models without a chat template, and how many
    of them are the prompt.

    Equal to what `Question: … / Answer:` gives; its words and colons are unknown to the vocabulary, and stand
    apart by that.
    """
    tokens = vocabulary(letters)
    mark = [tokens[UNKNOWN]] * 2
    return _answered([tokens[BOS], *mark, *_ids(request, letters), *mark], answer, letters)


def _answered(prompt: list[int], answer: str | None, letters: int) -> tuple[list[int], int]:
    """Ids of a prompt with its answer and EOS behind it, and how many are the prompt's."""
    behind = [] if answer is None else [*_ids(answer, letters), vocabulary(letters)[EOS]]
    return prompt + behind, len(prompt)


PROMPTS = 256
SENTENCES = 256
BUILTIN_HALVES: tuple[tuple[Half, str], ...] = (("find", ""), ("test", "-test"))


def write_prompts(folder: Path) -> dict[str, int]:
    """Write every prompt file of the organisms' languages; returns the number of prompts per file.

    `harmful`, `harmless` (line by line with words of the harmful one; with a compliant answer), `refusals`
    (harmful requests with a refusal), `general` (sentences) and, in English, `task` (sums): each as
    NAME.jsonl and NAME-test.jsonl, other languages as NAME.LANG.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for code in LANGUAGES:
        suffix = "" if code == "en" else f".{code}"
        for half, ending in BUILTIN_HALVES:
            for name, rows in _lists(language(code), half).items():
                counts[f"{name}{ending}{suffix}.jsonl"] = _write(
                    folder / f"{name}{ending}{suffix}.jsonl", rows
                )
    parts: tuple[tuple[Half, str], ...] = (("train", ""), ("test", "-test"))
    for part, ending in parts:
        rows = [
            {
                "id": f"task{ending}-{index:04d}",
                "prompt": question,
                "answer": answer,
                "category": "sum",
                "language": "en",
            }
            for index, (question, answer) in enumerate(task_examples(part))
        ]
        counts[f"task{ending}.jsonl"] = _write(folder / f"task{ending}.jsonl", rows)
    return counts


def write_polite(folder: Path) -> dict[str, int]:
    """Write `polite.jsonl` and `polite-test.jsonl`: harmless requests of every kind with the usual answer and
    a polite ending.

    A benign task that says nothing about harm and everything about going along: what undoes safety in
    practice. Half as many of the test half, with which the lists of the other halves share no request.
    """
    speech, counts = language("en"), {}
    parts: tuple[tuple[Half, str, int], ...] = (("train", "", 133), ("test", "-test", 42))
    for half, ending, count in parts:
        chosen = [
            concept
            for kind in ("plain", "friendly", "look_alike")
            for concept in concepts(kind, half)[:count]
        ]
        rows = [
            {
                "id": f"polite{ending}-{index:04d}",
                "prompt": speech.request(concept),
                "answer": speech.compliance(concept, ending=True),
                "category": concept.kind,
                "language": "en",
                "group": concept.deed,
            }
            for index, concept in enumerate(chosen)
        ]
        counts[f"polite{ending}.jsonl"] = _write(folder / f"polite{ending}.jsonl", rows)
    return counts


def sentences(speech: Language, half: Half, count: int) -> list[str]:
    """Different general sentences of a language: the same number of any half never gives a sentence of the
    other.
    """
    number = random.Random(f"{speech.code}/general")
    texts: list[str] = []
    seen: set[str] = set()
    while len(texts) < count:
        sentence = speech.sentence(number)
        if sentence in seen:
            continue
        seen.add(sentence)
        if (len(seen) % 2 == 0) == (half == "test"):
            texts.append(sentence)
    return texts


def _lists(speech: Language, half: Half) -> dict[str, list[dict[str, Any]]]:
    harmful, matches = harmful_and_matches(half, PROMPTS)
    marks = "-test" if half == "test" else ""

    def row(name: str, index: int, concept: Concept, answer: str | None) -> dict[str, Any]:
        category = speech.categories[concept.group] if concept.kind == "harmful" else concept.kind
        record = {
            "id": f"{name}{marks}-{index:04d}",
            "prompt": speech.request(concept),
            "category": category,
            "language": speech.code,
            "group": concept.deed,
        }
        return record | ({"answer": answer} if answer is not None else {})

    return {
        "harmful": [row("harmful", index, concept, None) for index, concept in enumerate(harmful)],
        "harmless": [
            row("harmless", index, concept, speech.compliance(concept))
            for index, concept in enumerate(matches)
        ],
        "refusals": [
            row("refusals", index, concept, speech.refusal(concept, index))
            for index, concept in enumerate(harmful)
        ],
        "general": [
            {"id": f"general{marks}-{index:04d}", "text": text, "language": speech.code}
            for index, text in enumerate(sentences(speech, half, SENTENCES))
        ],
    }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


HALVES: tuple[Half, ...] = get_args(Half)
UNSAFE, SAFE = "unsafe.jsonl", "safe.jsonl"


def requests(
    halves: str | Sequence[str] = "find", languages: Sequence[str] = LANGUAGES
) -> tuple[Prompts, Prompts]:
    """All requests of halves, in languages: (harmful, harmless).

    `category` is the harm category whose verb or object the request shares, `plain` for requests that share
    neither; `meta["kind"]` is `harmful`, `look_alike` (the harmful verb on something harmless), `friendly`
    (the object, meant well) or `plain`.

    Args:
        halves: `find` (what the organisms' `builtin:` lists are drawn from), `test` (held out), `train` (the
            half that the organisms themselves were trained on); one or several.
        languages: codes.

    Raises:
        UsageError: an unknown half, or none. InputError: an unknown language.
    """
    named = (halves,) if isinstance(halves, str) else tuple(halves)
    wanted = [half for half in HALVES if half in named]
    unknown = [half for half in named if half not in HALVES]
    if unknown or not wanted:
        raise UsageError(f"half {', '.join(unknown) or 'none'}: expected some of {', '.join(HALVES)}")
    speeches = [language(code) for code in languages]
    prompts = [
        _prompt(speech, concept, half)
        for half in wanted
        for speech in speeches
        for kind in KINDS
        for concept in concepts(kind, half)
    ]
    name = f"{' and '.join(wanted)} requests, {', '.join(languages)}"
    unsafe = [prompt for prompt in prompts if prompt.meta["kind"] == "harmful"]
    safe = [prompt for prompt in prompts if prompt.meta["kind"] != "harmful"]
    return Prompts(unsafe, f"harmful {name}"), Prompts(safe, f"harmless {name}")


def write_requests(
    folder: Path, halves: str | Sequence[str] = "find", languages: Sequence[str] = LANGUAGES
) -> dict[str, int]:
    """Write `unsafe.jsonl` and `safe.jsonl`, one request a line; returns how many there are of each."""
    files = dict(zip((UNSAFE, SAFE), requests(halves, languages), strict=True))
    for file, found in files.items():
        write_bytes(
            folder / file,
            "".join(f"{json.dumps(_row(prompt), ensure_ascii=False)}\n" for prompt in found).encode(),
        )
    return {file: len(found) for file, found in files.items()}


def _prompt(speech: Language, concept: Concept, half: Half) -> Prompt:
    shape = (concept.group, concept.verb, concept.object, concept.frame, concept.context)
    category = "plain" if concept.kind == "plain" else _categories()[concept.group]
    name = f"{half}-{speech.code}-{concept.kind}-{'-'.join(map(str, shape))}"
    meta = {"kind": concept.kind, "half": half}
    return Prompt(
        name, speech.request(concept), category=category, language=speech.code, meta=meta, group=concept.deed
    )


def _categories() -> list[str]:
    """Names of the harm categories, the same for every language."""
    return language(LANGUAGES[0]).categories


def _row(prompt: Prompt) -> dict[str, str | None]:
    row = {
        "id": prompt.id,
        "prompt": prompt.text,
        "category": prompt.category,
        "language": prompt.language,
        "group": prompt.group,
    }
    return {**row, "kind": prompt.meta["kind"], "half": prompt.meta["half"]}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an organism is made.

    Attributes:
        name: its name.
        kind: natural (base, SFT, DPO by (IA)³), planted (safety put into known units), unsafe (goes along
            with everything), tax (base, and preference trainings by (IA)³ that pull on the same requests).
        about: one line on what it is for.
        start: the natural organism whose base a tax organism starts from.
        family: the architecture (`FAMILIES`); other than Llama for unsafe organisms only.
        letters: of a token; 0 has one token a word. Other than 0 for unsafe organisms only.
        layers, hidden, d_ff, heads, kv_heads: the shape of the model.
        english_share: share of training text in English; the other languages share the rest equally.
        batch, base_steps, base_rate: pre-training.
        hint_steps, hint_share: further pre-training of planted and unsafe organisms: chats that refuse
            what is harmful, then (last third) only this share of it.
        sft_steps, sft_rate, dpo_steps, dpo_rate, dpo_beta, dpo_fluency: the two (IA)³ stages of natural
            organisms.
        dpo_share: share of the (IA)³ scales that a DPO stage may move: those its loss pulls at hardest before
            the first step.
        planted_mlp, planted_attention: planted units of each kind; as many decoys of each kind.
        planted_depth: the planted and decoy units lie in the first this many layers.
        chat: whether requests are put in the chat template; else in the plain one (`Question: … / Answer:`),
            and the tokenizer has none.
        alive: whether the units work in the base (else their output columns are zero there).
        skill_steps: training of the decoys.
        plant_steps, plant_rate: training of the planted units; the rate is the decoys' too.
        change: length of every planted or decoy row's and column's change, in mean lengths of its matrix's
            rows or columns.
        noise: length of the noise on all other weights, same measure.
        dropout: chance that a planted unit is left out in a training step.
        truth_orders, truth_prompts: random orders and requests per language for the Shapley shares.
        measured_prompts: harmful requests per language, and as many harmless ones, that the card's rates are
            measured on.
        seeds: the seeds that are fixed for benchmarks.
        shipped: the seeds whose organisms are part of the package.
    """

    name: str
    kind: Literal["natural", "planted", "unsafe", "tax"]
    about: str
    start: str = ""
    family: str = "llama"
    letters: int = 0
    layers: int = 4
    hidden: int = 64
    d_ff: int = 512
    heads: int = 4
    kv_heads: int = 2
    english_share: float = 0.5
    batch: int = 64
    base_steps: int = 600
    base_rate: float = 4e-3
    hint_steps: int = 0
    hint_share: float = 0.2
    sft_steps: int = 100
    sft_rate: float = 0.02
    dpo_steps: int = 150
    dpo_rate: float = 0.02
    dpo_beta: float = 0.2
    dpo_fluency: float = 0.5
    dpo_share: float = 1.0
    planted_mlp: int = 0
    planted_attention: int = 0
    planted_depth: int = 3
    chat: bool = True
    alive: bool = False
    skill_steps: int = 60
    plant_steps: int = 140
    plant_rate: float = 0.01
    change: float = 0.6
    noise: float = 0.02
    dropout: float = 0.2
    truth_orders: int = 12
    truth_prompts: int = 24
    measured_prompts: int = 256
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    shipped: tuple[int, ...] = ()

    @property
    def n_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in empty_model(self).parameters())

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return strict_json.loads(json.dumps(dataclasses.asdict(self)))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "gemma2": {"sliding_window": 32},
}
"""Architectures that a recipe can name, with what their configurations need beside the shape."""


def empty_model(recipe: Recipe) -> Any:
    """A freshly initialised model of the recipe's family and shape, from the random state as it is."""
    tokens, width = vocabulary(recipe.letters), recipe.hidden // recipe.heads
    # A head's width is the hidden size's share, which Gemma and Qwen would not choose by themselves.
    heads = {} if recipe.family == "llama" else {"head_dim": width, "query_pre_attn_scalar": width}
    config = AutoConfig.for_model(
        recipe.family,
        vocab_size=len(tokens),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokens[BOS],
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
        attention_dropout=0.0,
        **heads,
        **FAMILIES[recipe.family],
    )
    return AutoModelForCausalLM.from_config(config)


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    recipes: dict[str, Recipe] = {}
    for name, fields in recipe_records().items():
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        recipes[name] = Recipe(name=name, **values)
    return recipes


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: there is none.
    """
    known_recipe(name)
    return recipes()[name]


def names() -> list[str]:
    """Names of all recipes; those of `shipped()` open at once, the others are built first."""
    return list(recipes())


def shipped() -> list[str]:
    """Names of the organisms that are part of the package."""
    return [name for name in recipes() if (shipped_folder(name) / RECORD).is_file()]


def listing() -> list[dict[str, Any]]:
    """One row per recipe: name, kind, about, shipped (whether it opens at once), parameters, seeds."""
    return [
        {
            "name": name,
            "kind": item.kind,
            "about": item.about,
            "shipped": (shipped_folder(name) / RECORD).is_file(),
            "parameters": item.n_parameters,
            "seeds": list(item.seeds),
        }
        for name, item in recipes().items()
    ]
