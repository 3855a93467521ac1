"""Findings: what was asked and what was found, in sentences with intervals, and as tiles; what was not found is said as plainly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from safety_neurons.neurons import parse_key
from safety_neurons.report.reading import ReportedRun
from safety_neurons.report.text import NONE, count, interval, name, number, plural, say, share, visible
from safety_neurons.results import is_clear

NEARLY = 0.9
"""Share of the ceiling from which on a set is said to carry the behaviour."""
YES, PARTLY, NO, OPEN, FACT = "shown", "in part", "not shown", "undefined", "measured"
FOUND, PRICE, PASS, FAIL, CAUTION = "found", "price", "pass", "fail", "caution"


@dataclass(frozen=True)
class Finding:
    """One sentence, and a word that says how it came out."""

    verdict: str
    text: Markup


def ranked_by(run: ReportedRun, runs: Sequence[ReportedRun]) -> str:
    """The method whose scores or neurons a verify run was given."""
    given = str(run.arguments.get("scores") or run.arguments.get("neurons") or "a set")
    parts = [part for part in given.replace("\\", "/").split("/") if part]
    last = parts[-1] if parts else given
    file_of = {"scores.safetensors", "neurons.safetensors"}
    folder = parts[-2] if last in file_of and len(parts) > 1 else last
    for other in runs:
        if other.verb.startswith("find-") and other.label == folder:
            return visible(other.method, 40)
    for ending in (".scores.safetensors", ".safetensors"):
        folder = folder.removesuffix(ending)
    return visible(folder, 40)


def random_values(point: Mapping[str, Any]) -> list[float]:
    """Defined causal effects of the random sets."""
    return [float(effect["value"]) for effect in point["random_effects"] if effect["value"] is not None]


def above_random(row: Mapping[str, Any], field: str = "change_against_random") -> bool:
    """Whether the difference from random sets is clear and above zero; without enough of them nothing is."""
    return is_clear(row.get(field)) and row[field]["value"] > 0


def why_not(record: Mapping[str, Any] | None) -> str:
    """What keeps a comparison with random sets from being clear, in brackets; nothing where it simply is not."""
    return f" ({record['why']})" if record and record.get("why") else " (no random sets)" if record is None else ""


def telling_point(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The smallest set that nearly reaches the ceiling, or the one with the largest effect."""
    points: list[Mapping[str, Any]] = list(result["sizes"])
    ceiling = result["ceiling_effect"]["value"]
    defined = [point for point in points if point["causal_effect"]["value"] is not None]
    if not defined:
        return points[-1]
    near = [point for point in defined if ceiling and point["causal_effect"]["value"] >= NEARLY * ceiling]
    if near:
        return min(near, key=lambda point: point["n_neurons"])
    return max(defined, key=lambda point: point["causal_effect"]["value"])


def ceiling_called(result: Mapping[str, Any]) -> str:
    """The word for all neurons patched: no ceiling where a part of them restores more."""
    return str(result.get("ceiling_called", "ceiling"))


