"""doctor and demo: is this model understood, and what is all this about."""

from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.options import Common, Model
from safety_neurons.cli.session import Session, default_folder
from safety_neurons.cli.verb import verb


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    verb(app, "demo")(demo)
    verb(app, "doctor")(doctor)


def demo(
    common: Common,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts and sizes: a minute instead of five.")] = False,
) -> dict[str, Any]:
    """The whole story on a small organism; ends with the path of a report."""
    import time

    from safety_neurons.cli.story import tell

    return tell(common, common.out or default_folder("demo", time.strftime("%Y%m%d-%H%M%S")), quick=quick)


def doctor(common: Common, model: Model) -> dict[str, Any]:
    """Check on your own model: coverage, identity, padding, self-patch, exactness, cost."""
    session = Session("doctor", common, {"model": model})

    def work() -> dict[str, Any]:
        from safety_neurons.studies import doctor as examine

        loaded = session.model(model)
        with session.status("doctor") as progress:
            return examine(loaded, seed=common.seed, progress=progress).record()

    result = session.run(work, show)
    if not result["healthy"]:
        from safety_neurons.errors import ModelError

        failed = [check["check"] for check in result["checks"] if check["passed"] is False]
        raise ModelError(f"{len(failed)} checks failed ({', '.join(failed)}); numbers found on this model are not to be trusted")
    return result


def show(result: dict[str, Any]) -> None:
    """One row a check."""
    marks = {True: ("green", "pass"), False: ("red", "FAIL"), None: ("dim", "–")}
    rows = [[check["check"], console.styled(marks[check["passed"]]), check["measured"], check["allowed"]] for check in result["checks"]]
    console.print_table(f"doctor: {result['model']}", ["check", "", "measured", "allowed"], rows)
