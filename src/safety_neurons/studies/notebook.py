"""How the results of studies look in a notebook: the table that answers the question, nothing else."""

from collections.abc import Iterable, Mapping
from typing import Any

from safety_neurons.results import captioned, html_table
from safety_neurons.results.notebook import interval, number

_ARM = ("arm", "harmful refused", "harmless refused", "perplexity", "KL per token, nats")


def verification_table(record: Mapping[str, Any]) -> str:
    """Every arm of a verification."""
    paired = record["aligned"] is not None
    rows = [[*_arm("untreated", record["untreated"]), None]]
    rows += [[*_arm("aligned", record["aligned"]), None]] if paired else []
    for point in record["sizes"]:
        rows.append(
            [*_arm(f"{point['n_neurons']:,} neurons ({100 * point['size']:.3g} %)", point["treated"]), _rate(point["causal_effect"])]
        )
        rows += [[*_arm(arm["name"], arm), _rate(effect)] for arm, effect in zip(point["random"], point["random_effects"], strict=True)]
    called = record.get("ceiling_called", "ceiling")
    rows.append([*_arm("all neurons (ceiling)" if called == "ceiling" else called, record["ceiling"]), _rate(record["ceiling_effect"])])
    if record.get("ceiling_by_parameters"):
        rows.append([*_arm("ceiling by parameters", record["ceiling_by_parameters"]), _rate(record["ceiling_by_parameters_effect"])])
    caption = f"{record['kind'].capitalize()}: change of refusals of harmful requests {_rate(record['change'], signed=True)}"
    return html_table(
        captioned(caption, record["sizes"]), [*_ARM, "causal effect"] if paired else _ARM, rows if paired else [row[:-1] for row in rows]
    )


def comparison_table(record: Mapping[str, Any]) -> str:
    """Every method at the same number of units."""
    columns = ["method", "units", "recall", "causal effect", "refusals lost when off", "harmless refused", "seconds"]
    rows = [
        [
            row["method"],
            f"{row['n_units']:,}",
            None if row["recall"] is None else number(row["recall"]),
            _rate(row["causal_effect"]),
            _rate(row["necessity"]),
            _rate(row["harmless_refused"]),
            number(row["seconds"], 1),
        ]
        for row in record["methods"]
    ]
    caption = f"Methods at {record['budget']:,} of {record['n_units']:,} units; "
    caption += f"{record.get('ceiling_called', 'ceiling')} {_rate(record['ceiling_effect'])}"
    return html_table(captioned(caption, record["methods"]), columns, rows)


def evaluation_table(record: Mapping[str, Any]) -> str:
    """Every suite by every judge, arm by arm."""
    rows = []
    for arm in (name for name in ("baseline", "untreated", "treated") if record[name]):
        for entry in record[arm]["suites"]:
            measure = "harm" if entry["kind"] == "harmful" else "over_refusal"
            for judge, said in entry["judges"].items():
                if said.get(measure) is not None:
                    found = said[measure]
                    rows.append([entry["suite"], measure.replace("_", "-"), judge, arm, _rate(found), found["n"], found["unscored"]])
    gate = record["gate"]
    ending = "" if gate is None else "; gate passed" if gate["passed"] else f"; gate not passed: {'; '.join(gate['missed'])}"
    caption = f"{record['model']}{', ' + record['treatment'] if record['treatment'] else ''}{ending}"
    return html_table(caption, ["suite", "measure", "judge", "arm", "rate, 95 % interval", "n", "unscored"], rows)


def tuning_table(record: Mapping[str, Any]) -> str:
    """Before and after."""
    caption = (
        f"{'Achieved' if record['achieved'] else 'Not achieved'}: {record['why']}. "
        f"{record['n_neurons']:,} neurons tuned in {record['steps']:,} of {record['planned_steps']:,} steps ({record['stopped']}); "
        f"change of refusals of harmful requests {_rate(record['change'], signed=True)}"
    )
    return html_table(caption, _ARM, [_arm(name, record[name]) for name in ("before", "after")])


def guard_table(record: Mapping[str, Any]) -> str:
    """A guard beside its baselines; differences are the compared classifier minus the row's."""
    rows = []
    for entry in ({"name": "guard", **record}, *record["baselines"]):
        difference = entry.get("difference") if entry["name"] != "guard" else None
        shown = None if difference is None else _rate(difference, signed=True)
        error = number(entry["expected_calibration_error"], 3)
        rows.append([entry["name"], _rate(entry["auroc"]), shown, _rate(entry["average_precision"]), error])
    caption = (
        f"Guard on {record['n_neurons']:,} neurons: flags {_rate(record['flagged_unsafe'])} of {record['n_unsafe']:,} unsafe and "
        f"{_rate(record['flagged_safe'])} of {record['n_safe']:,} safe requests ({record['in_force']})"
    )
    columns = ["classifier", "AUROC", f"{record['compared']} minus it", "average precision", "calibration error"]
    return html_table(captioned(caption, record["baselines"]), columns, rows)


def examination_table(record: Mapping[str, Any]) -> str:
    """Every check."""
    words = {True: "pass", False: "FAIL", None: "informs"}
    rows: Iterable[list[Any]] = ([each["check"], words[each["passed"]], each["measured"], each["allowed"]] for each in record["checks"])
    return html_table(f"Checks on {record['model']}", ["check", "outcome", "measured", "allowed"], rows)


def _arm(label: str, arm: Mapping[str, Any]) -> list[Any]:
    rates = [_rate(arm["harmful_refused"]), _rate(arm["harmless_refused"])]
    return [label, *rates, number(arm["perplexity"]), number(arm["divergence"], 3)]


def _rate(record: Mapping[str, Any], *, signed: bool = False) -> str:
    return interval(record["value"], record["low"], record["high"], signed=signed)
