"""compare: detectors side by side at equal budget, against random sets and, where known, the truth."""

import dataclasses
from typing import Annotated, Any

from safety_neurons.cli.options import ModelName, NeuronFile, PromptFile, Requested, Some, listed, parse_sizes
from safety_neurons.cli.session import Session
from safety_neurons.cli.verb import verb
from safety_neurons.declarations import Count, Declaration, Panel, Positive, Reads
from safety_neurons.detectors.methods import AtSites, by_name
from safety_neurons.errors import UsageError

PROMPTS = Panel("Prompts")


@dataclasses.dataclass(frozen=True)
class Compared(Declaration):
    """A pair of models, or organisms in its place."""

    base: ModelName | None = None
    """The less safe model: ID[@REVISION][+ADAPTER…] or organism:NAME/base."""
    aligned: ModelName | None = None
    """The safer model of the same architecture."""
    organism: Annotated[list[str] | None, Reads("organism")] = None
    """Instead of models: an organism, by name or folder; several rank methods."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookedAt(Declaration):
    """What methods look at."""

    prompts: Annotated[PromptFile, PROMPTS] = "builtin:harmful"
    """A file or builtin:NAME[/LANG]."""
    find_harmless: PromptFile = "builtin:harmless"
    """Harmless prompts some methods look at: a file or builtin:NAME[/LANG]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists(Some, Requested, LookedAt):
    """All prompts; the last base has the first options."""


@dataclasses.dataclass(frozen=True)
class KnownTruth(Declaration):
    """What is known of the neurons."""

    truth: NeuronFile | None = None
    """Neuron file of the planted truth; the budget is then its number of units."""


@dataclasses.dataclass(frozen=True)
class MethodBudget(Declaration):
    """Which methods, at which budget."""

    top: str = "0.05"
    """Budget as a share of the units, without --truth; with --organism several: 0.01,0.02."""
    methods: str | None = None
    """Comma-separated methods. [default: all]"""
    random: Count = 5
    """Random sets."""
    find: Positive = 100
    """With --organism: prompts that methods look at, of each kind."""
    max_new_tokens: Annotated[Positive, PROMPTS] = 64
    """Length of a completion, in tokens."""

    def check(self) -> None:
        """Also the shares and the names of methods."""
        super().check()
        parse_sizes(self.top, "--top")
        for name in listed(self.methods) or ():
            by_name(name)

    def values(self) -> dict[str, Any]:
        """With one share as a number, so that 0.05 and 0.050 are the same run."""
        shares = parse_sizes(self.top, "--top")
        return super().values() | ({"top": shares[0]} if len(shares) == 1 else {})


@verb("compare")
def compare(session: Session, compared: Compared, lists: Lists, truth: KnownTruth, at: AtSites, budget: MethodBudget) -> dict[str, Any]:
    """Detectors side by side at equal budget, against random sets; on one pair of models, or over several organisms."""
    base, aligned, shares = compared.base, compared.aligned, parse_sizes(budget.top, "--top")
    if compared.organism:
        if base or aligned or truth.truth or at.sites:
            raise UsageError("--organism brings its own models, truth and sites; leave --base, --aligned, --truth and --sites out")
        return ranked(session, compared.organism, lists, budget)
    if base is None or aligned is None or len(shares) != 1:
        raise UsageError("expected --base and --aligned with one --top, or --organism")

    def work() -> dict[str, Any]:
        from safety_neurons.studies import compare as study

        pair = session.pair(base, aligned)
        completions = session.folder.path("completions.jsonl")
        names = ("harmful", "harmless", "prompts", "find_harmless")
        harmful, harmless, *looked_at = (session.read(name, pair.base, lists.limit) for name in names)
        with session.status("compare") as progress:
            comparison = study(
                pair.base,
                pair.aligned,
                harmful,
                harmless,
                find_prompts=looked_at[0],
                find_harmless=looked_at[1],
                truth=session.neurons(truth.truth, pair.base) if truth.truth else None,
                sites=listed(at.sites),
                top=shares[0],
                methods=listed(budget.methods),
                random=budget.random,
                max_new_tokens=budget.max_new_tokens,
                completions_file=completions,
                place=session.folder.path,
                progress=progress,
                **session.running,
            )
        session.notes.extend(comparison.bench.notes)
        return {**comparison.record(), "completions": str(completions)}

    return session.run(work)


def ranked(session: Session, organisms: list[str], lists: Lists, budget: MethodBudget) -> dict[str, Any]:
    """All methods over several organisms, with a figure beside the table."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import rank

        with session.status("compare") as progress:
            ranking = rank(
                organisms,
                tops=parse_sizes(budget.top, "--top"),
                methods=listed(budget.methods),
                random=budget.random,
                find=budget.find,
                measured=lists.limit or 200,
                max_new_tokens=budget.max_new_tokens,
                place=session.folder.path,
                progress=progress,
                **session.running,
            )
        session.notes.extend(dict.fromkeys(note for entry in ranking.entries for note in entry.comparison.bench.notes))
        record = ranking.record()
        shown = session.drawn(dict(record), session.folder.path("ranking.svg").absolute())
        return {**shown, "methods": record["organisms"][0]["methods"]}

    return session.run(work)
