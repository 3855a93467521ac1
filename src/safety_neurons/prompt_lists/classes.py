"""Data sets of the Hugging Face hub as files: what their features say of the rows, and what the hub's viewer
leaves out of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from safety_neurons.counting import numbered

_AROUND = ("row_idx", "row", "truncated_cells")


def class_names(features: Any) -> dict[str, list[str]]:
    """By column of classes, stored as numbers, what the numbers mean.

    Args:
        features: as `dataset_info.json`, the metadata of Parquet files, the hub's viewer (a list) or a
            `datasets.Dataset` in memory hold them; anything else names nothing.
    """
    if isinstance(features, Sequence) and not isinstance(features, str):
        features = {one.get("name"): one.get("type") for one in features if isinstance(one, Mapping)}
    found: dict[str, list[str]] = {}
    for column, kind in features.items() if isinstance(features, Mapping) else ():
        names = _entry(kind, "names")
        if _entry(kind, "_type") == "ClassLabel" and isinstance(names, list):
            found[str(column)] = list(map(str, names))
    return found


def _entry(kind: Any, name: str) -> Any:
    return kind.get(name) if isinstance(kind, Mapping) else getattr(kind, name, None)


def with_class_names(
    rows: Iterable[Mapping[str, Any]], names: Mapping[str, Sequence[str]], notes: list[str]
) -> Iterator[dict[str, Any]]:
    """The rows with the names of classes in the place of their numbers; −1 stands for none.

    Which number is which is the data set's choice: a 0 may well mean unsafe.
    """
    if names:
        shown = "; ".join(
            f"{column!r}: {', '.join(f'{number} {name}' for number, name in enumerate(kinds[:4]))}"
            for column, kinds in names.items()
        )
        notes.append(f"numbers of classes are read by the names that the data set gives them ({shown})")
    for row in rows:
        yield {key: _named(value, names[key]) if key in names else value for key, value in row.items()}


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None if value == -1 else value


def is_viewed(whole: Mapping[str, Any]) -> bool:
    """Whether a JSON object is what the hub's viewer gives of a data set."""
    rows = whole.get("rows")
    return (
        isinstance(whole.get("features"), list)
        and isinstance(rows, list)
        and all(isinstance(one, Mapping) and isinstance(one.get("row"), Mapping) for one in rows)
    )


def viewed_rows(whole: Mapping[str, Any], notes: list[str]) -> Iterator[dict[str, Any] | str]:
    """The rows that the hub's viewer gives; of one with cells that it cut off, why it cannot be used."""
    rows, total = whole["rows"], whole.get("num_rows_total")
    if isinstance(total, int) and total > len(rows):
        notes.append(f"the viewer gave {numbered(len(rows), 'row')} of {total:,}")
    named = with_class_names((one["row"] for one in rows), class_names(whole["features"]), notes)
    for number, (one, row) in enumerate(zip(rows, named, strict=True), 1):
        cut = one.get("truncated_cells")
        beside = {key: value for key, value in one.items() if key not in _AROUND}
        yield (
            f"record {number} is cut off in {', '.join(map(str, cut))} by the hub's viewer"
            if isinstance(cut, list) and cut
            else {**beside, **row}
        )
