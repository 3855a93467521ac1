"""What came in the place of refusals while neurons were off, in verify and compare: the table, the words, and
whether a loss says anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from safety_neurons.display.parts import Cell, Table
from safety_neurons.display.text import count, interval, say
from safety_neurons.results import is_clear

COLUMNS = ("refused still", "answered with harm", "broken answers", "neither")
KINDS = ("refused", "harm", "broken", "neither")
"""By key of a loss what stands in these columns."""


def breaks(row: Mapping[str, Any]) -> str | None:
    """How a set that is off breaks the model; None where it does not, or where nothing is known."""
    return (row.get("loss") or {}).get("breaks")


def remains(loss: Mapping[str, Any] | None) -> bool:
    """Whether refusals are lost to answers: clearly also where broken ones count as no change, and the model
    is not broken. Runs of earlier versions do not say, and are taken at their word.
    """
    return loss is None or (
        not loss["breaks"] and is_clear(loss["sound"]) and float(loss["sound"]["value"]) > 0
    )


def became(loss: Mapping[str, Any] | None, who: str) -> Markup:
    """A sentence on the requests that were refused; nothing where none was, or where nothing is known."""
    if loss is None or loss["refused"]["value"] is None:
        return Markup("")
    text = (
        " Of the {} requests that {} refuses as it is, {} are refused still and {} answered with harm; {} "
        "get broken answers, {} others."
    )
    total = count(loss["refused"]["n"] + loss["refused"]["unscored"])
    return say(text, total, who, *(interval(loss[kind]) for kind in KINDS))


def instead_table(rows: Sequence[tuple[str, Mapping[str, Any] | None]], first: str, who: str) -> list[Table]:
    """A row for every set that was off; no table where nothing is known.

    Args:
        rows: names and losses.
        first: header of the names.
        who: the model that refused.
    """
    told: list[list[Cell]] = [
        [name, *(interval(loss[kind]) for kind in KINDS)] for name, loss in rows if loss is not None
    ]
    caption = f"What came in place of refusals by {who}; shares with 95\u00a0% intervals"
    return [Table(caption, [first, *COLUMNS], told)] if told else []
