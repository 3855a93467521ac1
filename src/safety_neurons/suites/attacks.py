"""Read and write attack prompts made elsewhere: one record of behaviour, goal, prompt, method and source
model for every file format.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from safety_neurons import strict_json
from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompt_lists import Message, Prompt, Prompts, normalised, prompts
from safety_neurons.prompt_lists.columns import (
    LISTS,
    METADATA,
    SPLITS,
    find_column,
    folded,
    is_known_column,
    plan_for,
)
from safety_neurons.prompt_lists.labels import labelled_otherwise
from safety_neurons.prompt_lists.readers import file_format, read_text
from safety_neurons.prompt_lists.records import label_word
from safety_neurons.prompt_lists.tables import parse_rows
from safety_neurons.results.run import write_bytes

STATIC, ADAPTIVE = "static-transfer", "adaptive"
"""What a result under attack is called: the prompt was made without the model in hand, or optimised on it."""
DEFAULT_OPENING = "Sure, here is what you asked for:"

_ATTACK = re.compile(
    r"(?:adv|adversarial|attack(?:ed)?|augmented|decorated|jail(?:break|broken)|modified|mutated|perturbed"
    r"|rewritten|transformed|wrapped)_(?:prompt|query|question|text|request|goal|instruction|behaviou?r)"
    r"|augq|ss_prompt|prompt_with_adv"
)
"""Columns of a plain list that hold the attack, whatever else looks like a prompt: a behaviour, a request."""
_SUFFIXES = ("suffix", "adv_suffix", "adversarial_suffix", "control")
"""Columns of what is put behind the goal of the row."""
_ATTACK_OR_ABOUT_IT = ("attack", "jailbreak")
"""Beside a prompt these name its method, or say whether it is an attack."""
_AFTER = ("goal", "behavior", "behaviour", "request", "instruction", "question", "query", "forbidden_prompt")
"""Columns of what an attack is after."""
_BARE = (*_AFTER, "vanilla", "redteam_query", "original_prompt", "base_prompt", "baseq", "bad_q")
"""The same beside an attack."""

AS = ("prompts", "suffixes", "templates")
_SLOT = re.compile(
    r"\[INSERT PROMPT HERE\]|\{\{? ?(?:goal|prompt|behavior|query) ?\}?\}|\[GOAL\]", re.IGNORECASE
)
_OWN = {"prompt", "method", "adaptive"}
_FIELDS = ("behavior_id", "goal", "prompt", "method", "source_model", "adaptive")


@dataclass(frozen=True)
class AttackPrompt:
    """One attack prompt.

    Attributes:
        behavior_id: Which behaviour it is after.
        goal: The bare request; judges are given it. Empty where the file has none and no goals were given.
        prompt: What is put to the model.
        method: How it was made, such as `GCG` or `PAIR`.
        source_model: The model it was made on; empty for none.
        adaptive: Whether it was optimised on the very model it is used on.
        meta: Whatever else is known: category, target, losses.
    """

    behavior_id: str
    goal: str
    prompt: str
    method: str = "unknown"
    source_model: str = ""
    adaptive: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`adaptive` or `static-transfer`; a result is never shown without it."""
        return ADAPTIVE if self.adaptive else STATIC

    def to_json(self) -> dict[str, Any]:
        """The record of one line."""
        return {
            **{name: getattr(self, name) for name in _FIELDS},
            **({"meta": dict(self.meta)} if self.meta else {}),
        }