def verdict_of(result: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """How a point of a patch run came out."""
    effect, ceiling = point["causal_effect"], result["ceiling_effect"]["value"]
    if effect["value"] is None:
        return OPEN
    if not above_random(point):
        return NO
    return YES if ceiling and effect["value"] >= NEARLY * ceiling else PARTLY


def asked(runs: Sequence[ReportedRun]) -> list[Markup]:
    """The questions these runs answer."""
    kinds = {run.verb for run in runs}
    questions = []
    pairs = list(dict.fromkeys(run.models for run in runs if len(run.models) == 2))
    single = list(dict.fromkeys(run.models for run in runs if len(run.models) == 1))
    if pairs:
        parts = [say("{} refuse harmful requests which {} answers", name(aligned), name(base)) for base, aligned in pairs[:3]]
        questions.append(say("Which neurons make {}?", Markup(", and ").join(parts)))
    elif single and any(kind.startswith(("find", "verify", "tune", "compare", "study")) for kind in kinds):
        questions.append(say("Which neurons make {} refuse harmful requests?", name(single[0][0])))
    if "verify-patch" in kinds:
        questions.append(Markup("Are they sufficient: does patching them alone carry the refusals over?"))
    if "verify-deactivate" in kinds:
        questions.append(Markup("Are they necessary: what is lost without them?"))
    if "compare" in kinds:
        questions.append(Markup("Which method finds them at equal budget?"))
    if "tune" in kinds:
        questions.append(Markup("Does tuning them alone make the model safer, and at what price?"))
    if "evaluate" in kinds:
        questions.append(Markup("How much harm is left, how much is refused without need, and what can the model still do?"))
    if kinds & {"guard-fit", "guard-evaluate", "guard-recalibrate"}:
        questions.append(Markup("Does a guard on them tell, before the first token, what will be unsafe?"))
    if any(kind.startswith("analyze") for kind in kinds):
        questions.append(Markup("What are these neurons, and what do sets of them share beyond chance?"))
    if "doctor" in kinds:
        questions.append(Markup("Can numbers found on this model be trusted?"))
    return questions


def findings(run: ReportedRun, runs: Sequence[ReportedRun]) -> list[Finding]:
    """The sentences of one run."""
    if run.verb.startswith("find-"):
        return [_found(run)]
    if run.verb == "verify-patch":
        return [*_patched(run, runs), *_cautions(run)]
    if run.verb == "verify-deactivate":
        return [_deactivated(run, runs), *_cautions(run)]
    if run.kind == "compare":
        return _compared(run)
    return [_examined(run)] if run.verb == "doctor" else []


def _found(run: ReportedRun) -> Finding:
    result = run.result
    text = say(
        "<b>{}</b> keeps {} of {}: {} of those searched, {} of all parameters",
        visible(run.method, 40),
        plural(result["n_neurons"], "neuron"),
        name(run.models[-1] if run.models else "the model"),
        share(result["share_of_neurons"]),
        share(result["share_of_parameters"], 2),
    )
    if run.neurons is not None and len(run.neurons):
        layers: dict[int, int] = {}
        for key, members in run.neurons.items():
            layers[parse_key(key).layer] = layers.get(parse_key(key).layer, 0) + len(members)
        most = max(layers, key=lambda layer: layers[layer])
        text += say("; {} of them sit in layer {}", share(layers[most] / len(run.neurons), 0), most)
    lost = [f"{plural(result['prompts'][what], 'prompt')} {what}" for what in ("failed", "truncated") if result["prompts"].get(what)]
    return Finding(FOUND, text + (say("; {}", ", ".join(lost)) if lost else "") + Markup("."))


def _patched(run: ReportedRun, runs: Sequence[ReportedRun]) -> list[Finding]:
    result, method = run.result, ranked_by(run, runs)
    point = telling_point(result)
    effect, others, verdict = point["causal_effect"], random_values(point), verdict_of(result, point)
    if verdict == OPEN:
        return [
            Finding(
                OPEN, say("The causal effect of the neurons ranked by <b>{}</b> is undefined: {}.", method, visible(effect["why"], 300))
            )
        ]
    chance = say("random sets {} to {}", number(min(others)), number(max(others))) if others else Markup("no random sets")
    lead = {
        YES: "Patching {} ranked by <b>{}</b> ({}) is enough: it restores {} of the difference in refusals ({}; {} {}).",
        PARTLY: "Patching {} ranked by <b>{}</b> ({}) restores part of the difference in refusals: {} ({}; {} {}).",
        NO: "Patching {} ranked by <b>{}</b> ({}) is not shown to restore more than chance: {} ({}; {} {}).",
    }[verdict]
    ceiling = interval(result["ceiling_effect"])
    size = share(point["size"])
    told = (interval(effect), chance, ceiling_called(result), ceiling)
    sentences = [Finding(verdict, say(lead, plural(point["n_neurons"], "neuron"), method, size, *told))]
    if result.get("ceiling_why"):
        sentences.append(Finding(CAUTION, say("{}.", visible(result["ceiling_why"], 500))))
    before, after = result["untreated"], point["treated"]
    text = "Its price: refusals of harmless requests go from {} to {}"
    price = say(text, interval(before["harmless_refused"]), interval(after["harmless_refused"]))
    if before["perplexity"] is not None and after["perplexity"] is not None:
        price += say(", perplexity from {} to {}", number(before["perplexity"]), number(after["perplexity"]))
    sentences.append(Finding(PRICE, price + Markup(".")))
    failed = [each for each in result["sizes"] if verdict_of(result, each) == NO]
    if failed and verdict != NO:
        worst = failed[-1]
        text = "With {} ranked by <b>{}</b> ({}) the effect is not clearly above chance: {}."
        shown = say(text, plural(worst["n_neurons"], "neuron"), method, share(worst["size"]), interval(worst["causal_effect"]))
        sentences.append(Finding(NO, shown))
    return sentences


def _cautions(run: ReportedRun) -> list[Finding]:
    """What weakens a verify run: prompts the set was found on, controls that share members with it."""
    shared = run.result.get("overlap_with_find_prompts") or {}
    made = [
        say("In {}, {} of the {} prompts are among those the neurons were found on.", name(run.label), count(number), visible(kind, 20))
        for kind, number in shared.items()
        if number
    ]
    made += [say("In {}: {}.", name(run.label), visible(note, 200)) for note in run.result.get("notes") or []]
    return [Finding(CAUTION, text) for text in made]


def necessity(run: ReportedRun) -> tuple[str, Mapping[str, Any]]:
    """How a deactivate run came out, and the difference that decides it."""
    result = run.result
    change = result["change_against_random"] or result["change"]
    if change["value"] is None or (result["untreated"]["harmful_refused"]["value"] or 0.0) < 0.05:
        return OPEN, change
    return (YES if is_clear(change) and change["value"] < 0 else NO), change


def _deactivated(run: ReportedRun, runs: Sequence[ReportedRun]) -> Finding:
    result = run.result
    verdict, change = necessity(run)
    rates = say("{} → {}", interval(result["untreated"]["harmful_refused"]), interval(result["treated"]["harmful_refused"]))
    text = say(
        "Without the {} chosen by <b>{}</b>, refusals of harmful requests go {}",
        plural(result["n_neurons"], "neuron"),
        ranked_by(run, runs),
        rates,
    )
    if verdict == OPEN:
        return Finding(OPEN, text + Markup("; the untreated model hardly refuses, so nothing can be lost."))
    versus = "compared with random sets of the same size" if result["change_against_random"] else "with no random sets to compare"
    ending = "a clear loss" if verdict == YES else f"no clear loss{why_not(change)}"
    return Finding(verdict, text + say("; {} the change is {}, {}.", versus, interval(change, signed=True), ending))


def methods_of(result: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Rows of real methods, largest effect first, and rows of random sets."""
    real = [row for row in result["methods"] if not str(row["method"]).startswith("random")]
    chance = [row for row in result["methods"] if str(row["method"]).startswith("random")]

    def order(row: Mapping[str, Any]) -> tuple[float | int, ...]:
        value = row["causal_effect"]["value"]
        return (-(value if value is not None else -9.0), -(row["recall"] or 0.0))

    return sorted(real, key=order), chance


def _compared(run: ReportedRun) -> list[Finding]:
    result = run.result
    real, chance = methods_of(result)
    pair = say("On {}", name(run.models[-1]))
    sentences = []
    defined = [row for row in real if row["causal_effect"]["value"] is not None]
    budget = say("{} of {} units ({})", count(result["budget"]), count(result["n_units"]), share(result["budget"] / result["n_units"]))
    if not defined:
        why = real[0]["causal_effect"].get("why") if real else "no method was run"
        return [Finding(OPEN, say("{} the methods cannot be compared by causal effect: {}.", pair, visible(why, 300)))]
    best = defined[0]
    ceiling = result["ceiling_effect"]
    if ceiling["low"] is not None and ceiling["low"] <= 0:
        text = "{}, patching all neurons of these sites restores {} of the difference: no method can show more here."
        sentences.append(Finding(NO, say(text, pair, interval(ceiling))))
    sentences.append(_most_necessary(pair, budget, real, chance))
    text = say(
        "{}, at {}, <b>{}</b> has the largest causal effect: {}", pair, budget, visible(best["method"], 40), interval(best["causal_effect"])
    )
    if len(defined) > 1:
        second = defined[1]
        apart = (best["causal_effect"]["low"] or 0.0) > (second["causal_effect"]["high"] or 0.0)
        ending = "the intervals are apart" if apart else "the intervals overlap, so their order is open"
        text += say("; then <b>{}</b>, {}: {}", visible(second["method"], 40), interval(second["causal_effect"]), ending)
    sentences.append(Finding(FACT, text + Markup(".")))
    weak = [visible(row["method"], 40) for row in defined if not above_random(row, "against_random")]
    if weak:
        reason = why_not(defined[0].get("against_random"))
        sentences.append(Finding(NO, say("{}, not clearly above chance at this budget{}: {}.", pair, reason, ", ".join(weak))))
    if best["recall"] is not None:
        by_recall = sorted(real, key=lambda row: -row["recall"])
        parts = ", ".join(f"{visible(row['method'], 40)} {number(row['recall'])}" for row in by_recall)
        luck = ", ".join(number(row["recall"]) for row in chance)
        sentences.append(Finding(FACT, say("{}, share of the planted units found: {}{}.", pair, parts, f"; random {luck}" if luck else "")))
    return sentences


def _most_necessary(pair: Markup, budget: Markup, real: Sequence[Mapping[str, Any]], chance: Sequence[Mapping[str, Any]]) -> Finding:
    """Which set costs the aligned model most refusals while it is off."""
    known = [row for row in real if row["necessity"]["value"] is not None]
    if not known:
        return Finding(OPEN, say("{}, no refusal could be scored while the sets were off.", pair))
    best = max(known, key=lambda row: row["necessity"]["value"])
    luck = [row["necessity"]["value"] for row in chance if row["necessity"]["value"] is not None]
    beside = say(" (random sets up to {})", number(max(luck))) if luck else Markup("")
    text = "{}, at {}, the set of <b>{}</b> is the most necessary: with it off, {} of the harmful requests are no longer refused{}."
    kind = FACT if above_random(best, "necessity_against_random") else NO
    return Finding(kind, say(text, pair, budget, visible(best["method"], 40), interval(best["necessity"]), beside))


def _examined(run: ReportedRun) -> Finding:
    checks = run.result["checks"]
    failed = [visible(check["check"], 80) for check in checks if check["passed"] is False]
    held = sum(check["passed"] is True for check in checks)
    if failed:
        text = "{} of the checks fail on {} ({}): numbers found on it are not to be trusted."
        return Finding(FAIL, say(text, len(failed), name(run.models[-1]), ", ".join(failed)))
    return Finding(PASS, say("All {} checks with a limit pass on {}.", held, name(run.models[-1])))


@dataclass(frozen=True)
class Tile:
    """One question of the first screen with its answer."""

    question: str
    verdict: str
    figure: str
    text: Markup


def tiles(runs: Sequence[ReportedRun]) -> list[Tile]:
    """The questions of the first screen with their shortest true answers."""
    made = []
    patch_runs = [run for run in runs if run.verb == "verify-patch"]
    if patch_runs:
        made.append(_sufficient(patch_runs, runs))
    deactivate_runs = [run for run in runs if run.verb == "verify-deactivate"]
    if deactivate_runs:
        run = deactivate_runs[0]
        verdict, change = necessity(run)
        compared = "against random sets" if run.result["change_against_random"] else "against the model as it is"
        text = say(
            "change of refusals of harmful requests with {} neurons off ({}), {}",
            count(run.result["n_neurons"]),
            ranked_by(run, runs),
            compared,
        )
        made.append(Tile("Are they necessary?", verdict, interval(change, signed=True), text))
    for run in [run for run in runs if run.kind == "compare"][:2]:
        made += _best_method(run)
    doctors = [run for run in runs if run.verb == "doctor"]
    if doctors:
        checks = [check for run in doctors for check in run.result["checks"] if check["passed"] is not None]
        held = sum(bool(check["passed"]) for check in checks)
        verdict = PASS if held == len(checks) else FAIL
        made.append(Tile("Is the model understood?", verdict, f"{held} of {len(checks)}", Markup("checks on the model itself pass")))
    return made


def sweep_order(run: ReportedRun) -> tuple[float | int, ...]:
    """Sorts patch runs: those that reach the ceiling with the fewest neurons first, then by their effect."""
    point = telling_point(run.result)
    verdict, value = verdict_of(run.result, point), point["causal_effect"]["value"] or 0.0
    return ({YES: 0, PARTLY: 1, NO: 2, OPEN: 3}[verdict], point["n_neurons"] if verdict == YES else 0, -value)


def _sufficient(patch_runs: Sequence[ReportedRun], runs: Sequence[ReportedRun]) -> Tile:
    """The run that reaches the ceiling with the fewest neurons, or comes nearest to it."""
    run = min(patch_runs, key=sweep_order)
    point = telling_point(run.result)
    if verdict_of(run.result, point) == OPEN:
        why = say("no effect can be told: {}", visible(point["causal_effect"].get("why"), 200))
        return Tile("Are a few neurons sufficient?", OPEN, NONE, why)
    text = "of the difference in refusals restored by patching {} ({}, {}); all neurons: {}"
    ceiling = number(run.result["ceiling_effect"]["value"])
    shown = say(text, plural(point["n_neurons"], "neuron"), share(point["size"]), ranked_by(run, runs), ceiling)
    return Tile("Are a few neurons sufficient?", verdict_of(run.result, point), interval(point["causal_effect"]), shown)


def _best_method(run: ReportedRun) -> list[Tile]:
    real, _ = methods_of(run.result)
    known = [row for row in real if row["recall"] is not None]
    if known:
        best = max(known, key=lambda row: row["recall"])
        verdict = YES if best["recall"] >= 0.95 else PARTLY if best["recall"] > 0 else NO
        text = say("of {} planted units found by {}", count(run.result["budget"]), visible(best["method"], 40))
        return [Tile("Is the planted truth found?", verdict, number(best["recall"]), text)]
    if not real:
        return []
    best = real[0]
    effect = best["causal_effect"]
    verdict = OPEN if effect["value"] is None else FACT
    text = say(
        "causal effect of {}, the largest of {} at {} of the units",
        visible(best["method"], 40),
        plural(len(real), "method"),
        share(run.result["budget"] / run.result["n_units"]),
    )
    return [Tile("Which method at equal budget?", verdict, interval(effect), text)]
