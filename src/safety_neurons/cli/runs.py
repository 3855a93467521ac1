"""report, doctor, demo: report on several runs, check a model, tell the whole story on an organism."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Annotated, Any

from safety_neurons.arguments import well_typed
from safety_neurons.cli import console
from safety_neurons.cli.session import Common, OneModel, Session
from safety_neurons.cli.verb import INTERRUPTED, verb
from safety_neurons.declarations import Declaration, Positional
from safety_neurons.errors import ModelError, RunError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported(Declaration):
    """What stands in a report."""

    runs: Annotated[list[pathlib.Path], Positional]
    """Folders of finished runs."""
    title: str = "Safety neurons"
    """Title of the page."""


@verb("report")
def report(session: Session, reported: Reported) -> dict[str, Any]:
    """One self-contained HTML page from finished runs; --out names the file."""
    from safety_neurons.report import write_report

    path = session.writes(session.common.out or pathlib.Path("report.html"))
    path = write_report(reported.runs, path, title=reported.title)
    if not session.quiet:
        console.say(("dim", "report "), str(path))
    return {"report": str(path)}


ORGANISM = "natural"
PLANTED = "planted"
LABELLED = ("--unsafe", "builtin:harmful", "--safe", "builtin:harmless")
WordsOf = Callable[..., list[str]]
"""Words of a command and the name of its folder -> the words with seed and folder."""
METHODS = [
    "--methods",
    "mask,attribution-patching,swap-attribution,contrast,importance-contrast,importance,attribution,weight-change",
]
"""Those of the comparison that the demo has time for."""


@verb("doctor")
def doctor(session: Session, models: OneModel) -> dict[str, Any]:
    """Check on your own model: coverage, identity, padding, self-patch, exactness, cost."""

    def work() -> dict[str, Any]:
        from safety_neurons.studies import doctor as examine

        loaded = session.model(models.model)
        with session.status("doctor") as progress:
            return {**examine(loaded, seed=session.common.seed, progress=progress).record()}

    result = session.run(work)
    if not result["healthy"]:
        failed = [check["check"] for check in result["checks"] if check["passed"] is False]
        raise ModelError(
            f"{len(failed)} checks failed ({', '.join(failed)}); numbers found on this model are not "
            "to be trusted"
        )
    return result


@dataclasses.dataclass(frozen=True)
class Hurried(Declaration):
    """How long the story is."""

    quick: bool = False
    """Fewer prompts and sizes: a minute instead of five."""


@verb("demo")
def tell_story(session: Session, hurried: Hurried) -> dict[str, Any]:
    """The whole story on a small organism; ends with the path of a report."""
    return tell(session.common, session.into("demo"), quick=hurried.quick)


@well_typed
def demo(out: str | pathlib.Path = "runs/demo", *, quick: bool = False, seed: int = 0) -> pathlib.Path:
    """The whole story on the organism that ships with the package. Returns the path of the report."""
    return pathlib.Path(
        tell(Common(out=pathlib.Path(out), json=True, seed=seed), pathlib.Path(out), quick=quick)["report"]
    )


def chapters(folder: pathlib.Path, *, quick: bool, seed: int) -> list[tuple[str, list[str]]]:
    """Every step of the story: what it answers, and the command that answers it."""
    pair = ["--base", f"organism:{ORGANISM}/sft", "--aligned", f"organism:{ORGANISM}/dpo"]
    planted = ["--base", f"organism:{PLANTED}/base", "--aligned", f"organism:{PLANTED}/aligned"]
    limit = ["--limit", "20" if quick else "60"]
    measured = [*limit, "--random", "3", "--max-new-tokens", "24"]
    sizes = "0.02,0.1" if quick else "0.01,0.02,0.05,0.1,0.2"

    def step(*words: str, to: str) -> list[str]:
        return [*words, "--seed", str(seed), "--out", str(folder / to)]

    return [
        ("Is the model understood?", step("doctor", "--model", f"organism:{ORGANISM}/dpo", to="doctor")),
        (
            "Paper 1: which rows and columns matter for harmful requests?",
            step(
                "find",
                "importance",
                "--model",
                f"organism:{ORGANISM}/dpo",
                "--top",
                "0.01",
                *limit,
                to="importance",
            ),
        ),
        (
            "Paper 2: which activations differ between the unsafe and the safe model?",
            step("find", "contrast", *pair, "--top", "0.05", *limit, to="contrast"),
        ),
        (
            "Beyond both: which activations would restore the refusal?",
            step("find", "attribution-patching", *pair, "--top", "0.05", *limit, to="attribution-patching"),
        ),
        (
            "Does the paper's ranking carry the safety, and how many neurons does that take?",
            step(
                "verify",
                "patch",
                *pair,
                "--scores",
                str(folder / "contrast"),
                "--sizes",
                sizes,
                *measured,
                to="verify-contrast",
            ),
        ),
        (
            "Does attribution patching need fewer?",
            step(
                *(
                    "verify",
                    "patch",
                    *pair,
                    "--scores",
                    str(folder / "attribution-patching"),
                    "--sizes",
                    sizes,
                    *measured,
                ),
                to="verify-attribution-patching",
            ),
        ),
        (
            "Are they necessary? The safe model with them switched off",
            step(
                *(
                    "verify",
                    "deactivate",
                    "--model",
                    f"organism:{ORGANISM}/dpo",
                    "--neurons",
                    str(folder / "attribution-patching"),
                ),
                *measured,
                to="verify-deactivate",
            ),
        ),
        ("Methods at one budget", step("compare", *pair, "--top", "0.05", *measured, *METHODS, to="compare")),
        (
            "Methods where the truth is planted",
            step(
                "compare",
                *planted,
                "--truth",
                f"organism:{PLANTED}/truth",
                *measured,
                *METHODS,
                to="compare-planted",
            ),
        ),
        *uses(folder, step, quick=quick),
    ]


def uses(folder: pathlib.Path, step: WordsOf, *, quick: bool) -> list[tuple[str, list[str]]]:
    """What can be done with the sets that were found: look at them, and guard the unsafe model with them."""
    sets = [str(folder / method) for method in ("importance", "contrast", "attribution-patching")]
    unsafe = ["--model", f"organism:{ORGANISM}/sft"]
    held_out = ["--limit", "64" if quick else "200", "--random", "3", "--perturbations", "none"]
    return [
        ("Where do the neurons of each method lie?", step("analyze", "layers", *sets, to="layers")),
        ("Do the methods find the same neurons?", step("analyze", "overlap", *sets, to="overlap")),
        (
            "Can they tell before the first token that an answer would be unsafe?",
            step("guard", "fit", *unsafe, "--neurons", sets[-1], *LABELLED, "--fpr", "0.05", to="guard"),
        ),
        (
            "Is such a guard worth more than words or random neurons?",
            step(
                "guard", "evaluate", *unsafe, "--guard", str(folder / "guard"), *held_out, to="guard-evaluate"
            ),
        ),
    ]


def tell(common: Common, out: pathlib.Path, *, quick: bool) -> dict[str, Any]:
    """Run every step, then the report."""
    started = time.monotonic()
    steps = chapters(out, quick=quick, seed=common.seed)
    for number, (question, words) in enumerate(steps, start=1):
        if not common.json:
            console.rule(f"{number}/{len(steps)} {question}")
            console.say(("dim", f"$ safety-neurons {' '.join(words)}\n"))
        call(words, common)
    runs = [words[words.index("--out") + 1] for _, words in steps]
    report = out / "report.html"
    call(
        ["report", *runs, "--title", "Safety neurons of an organism", "--out", str(report)], common, say=False
    )
    result = {"report": str(report.absolute()), "runs": runs, "seconds": time.monotonic() - started}
    if not common.json:
        console.rule()
        console.say(f"done in {result['seconds']:.0f} s\n", ("bold", result["report"]))
    return result


def call(words: list[str], common: Common, *, say: bool = True) -> None:
    """One command in this process; a failure carries its own one-line error."""
    from safety_neurons.cli.verb import build

    quiet = common.json or not say
    line = [*words, *(["--json"] if quiet else []), *(["--overwrite"] if common.overwrite else [])]
    with console.caught() if quiet else console.shared() as said_by:
        try:
            build()(line, standalone_mode=False)
        except SystemExit as stop:
            if not stop.code:
                return
            if stop.code == INTERRUPTED:
                raise KeyboardInterrupt from None
            message = (
                (said_by.result or {}).get("error", "see the line above") if quiet else "see the line above"
            )
            raise RunError(
                f"`safety-neurons {' '.join(words[:2])}` failed: {message}; run it alone with --debug"
            ) from None