class Attacks(Sequence[AttackPrompt]):
    """Attack prompts in order, with notes on what was left out."""

    def __init__(
        self, items: Iterable[AttackPrompt], name: str = "attacks", notes: Iterable[str] = ()
    ) -> None:
        self._items = tuple(items)
        self.name = name
        self.notes = list(notes)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[AttackPrompt]:
        return iter(self._items)

    @overload
    def __getitem__(self, index: int) -> AttackPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> "Attacks": ...
    def __getitem__(self, index: int | slice) -> "AttackPrompt | Attacks":
        return (
            Attacks(self._items[index], self.name, self.notes)
            if isinstance(index, slice)
            else self._items[index]
        )

    def __eq__(self, other: object) -> bool:
        return self._items == other._items if isinstance(other, Attacks) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # records hold mappings

    def __add__(self, other: "Attacks") -> "Attacks":
        return Attacks((*self, *other), f"{self.name} + {other.name}", [*self.notes, *other.notes])

    def __repr__(self) -> str:
        return f"Attacks({self.name!r}, {len(self)} of {', '.join(self.methods) or 'no method'})"

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that occur, in order of appearance."""
        return tuple(dict.fromkeys(item.method for item in self))

    @property
    def prompts(self) -> Prompts:
        """As prompts to evaluate on, all of kind harmful.

        `meta` says goal, method, source model and label.
        """
        seen: dict[str, int] = {}
        items = []
        for attack in self:
            name = f"{attack.behavior_id}|{attack.method}" + (
                f"|{attack.source_model}" if attack.source_model else ""
            )
            seen[name] = seen.get(name, 0) + 1
            items.append(_as_prompt(attack, name if seen[name] == 1 else f"{name}#{seen[name]}"))
        return Prompts(items, self.name, self.notes)

    def used_on(self, model: str) -> "Attacks":
        """The attacks as they count on a model: adaptive ones stay so on the model they were made on,
        elsewhere they are transferred.
        """
        return Attacks(
            [replace(item, adaptive=item.adaptive and item.source_model == model) for item in self],
            self.name,
            self.notes,
        )

    def save(self, path: str | Path) -> Path:
        """Write JSON Lines, one attack a line, and return the path."""
        target = Path(path)
        lines = "".join(json.dumps(item.to_json(), ensure_ascii=False) + "\n" for item in self)
        write_bytes(target, lines.encode())
        return target

    @classmethod
    def load(cls, path: str | Path) -> "Attacks":
        """Read what `save` wrote; `import_attacks` reads the other formats too."""
        return import_attacks(path)


@well_typed
def import_attacks(
    path: str | Path,
    *,
    method: str | None = None,
    source_model: str | None = None,
    goals: str | Path | Prompts | None = None,
    read_as: str = "prompts",
    adaptive: bool = False,
) -> Attacks:
    """Attack prompts of a file, its format found by its shape.

    JailbreakBench artefacts (`{"parameters", "jailbreaks"}`; prompts that are null are left out and counted),
    HarmBench test cases (`{behavior_id: [prompt, …]}`), this project's own JSON Lines, and plain lists in
    every format that prompts are read from.

    Args:
        path: The file; plain or gzipped.
        method: How they were made; taken from the file or its path where they say it.
        source_model: The model they were made on; likewise.
        goals: The behaviours by id, for files that hold only ids, and for suffixes and templates: a file or
            prompts of a suite.
        read_as: What a plain list holds: whole `prompts`, `suffixes` to put behind every goal, or `templates`
            with a place for the goal (`{goal}`, `[INSERT PROMPT HERE]`).
        adaptive: The prompts were optimised on the very model they will be used on.

    Raises:
        InputError: A file that cannot be read, holds no prompt, or needs goals.
        UsageError: An unknown `read_as`.
    """
    if read_as not in AS:
        raise UsageError(f"read_as {read_as!r}: expected one of {', '.join(AS)}")
    known = goals if isinstance(goals, Prompts) or goals is None else prompts(goals)
    file = Path(path).expanduser()
    parsed = _parsed(file) if read_as == "prompts" else None
    reader = _reader(parsed)
    notes: list[str] = []
    attacks = _plain_list(file, read_as, known, notes) if reader is None else reader(parsed, file, notes)
    behaviours = None if known is None else _Behaviours(known)
    attacks = [_filled(attack, method, source_model, adaptive, behaviours) for attack in attacks]
    if not attacks:
        raise InputError(f"{path}: no attack prompt in it; expected at least one; check the file")
    without = sum(not attack.goal for attack in attacks)
    if without:
        notes.append(
            f"{without} of {len(attacks)} attacks have no goal, which judges need; give the behaviours "
            "with --goals"
        )
    return Attacks(attacks, file.name, notes)


def _parsed(path: Path) -> Any:
    """The parsed document where the file is JSON or JSON Lines of records; None for every other file."""
    if not re.search(r"\.jsonl?(?:\.gz)?$", path.name, re.IGNORECASE):
        return None
    text, _ = read_text(path)
    with contextlib.suppress(ValueError, RecursionError):
        whole = strict_json.loads(text, lenient=True)
        return [whole] if isinstance(whole, dict) and set(whole) >= _OWN else whole
    try:
        return [strict_json.loads(line, lenient=True) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return None  # the reader of plain lists says where the file is broken


Reader = Callable[[Any, Path, list[str]], list[AttackPrompt]]


def _reader(parsed: Any) -> Reader | None:
    if isinstance(parsed, dict) and isinstance(parsed.get("jailbreaks"), list):
        return _jailbreakbench
    cases = isinstance(parsed, dict) and parsed and all(_is_cases(value) for value in parsed.values())
    if cases and not any(is_known_column(key) or folded(key) in (*LISTS, *SPLITS) for key in parsed):
        return _harmbench
    records = parsed if isinstance(parsed, list) else []
    if records and all(isinstance(item, dict) and set(item) >= _OWN for item in records):
        return _own
    return None


def _is_cases(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, str | list) or item is None or (isinstance(item, dict) and "test_case" in item)
        for item in value
    )


def _jailbreakbench(parsed: Any, path: Path, notes: list[str]) -> list[AttackPrompt]:
    parameters = parsed.get("parameters") if isinstance(parsed.get("parameters"), dict) else {}
    attacks, empty = [], 0
    for number, record in enumerate(parsed["jailbreaks"]):
        if not isinstance(record, dict):
            raise InputError(
                f"{path}: jailbreak {number} is a {type(record).__name__}; expected an object; repair "
                "the file"
            )
        if not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
            empty += 1
            continue
        meta = {
            key: record[key] for key in ("category", "jailbroken") if isinstance(record.get(key), str | bool)
        }
        if "jailbroken" in meta:
            meta["jailbroken_source_model"] = meta.pop("jailbroken")
        meta |= (
            {"attack_type": parameters["attack_type"]}
            if isinstance(parameters.get("attack_type"), str)
            else {}
        )
        attacks.append(
            AttackPrompt(
                behavior_id=str(record.get("behavior") or record.get("index", number)),
                goal=str(record.get("goal") or ""),
                prompt=record["prompt"],
                method=str(parameters.get("method") or "unknown"),
                source_model=str(parameters.get("model") or ""),
                meta=meta,
            )
        )
    if empty:
        notes.append(
            f"{empty} of {len(parsed['jailbreaks'])} behaviours have no prompt (the attack gave none); "
            "left out"
        )
    return attacks


def _harmbench(parsed: Any, path: Path, notes: list[str]) -> list[AttackPrompt]:
    """Test cases; `METHOD/MODEL/test_cases/…` in the path says how and on what they were made."""
    parts = list(path.parts)
    at = parts.index("test_cases") if "test_cases" in parts else 0
    method, model = (parts[at - 2], parts[at - 1]) if at >= 2 else ("unknown", "")
    attacks, skipped = [], 0
    about = [key for key in parsed if folded(key) in METADATA]
    notes += [f"left out what stands beside the test cases: {', '.join(about)}"] if about else []
    for behavior, cases in parsed.items():
        for one in () if behavior in about else cases:
            case = one["test_case"] if isinstance(one, dict) else one
            if isinstance(case, str) and case.strip():
                attacks.append(AttackPrompt(str(behavior), "", case, method, model))
            else:
                skipped += 1
    if skipped:
        notes.append(f"{skipped} test cases are empty or not text (images); left out")
    return attacks


def _own(parsed: Any, path: Path, _: list[str]) -> list[AttackPrompt]:
    attacks = []
    for number, record in enumerate(parsed, 1):
        if not isinstance(record["prompt"], str) or not isinstance(record["adaptive"], bool):
            raise InputError(
                f"{path}: record {number}: expected a text as prompt and true or false as adaptive; "
                "repair the line"
            )
        known = {
            name: str(record.get(name) or "") for name in ("behavior_id", "goal", "method", "source_model")
        }
        meta = record.get("meta") if isinstance(record.get("meta"), dict) else {}
        attacks.append(AttackPrompt(prompt=record["prompt"], adaptive=record["adaptive"], meta=meta, **known))
    return attacks


def _plain_list(path: Path, read_as: str, goals: Prompts | None, notes: list[str]) -> list[AttackPrompt]:
    attack, suffix, bare = _attack_columns(path)
    read = prompts(path, column=attack)
    notes += read.notes
    if read_as == "prompts":
        notes += labelled_otherwise(read, "unsafe")
        if bare and not suffix:
            notes.append(
                f"attacks are read from {bare!r}, which is what attacks are after; expected a column such as "
                "attack_prompt beside it"
            )
        return [_from_prompt(prompt, attack is not None, suffix) for prompt in read]
    if goals is None:
        raise InputError(
            f"{path}: {read_as} need the requests they are for; expected --goals with a suite's file"
        )
    if read_as == "templates" and not all(_SLOT.search(prompt.text) for prompt in read):
        without = sum(_SLOT.search(prompt.text) is None for prompt in read)
        raise InputError(
            f"{path}: {without} of {len(read)} templates have no place for the goal; expected {{goal}} or "
            "[INSERT PROMPT HERE]"
        )
    return [
        AttackPrompt(
            behavior_id=str(goal.meta.get("behavior_id", goal.id)),
            goal=str(goal.meta.get("goal", goal.text)),
            prompt=_combined(goal.text, item.text, read_as),
            method=f"{path.name.split('.')[0]}-{item.id}",
            meta={"category": goal.category} if goal.category else {},
        )
        for item in read
        for goal in goals
    ]


def _attack_columns(path: Path) -> tuple[str | None, str | None, str | None]:
    """The columns of a plain list: of the attack, None where it is that of the prompt; of a suffix to the
    prompt; and of the prompt where its name says that it is what attacks are after.
    """
    rows = parse_rows(read_text(path)[0], file_format(path), str(path), None, [])
    row = next((row for row in rows if isinstance(row, Mapping)), {})
    plan = plan_for(tuple(row), None, None)
    asked = (*plan.conversation, *plan.prompt)[:1]
    bare = asked[0] if asked and folded(asked[0]) in _AFTER else None
    sure = next((key for key in row if _ATTACK.fullmatch(folded(key))), None)
    if sure is not None:
        return sure, None, None
    suffix = find_column(row, _SUFFIXES)
    if bare is not None and suffix is not None and isinstance(row[suffix], str):
        return None, suffix, bare
    if any(is_known_column(key) and folded(key) not in _AFTER for key in row):
        return None, None, bare
    column = find_column(row, _ATTACK_OR_ABOUT_IT)
    text = row[column] if column is not None else None
    if isinstance(text, str) and label_word(text) not in ("0", "1", "no", "yes"):
        return column, None, None
    return None, None, bare


def _combined(goal: str, text: str, read_as: str) -> str:
    return f"{goal} {text}" if read_as == "suffixes" else _SLOT.sub(lambda _: goal, text)


def _from_prompt(prompt: Prompt, wrapped: bool, suffix: str | None) -> AttackPrompt:
    """The attack of a row; beside an attack a behaviour is the goal, beside a goal the label of it."""
    fields = {folded(key): value for key, value in prompt.meta.items()}
    names = (*_BARE, "method", "source_model", "target", "behavior_id")
    text = {name: str(fields.get(name) or "") for name in names}
    behind = "" if suffix is None else str(prompt.meta.get(suffix) or "")
    bare = next((text[name] for name in _BARE if text[name]), "") if wrapped else text["vanilla"]
    adaptive = label_word(fields.get("adaptive"))
    if adaptive not in ("", "0", "1"):
        raise InputError(f"attack {prompt.id!r} has adaptive {adaptive[:20]!r}; expected true or false")
    meta = {
        key: value
        for key, value in (
            ("category", prompt.category),
            ("target", text["target"] or prompt.answer),
            ("language", prompt.language),
            ("messages", [{"role": turn.role, "content": turn.content} for turn in prompt.messages]),
        )
        if value
    }
    return AttackPrompt(
        text["behavior_id"] or prompt.id,
        text["goal"] or (prompt.text if behind else bare),
        _combined(prompt.text, behind, "suffixes") if behind else prompt.text,
        text["method"] or "unknown",
        text["source_model"],
        adaptive == "1",
        meta,
    )


class _Behaviours:
    """Behaviours by every id they have, and by their whole request."""

    def __init__(self, goals: Prompts) -> None:
        self.by_id: dict[str, Prompt] = {}
        for prompt in goals:
            for name in (prompt.meta.get("BehaviorID"), prompt.meta.get("behavior_id"), prompt.id):
                if name:
                    self.by_id.setdefault(str(name), prompt)
        self.by_text = [
            (normalised(str(prompt.meta.get("goal", prompt.text))).casefold(), prompt) for prompt in goals
        ]

    def of(self, attack: AttackPrompt) -> Prompt | None:
        """The behaviour of the attack's id, else the longest whose whole request its prompt holds."""
        if attack.behavior_id in self.by_id:
            return self.by_id[attack.behavior_id]
        text = normalised(attack.prompt).casefold()
        held = [(len(goal), prompt) for goal, prompt in self.by_text if goal in text]
        return max(held, key=lambda pair: pair[0])[1] if held else None


