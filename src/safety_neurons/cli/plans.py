"""`--dry-run`: memory, time and disk of a run that is not started, from its options and the shapes of its
models.

What a verb does is a list of works, each the texts that it reads, answers or trains on. Nothing is loaded: a
folder with a config.json is enough.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from safety_neurons.cli import console
from safety_neurons.cli.session import Session, listed, named, parse_sizes
from safety_neurons.detectors.methods import (
    METHODS,
    Importance,
    ImportanceContrast,
    Method,
    TextOptions,
    by_name,
    with_options,
)
from safety_neurons.errors import UsageError

if TYPE_CHECKING:
    from safety_neurons.model.cost import Work
    from safety_neurons.model.outline import Outline

CHARACTERS, RECORD, ARM = 11, 480, 2800
"""Bytes of a completion's record for each of its tokens (its text and id) and beside them (the prompt and two
verdicts); of what a result says of an arm.
"""


def plan(session: Session) -> dict[str, Any]:
    """Print what a run would need, and give it as an object.

    Raises:
        UsageError: a verb that has nothing to plan.
    """
    from safety_neurons.model.cost import cost

    session.foresee()
    planner = Planner(session)
    works = planner.works()
    started = time.process_time()  # Python, libraries and the configuration: the run needs them too
    found = cost(
        planner.outline,
        works,
        planner.weights,
        planner.disk(works),
        batch_size=session.batch_size(),
        truncated=planner.truncated,
        hashed=planner.hashed,
        notes=planner.notes,
    )
    found = dataclasses.replace(found, start_seconds=started)
    if not session.common.json:
        console.say(str(found))
    told = {name: getattr(found, name) for name in ("seconds", "memory_bytes", "fits")}
    return {**dataclasses.asdict(found), **told}


class Planner:
    """Works of a session's verb.

    Attributes:
        outline: the model that reads and answers.
        weights: bytes of all models' weights.
        hashed: of these, as often as a run hashes them: its files once, in memory once for each model.
        truncated: prompts that do not fit the context.
        notes: what is not counted.
    """

    def __init__(self, session: Session) -> None:
        from safety_neurons.model.outline import outlines

        self.session, self.options = session, session.options
        self.words = session.verb.split("-")
        self.work_of = WORKS.get(session.verb) or WORKS.get(self.words[0])
        specs = [
            str(value).partition("=")[2] if name == "control" else str(value)
            for name, reads in session.reads.items()
            if reads.kind == "model"
            for value in _several(self.options[name])
        ]
        if self.work_of is None or not specs:
            why = "loads no model that could be planned for" if self.work_of is None else "names no model"
            raise UsageError(
                f"--dry-run: {session.verb.replace('-', ' ')} {why}; leave it out, or plan a verb with "
                "--model or with --base and --aligned"
            )
        found, self.weights = outlines(specs, **session.loading())
        words = sum(one.tokenizer_bytes for one in found)
        of: Outline = found[-1] if self.words[0] == "find" else found[0]
        self.outline = dataclasses.replace(of, tokenizer_bytes=words)
        self.n_models = len(found)
        self.hashed = self.weights + sum(one.weights_bytes for one in found)
        self.truncated = 0
        self.notes: list[str] = []
        self._known: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self._judges()

    def _judges(self) -> None:
        """Note judges that are models themselves: they are loaded beside."""
        from safety_neurons.judges.registry import model_behind

        names = [
            name
            for option, reads in self.session.reads.items()
            if reads.kind == "judges"
            for name in listed(self.options[option]) or ()
        ]
        if behind := [name for name in dict.fromkeys(names) if model_behind(name) is not None]:
            self.notes.append(f"judges that are models ({', '.join(behind)}) come on top")

    def works(self) -> "list[Work]":
        """What the verb does, in order."""
        assert self.work_of is not None
        return [work for work in self.work_of(self) if work.lengths]

    # Texts

    def lengths(self, *names: str, limit: Any = "limit", reserve: int = 0) -> tuple[int, ...]:
        """Tokens of all prompts that options name."""
        most = self.options.get(limit) if isinstance(limit, str) else limit
        found: list[int] = []
        for name in names:
            source = self.options.get(name)
            if source is None or source in self.session.reads[name].words:
                continue
            key = (name, source, most, reserve)
            if key not in self._known:
                paths = [path for _, path in named(source)] if self.session.reads[name].several else [source]
                self._known[key] = tuple(
                    length for path in paths for length in self._read(name, path, most, reserve)
                )
            found += self._known[key]
        return tuple(found)

    def _read(self, name: str, source: str, limit: int | None, reserve: int) -> list[int]:
        reads = self.session.reads[name]
        columns = self.session.columns(reads)
        return self.tokens(self.session.prompts(source, self.outline, limit=limit, **columns), reserve)

    def tokens(self, prompts: Any, reserve: int = 0) -> list[int]:
        """Tokens of prompts."""
        lengths, cut = self.outline.lengths(prompts, reserve)
        self.truncated += cut
        return lengths

    @property
    def longest(self) -> int:
        """Tokens of an answer."""
        from safety_neurons.studies.lengths import answer_length

        given = self.options.get("max_new_tokens")
        return int(given) if given else answer_length(self.outline)

    # Works that verbs share

    def read(self, what: str, lengths: Iterable[int], **how: Any) -> "Work":
        """Texts that are read, and answered where there are `new_tokens`: a start of all is read once."""
        from safety_neurons.model.cost import Work

        if how.get("new_tokens"):
            how["shared"] = self.outline.common_start
        return Work(what, tuple(lengths), **how)

    def asked(
        self, arms: float | int, *names: str, models: int = 1, limit: Any = "limit", together: int = 1
    ) -> "Work":
        """Requests that are answered in so many arms, so many of them in the same batches."""
        new = self.longest
        return self.read(
            f"answers in {arms:g} arms",
            self.lengths(*names, limit=limit, reserve=new),
            passes=0,
            models=models,
            new_tokens=new,
            answers=arms,
            together=together,
        )

    def measured(self, arms: float | int, name: str = "text", limit: Any = "limit") -> "Work":
        """General text whose losses are measured in so many arms."""
        return self.read("perplexity", self.lengths(name, limit=limit), passes=arms, logits=True)

    def diverged(self, arms: float | int, name: str = "harmless", limit: Any = "limit") -> "Work":
        """Prompts that are read untreated and treated in so many arms."""
        return self.read("divergence", self.lengths(name, limit=limit), passes=2 * arms, logits=True)

    def found(
        self, method: Method, prompts: tuple[int, ...], others: tuple[int, ...] = (), searches: int = 1
    ) -> "list[Work]":
        """Searches by a method on so many texts, the other prompts being read in each."""
        from safety_neurons.detectors.contrast import MEMORY_BUDGET
        from safety_neurons.detectors.importance import AT_ONCE, SHORT
        from safety_neurons.neurons import parse_key

        table, models = self.outline.table, 2 if method.PAIR else 1
        searched = table.select(sites=method.searched, layers=method.layers).sizes
        works = []
        new = int(getattr(method, "max_new_tokens", 0) or 0)
        if not str(getattr(method, "positions", "")).startswith("completion"):
            new = 0
        if new or method.WRITES:
            writers = 1 if isinstance(method, TextOptions) else models
            given = self.options.get("completions") is not None
            works += (
                []
                if given and new
                else [
                    self.read(
                        f"{method.NAME}: answers",
                        prompts,
                        passes=0,
                        models=writers,
                        new_tokens=new or method.WRITES,
                        answers=1,
                    )
                ]
            )
        layers = tuple(sorted({parse_key(key).layer for key in searched}))
        passes = method.passes(self._heads(layers))
        exact = isinstance(method, Importance | ImportanceContrast)
        text = [length + (new or method.WRITES) for length in (*prompts, *others * searches)]
        works.append(
            self.read(
                method.NAME if searches == 1 else f"{method.NAME} in {searches} searches",
                text if method.PROMPTS else (),
                passes=passes,
                models=models,
                backward=passes > 1 and method.NAME != "heads",
                exact=(SHORT, AT_ONCE) if exact and {"q", "k"} & set(method.searched) else None,
                neurons=sum(searched.values()),
                active=sum(
                    size * self.outline.anatomy.share_of_tokens(key) for key, size in searched.items()
                ),
                statistics=method.STATISTICS,
                kept=MEMORY_BUDGET if method.NAME == "contrast" else 0,
                reading=method.reading(),
                layers=layers,
                searches=searches,
            )
        )
        return works

    def _heads(self, layers: Iterable[int]) -> float | int:
        """Attention heads of some layers, each by the share of all layers from its own on."""
        anatomy = self.outline.anatomy.layers
        parts = {layer.index: layer.attention for layer in anatomy}
        return sum(
            part.n_heads * (len(anatomy) - number) / len(anatomy)
            for number in layers
            if (part := parts[number]) is not None
        )

    def trained(self, what: str, lengths: tuple[int, ...], epochs: float | int, entries: int) -> "Work":
        """Examples that are trained on."""
        return self.read(what, lengths, passes=3 * epochs, logits=True, backward=True, trained=entries)

    # Files

    def disk(self, works: "list[Work]") -> int:
        """Bytes of the files of the finished run."""
        table = self.outline.table
        total = 4000
        if self.words[0] == "find":
            method = self._method()
            sizes = table.select(sites=method.searched, layers=method.layers).sizes
            rule = method.selection  # type: ignore[attr-defined]
            n = sum(sizes.values())
            chosen = rule.count or round((rule.top or 0) * n)
            n_prompts = sum(len(work.lengths) for work in works[:1])
            # A name with its place in the header of either file, and a digest a prompt in both.
            total += 4 * n + 8 * min(n, chosen) + 2 * 90 * len(sizes) + 2 * 70 * n_prompts
        if self.words[0] in ("verify", "compare", "evaluate", "tune", "study", "analyze"):
            total += round(
                sum(
                    work.answers * (len(work.lengths) * (RECORD + CHARACTERS * work.new_tokens) + ARM)
                    for work in works
                )
            )
        if self.words[0] == "compare":
            total += 12 * table.n_neurons
        total += sum(2 * work.trained * 4 for work in works)
        return total

    def _method(self) -> Method:
        kind = by_name(self.session.verb.removeprefix("find-"))
        own = {one.name for one in kind.options()}
        return kind(**{name: value for name, value in self.options.items() if name in own})

    def entries(self, share: float | None = None) -> int:
        """Entries of the weights of the neurons that are trained: of the file, or a share of all."""
        if share is not None:
            return round(share * self.outline.n_parameters)
        neurons = self.session.neurons(self.options["neurons"], self.outline)
        return int(neurons.n_parameters)


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


# What each verb does


def _find(planner: Planner) -> "list[Work]":
    from safety_neurons.detectors.runner import MIN_HALVED

    method = planner._method()
    prompts = planner.lengths("prompts") if method.PROMPTS else ()
    others = tuple(
        length
        for name in ("harmless", "general")
        if name in planner.options
        for length in planner.lengths(name)
    )
    works = planner.found(method, prompts, others)
    if planner.options.get("subtract") == "foundation":
        works += planner.found(method, planner.lengths("foundation", limit=None), others)
    if planner.options.get("minus"):
        if len(prompts) >= MIN_HALVED:
            works += planner.found(method, prompts, others, 2)
        works += planner.found(method, planner.lengths("minus"), others, len(named(planner.options["minus"])))
    return works


def _verify(planner: Planner) -> "list[Work]":
    options, kind = planner.options, planner.words[1]
    if kind == "scale":
        # A factor of 1 is the model as it is, which is measured once.
        sets = sum(float(factor) != 1 for factor in options["factors"].split(","))
    else:
        sets = 1 if options["neurons"] is not None else len(parse_sizes(options["sizes"]))
    treated, patch = sets * (1 + options["random"]), kind in ("patch", "both")
    # Untreated, aligned and the ceiling by parameters; untreated, the sets off and the ceiling.
    lone, off = 3 * patch + (kind != "patch"), 0 if kind == "patch" else treated + (kind != "scale")
    patched = patch * (treated + 1)
    works = [planner.asked(lone, "harmful", "harmless")]
    if patched:
        works.append(planner.asked(patched, "harmful", "harmless", models=2, together=patched))
    if off:
        works.append(planner.asked(off, "harmful", "harmless", together=1 if kind == "scale" else off))
    return [*works, planner.measured(patched + lone + off), planner.diverged(patched + patch + off)]


def _compare(planner: Planner) -> "list[Work]":
    options = planner.options
    names = listed(options["methods"]) or tuple(METHODS)
    works = []
    for name in names:
        method = with_options(name, max_new_tokens=128)
        others = planner.lengths("find_harmless") if method.HARMLESS != "none" else ()
        others += planner.lengths("find_general") if method.GENERAL != "none" else ()
        works += planner.found(method, planner.lengths("prompts") if method.PROMPTS else (), others)
    rows = len(names) + options["random"] + (options["truth"] is not None)
    return [
        *works,
        planner.asked(3, "harmful", "harmless"),  # both models, and the ceiling by parameters
        planner.asked(rows, "harmful", together=rows),
        planner.asked(rows + 1, "harmful", "harmless", models=2, together=rows + 1),  # and the ceiling
        planner.measured(rows, "find_general"),
        planner.diverged(rows + 2),
    ]


def _evaluate(planner: Planner) -> "list[Work]":
    from safety_neurons.suites import suite

    options = planner.options
    if options["model"] is None:
        raise UsageError("--dry-run with --endpoint: the server has the model; expected --model")
    new, lengths = planner.longest, list[int]()
    for name in (*(listed(options["suite"]) or ()), *(listed(options["over_refusal"]) or ())):
        if name != "none":
            read = suite(
                name,
                folder=options["folder"],
                offline=planner.session.common.offline,
                column=options["column"],
                limit=options["limit"],
            )
            lengths += planner.tokens(read.prompts, new)
    treated = sum(options[name] is not None for name in ("deactivate", "patch", "guard"))
    alone = 0 if options["baseline"] is not None else 1
    arms = (alone + treated or 1) * options["samples"] * len(listed(options["attack"]) or (1,))
    if options["capability"]:
        planner.notes.append(f"capability tasks ({options['capability']}) come on top of the time")
    if "gcg" in options["attack"]:
        planner.notes.append(f"making attacks ({options['attack']}) comes on top of the time")
    return [
        planner.read(
            f"answers in {arms:g} arms",
            lengths,
            passes=0,
            new_tokens=new,
            answers=arms,
            models=2 if options["patch"] else 1,
        )
    ]


def _tune(planner: Planner) -> "list[Work]":
    options = planner.options
    data = planner.lengths("data")
    harmless = planner.lengths("harmless", limit=None)[: round(options["mix"] * len(data))]
    general = planner.lengths("general", limit=None)
    longest = options["max_length"]
    examples = tuple(min(longest, length + 32) for length in (*data, *harmless, *general))
    if options["max_steps"]:
        examples = examples[: options["max_steps"] * 8 * options["accumulate"]]
    if not options["no_check"]:
        planner.notes.append("checks while training come on top of the time, and may end it early")
    return [
        planner.asked(2, "test_harmful", "test_harmless", limit=None),
        planner.measured(2, limit=None),
        planner.diverged(1, "test_harmless", limit=None),
        planner.trained("training", examples, options["epochs"], planner.entries()),
    ]


def _repair(planner: Planner) -> "list[Work]":
    return [planner.read("no text", (1,))]


def _guard(planner: Planner) -> "list[Work]":
    names = [name for name in ("unsafe", "safe", "labelled") if planner.options.get(name)]
    limit = "limit"
    requests = planner.lengths(*names, limit=limit)
    others = [name for name in ("other_unsafe", "other_safe") if planner.options.get(name)]
    works = [planner.read("requests", (*requests, *planner.lengths(*others, limit=None)))]
    if planner.options.get("recheck_every") and planner.options.get("answers_harmful") is None:
        new = planner.options["recheck_tokens"]
        works.append(planner.read("answers", requests, passes=1, new_tokens=new, answers=1))
    if planner.options.get("completions") is not None:
        planner.notes.append("requests of --completions come on top")
    return works


def _guard_evaluate(planner: Planner) -> "list[Work]":
    names = [
        name
        for name, reads in planner.session.reads.items()
        if reads.kind == "prompts" and planner.options[name] not in (None, *reads.words)
    ]
    planner.notes.append(
        "what a guard is compared with, perturbed requests and answers come on top of the time"
    )
    return [planner.read("requests", planner.lengths(*names))]


def _languages(planner: Planner) -> "list[Work]":
    options, codes = planner.options, listed(planner.options["languages"]) or ()
    sets = {"find_prompts": "find_limit", "test_prompts": "test_limit"}
    read = {
        name: tuple(
            length
            for code in codes
            for length in planner.tokens(
                planner.session.prompts(
                    options[name].replace("{language}", code), planner.outline, limit=options[limit]
                )
            )
        )
        for name, limit in sets.items()
    }
    name = options["method"] or ("swap-attribution" if options["base"] else "importance")
    new = planner.longest
    arms = 1 + len(codes) * (1 + len(listed(options["definitions"]) or ()) + options["random"])
    found = (
        [] if options["sets"] else planner.found(with_options(name, max_new_tokens=new), read["find_prompts"])
    )
    answers = planner.read(
        f"answers in {arms} arms", read["test_prompts"], passes=0, new_tokens=new, answers=arms
    )
    return [*found, answers]


def _transfer(planner: Planner) -> "list[Work]":
    options = planner.options
    prompts = planner.lengths("prompts", limit=None)
    arms = 2 + 8 * (1 + options["random"])
    planner.notes.append("eight groups of requests are taken for those that --by tells apart")
    return [
        *planner.found(
            with_options(options["method"] or "contrast", max_new_tokens=planner.longest), prompts
        ),
        planner.asked(arms, "harmful", "harmless", models=2, limit=None, together=1 + options["random"]),
    ]


def _vocabulary(planner: Planner) -> "list[Work]":
    lengths = planner.lengths("harmful", "harmless")
    cards = planner.options["cards"] + planner.options["random"]
    return [planner.read("cards", lengths, passes=1 + cards, logits=True)]


def _progressive(planner: Planner) -> "list[Work]":
    """Blocks of layers off from the front, from the back and alone, in random orders, and random sets."""
    from safety_neurons.cli.analyze import scores_of
    from safety_neurons.studies.verification import ladder, layer_blocks

    options = planner.options
    neurons = planner.session.neurons(options["neurons"], planner.outline)
    blocks = len(layer_blocks(neurons, options["points"]))
    between = max(0, blocks - 2)  # the first, the last and all blocks stand in several curves
    ranked = scores_of(options["neurons"], options["scores"]) is not None
    sizes = len(ladder(len(neurons), options["points"])) if ranked else 0
    treated = 2 * blocks - 1 + max(0, sizes - 1) + between
    treated += options["random"] * (between + (sizes or blocks))
    return [
        planner.asked(1, "harmful", "harmless"),
        planner.asked(treated, "harmful", "harmless", together=treated),
        planner.measured(1 + treated),
        planner.diverged(treated),
    ]


def _tax(planner: Planner) -> "list[Work]":
    options = planner.options
    trainings = planner.n_models - 1
    searched = {name: options[name] for name in ("sites", "layers", "positions")}
    method = with_options("contrast", **searched, max_new_tokens=planner.longest)
    found = [
        work
        for _ in range(trainings)
        for work in planner.found(method, planner.lengths("prompts", "also", limit="find_limit"))
    ]
    arms = 1 + trainings + 2 * (1 + options["random"])
    return [*found, planner.asked(arms, "harmful", "harmless", models=2, together=1 + options["random"])]


def _doctor(planner: Planner) -> "list[Work]":
    return [planner.read("checks", (32,) * 256, passes=1, logits=True)]


def _study(planner: Planner) -> "list[Work]":
    """Sets are found, safety is tuned, then every arm is fine-tuned and measured, seed by seed."""
    options, kind = planner.options, planner.words[1]
    seeds = options["seeds"]
    data = planner.lengths("data", limit=options["data_limit"])
    mixed = planner.lengths("mixed", limit=None)[: round(options["mix"] * len(data))]
    task = planner.lengths("task", limit=None)
    whole = planner.outline.n_parameters if options["downstream"] == "full" else planner.entries(0.01)

    def learnt(what: str, texts: tuple[int, ...], steps: Any, times: int, entries: int) -> "Work":
        """As many examples as the longest fine-tune takes."""
        wanted = max(int(float(part)) for part in str(steps).split(",")) * options["task_batch"]
        examples = (texts * (wanted // max(1, len(texts)) + 1))[:wanted]
        return planner.trained(what, examples, times, entries)

    works = []
    if options["neurons"] is None:
        method = with_options(options["method"])
        works += planner.found(method, planner.lengths("prompts", limit=None))
        works += planner.found(method, planner.lengths("general", limit=None))
    tunings, fine_tunes, points = (
        _defended(options, kind, seeds)
        if kind != "stress"
        else (seeds, 2 * seeds, _attacked(options) * seeds)
    )
    tuned = planner.entries(options["share"])
    works.append(planner.trained("tuning", (*data, *mixed), options["epochs"] * tunings, tuned))
    if kind != "stress":
        works.append(learnt("fine-tuning", task, options["steps"], fine_tunes, whole))
        works.append(planner.asked(points, "harmful", "harmless", "task_test"))
        return [*works, planner.measured(points)]
    attacks = [name.lower() for name in listed(options["attacks"]) or ("harmful", "benign")]
    if "harmful" in attacks:
        low = planner.entries(0.01)
        works.append(learnt("harmful fine-tuning", data, options["harmful_steps"], fine_tunes, low))
    works.append(planner.asked(points, "harmful"))
    if "benign" in attacks:
        works.append(learnt("fine-tuning", task, options["benign_steps"], fine_tunes, whole))
        works.append(planner.asked(fine_tunes, "task_test"))
    return [*works, planner.measured(points)]


def _attacked(options: Any) -> int:
    """How often `study stress` looks at the two models of one seed."""
    counts = {
        name: len(str(options[name]).split(","))
        for name in ("pruned", "directions", "harmful_steps", "benign_steps", "scales")
    }
    looks = {
        "prune": 4 * counts["pruned"],
        "abliterate": 4 * counts["directions"],
        "subtract": counts["scales"],
        "harmful": 2 * counts["harmful_steps"],
        "benign": 2 * counts["benign_steps"],
    }
    return 2 + sum(looks[name.lower()] for name in listed(options["attacks"]) or looks)


def _defended(options: Any, kind: str, seeds: int) -> tuple[int, int, int]:
    """How many tunings, fine-tunes and points `study rsn` or `study defences` has."""
    whole = ("none", "sn-tune", "rsn-tune", "random", "protected")
    names = [name.lower() for name in listed(options["arms"]) or ()]
    arms = len(names) or (10 if kind == "defences" else len(whole))
    names = names or list(whole)
    # What begins with SN-Tune shares one tuning of a seed.
    kinds = {name if name in ("rsn-tune", "random") else "sn-tune" for name in names if name != "none"}
    tunings = len(kinds) * seeds
    if kind == "rsn":
        # The untuned model is measured once, and what is protected has been measured as SN-Tune's.
        known = (seeds - 1) * ("none" in names) + seeds * ({"sn-tune", "protected"} <= set(names))
        return tunings, arms * seeds, 2 * arms * seeds - known
    rates = len(listed(options["mixtures"]) or ()) * len(str(options["rates"]).split(","))
    steps = len(str(options["steps"]).split(","))
    return tunings, arms * rates * seeds, arms * (rates * steps + 1) * seeds


WORKS: dict[str, Callable[[Planner], "list[Work]"]] = {
    "find": _find,
    "verify": _verify,
    "compare": _compare,
    "evaluate": _evaluate,
    "tune": _tune,
    "repair": _repair,
    "guard-fit": _guard,
    "guard-recalibrate": _guard,
    "guard-evaluate": _guard_evaluate,
    "analyze-languages": _languages,
    "analyze-transfer": _transfer,
    "analyze-vocabulary": _vocabulary,
    "analyze-progressive": _progressive,
    "analyze-tax": _tax,
    "study": _study,
    "doctor": _doctor,
}
"""By the name of a verb's runs, or its first word, what it does; the other verbs have nothing to plan."""