def _filled(
    attack: AttackPrompt,
    method: str | None,
    source_model: str | None,
    adaptive: bool,
    goals: _Behaviours | None,
) -> AttackPrompt:
    """The attack with what the caller says about all of them, and its goal looked up by behaviour."""
    attack = replace(
        attack,
        method=method or attack.method,
        source_model=attack.source_model if source_model is None else source_model,
        adaptive=adaptive or attack.adaptive,
    )
    match = None if goals is None or attack.goal else goals.of(attack)
    if match is None:
        return attack
    meta = {key: match.meta[key] for key in ("context", "target", "functional_category") if key in match.meta}
    meta |= {"category": match.category} if match.category else {}
    return replace(attack, goal=str(match.meta.get("goal", match.text)), meta={**meta, **attack.meta})


def _as_prompt(attack: AttackPrompt, name: str) -> Prompt:
    meta = {
        key: value for key, value in attack.meta.items() if key not in ("category", "messages", "language")
    }
    meta |= {
        "kind": "harmful",
        "goal": attack.goal or attack.prompt,
        "behavior_id": attack.behavior_id,
        "method": attack.method,
    }
    meta |= {"label": attack.label, "source_model": attack.source_model}
    turns = attack.meta.get("messages") or ()
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    return Prompt(
        name, attack.prompt, messages, None, attack.meta.get("category"), attack.meta.get("language"), meta
    )
