"""analyze languages and transfer: a set found on every group of requests, and what each does to all groups."""

import pathlib
from typing import Annotated, Any

import typer

from safety_neurons.cli import console
from safety_neurons.cli.analyze import app, figure
from safety_neurons.cli.options import Aligned, Base, Common, Harmless, MaxNewTokens, Model, Sites, listed
from safety_neurons.cli.session import Session, resolve
from safety_neurons.cli.verb import verb
from safety_neurons.detectors.methods import by_name
from safety_neurons.errors import UsageError

FIND, MEASURE = "Which neurons", "What is measured"
OptionalBase = Annotated[str | None, typer.Option(help="The less safe model, for methods that need a pair.", rich_help_panel="Models")]
Method = Annotated[str | None, typer.Option(help="As `compare` names them. [default: see above]", rich_help_panel=FIND)]
Units = Annotated[int | None, typer.Option(min=1, help="Units in each set.", rich_help_panel=FIND)]
Top = Annotated[float, typer.Option(help="Share of the units in each set, without --units.", rich_help_panel=FIND)]
FindLimit = Annotated[int | None, typer.Option(min=1, help="Find on the first N requests of each group.", rich_help_panel=FIND)]
TestLimit = Annotated[int | None, typer.Option(min=1, help="Measure on the first N requests of each group.", rich_help_panel=MEASURE)]
Random = Annotated[int, typer.Option(min=0, help="Random sets for each set.", rich_help_panel=MEASURE)]


@verb(app, "languages")
def languages(
    common: Common,
    model: Model,
    base: OptionalBase = None,
    languages: Annotated[str, typer.Option(help="Comma-separated languages of parallel requests.")] = "en,de,es",
    find_prompts: Annotated[
        str, typer.Option(help="Requests to find on; {language} stands for each.", rich_help_panel=FIND)
    ] = "builtin:harmful/{language}",
    sets: Annotated[
        str | None, typer.Option(help="LANGUAGE=FILE,…: sets that are there already, instead of finding.", rich_help_panel=FIND)
    ] = None,
    method: Method = None,
    units: Units = None,
    top: Top = 0.02,
    sites: Sites = None,
    find_limit: FindLimit = None,
    test_prompts: Annotated[
        str, typer.Option(help="Requests to measure on; {language} stands for each.", rich_help_panel=MEASURE)
    ] = "builtin:harmful-test/{language}",
    test_limit: TestLimit = None,
    definitions: Annotated[
        str, typer.Option(help="Which specific sets are deactivated: union, intersection.", rich_help_panel=MEASURE)
    ] = "union,intersection",
    random: Random = 5,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """Sets per language, what they share, and refusals in every language while each is off.

    Finds by swap-attribution where --base is given, otherwise by importance.
    """
    options = {name: value for name, value in locals().items() if name != "common"}
    codes = listed(languages) or ()
    given = named_files(sets, codes)
    chosen = method or ("swap-attribution" if base else "importance")
    check(options, codes, chosen)
    session = Session("analyze-languages", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons import analysis, studies

        less, loaded = models(session, base, model)
        tests = {code: session.prompts(test_prompts.replace("{language}", code), loaded, limit=test_limit) for code in codes}
        with session.status("analyze languages") as tell:
            if given:
                parts = {code: session.neurons(path, loaded) for code, path in given.items()}
            else:
                sources = {code: session.prompts(find_prompts.replace("{language}", code), loaded, limit=find_limit) for code in codes}
                parts = studies.find_by_group(less, loaded, studies.Groups(sources), **finding(session, options, chosen, tell))
            compared = analysis.languages(parts, seed=common.seed)
            matrix = studies.deactivation_matrix(
                loaded,
                wanted(compared.named(), definitions),
                tests,
                completions_file=session.folder.path("completions.jsonl"),
                progress=tell,
                **measuring(session, random, max_new_tokens),
            )
        session.notes.extend(matrix.notes)
        result = {
            "method": "given" if given else chosen,
            **compared.record(),
            **matrix.record(),
            "neurons": kept(session, compared.named()),
        }
        return {**result, **figure(session, "matrix_figure", result["matrix"], "change", "neurons that are off")}

    return session.run(work, show_languages)


@verb(app, "transfer")
def transfer(
    common: Common,
    base: Base,
    aligned: Aligned,
    prompts: Annotated[str, typer.Option(help="Requests to find on, told apart by --by.", rich_help_panel=FIND)] = "builtin:harmful",
    by: Annotated[str, typer.Option(help="category, language, or another field of the prompts.", rich_help_panel=FIND)] = "category",
    suites: Annotated[
        str | None,
        typer.Option(help="NAME=FILE,…: one group a file instead; odd records to find on, even ones to measure on.", rich_help_panel=FIND),
    ] = None,
    groups: Annotated[str | None, typer.Option(help="Only these groups, comma-separated.", rich_help_panel=FIND)] = None,
    method: Method = None,
    units: Units = None,
    top: Top = 0.02,
    sites: Sites = None,
    find_limit: FindLimit = None,
    harmful: Annotated[str, typer.Option(help="Requests to measure on.", rich_help_panel=MEASURE)] = "builtin:harmful-test",
    harmless: Harmless = "builtin:harmless-test",
    tasks: Annotated[str, typer.Option(help="Capability by name, comma-separated.", rich_help_panel=MEASURE)] = "perplexity,kl",
    answers: Annotated[str, typer.Option(help="Questions with answers: share given word for word.", rich_help_panel=MEASURE)] = "none",
    test_limit: TestLimit = None,
    random: Random = 5,
    max_new_tokens: MaxNewTokens = 64,
) -> dict[str, Any]:
    """Neurons found on one red-team set, their causal effect on the others, and general ability under patching.

    Finds by contrast, at down, unless a method is given.
    """
    options = {name: value for name, value in locals().items() if name != "common"}
    check(options, (), method or "contrast", pair=True)
    named_files(suites)
    session = Session("analyze-transfer", common, options)

    def work() -> dict[str, Any]:
        from safety_neurons import analysis, studies

        pair = session.pair(base, aligned)
        find, test = apart(session, options, pair.base)
        limit = None if test_limit is None else test_limit * len(test.names)
        safe = session.prompts(harmless, pair.base, limit=limit)
        task = None if answers == "none" else session.prompts(answers, pair.base, limit=limit)
        with session.status("analyze transfer") as tell:
            found = studies.find_by_group(pair.base, pair.aligned, find, **finding(session, options, method or "contrast", tell))
            moved = studies.transfer(
                pair.base,
                pair.aligned,
                found,
                test.members,
                safe,
                tasks=listed(tasks) or (),
                answers=task,
                limit=limit,
                completions_file=session.folder.path("completions.jsonl"),
                progress=tell,
                **measuring(session, random, max_new_tokens),
            )
        session.notes.extend(moved.notes)
        together = analysis.overlap(analysis.name_sets(found.items()), seed=common.seed).record() if len(found) > 1 else {"pairs": []}
        agreed = {"overlap": together["pairs"], "mean_jaccard": together.get("mean_jaccard")}
        result = {"method": method or "contrast", **moved.record(), **agreed, "neurons": kept(session, found)}
        return {**result, **figure(session, "matrix_figure", result["matrix"], "causal_effect", "found on")}

    return session.run(work, show_transfer)


def check(options: dict[str, Any], codes: tuple[str, ...], method: str, *, pair: bool = False) -> None:
    """Refuse what no model can make right."""
    if not pair and options["base"] is None and by_name(method).PAIR:
        raise UsageError(f"--method {method} needs a pair; give --base, or choose importance or attribution")
    by_name(method)
    if not 0 < options["top"] <= 1:
        raise UsageError(f"--top {options['top']} is not a share; expected above 0 and at most 1 (0.02 for two per cent)")
    if not pair and len(codes) < 2:
        raise UsageError(f"--languages {options['languages']!r}: expected at least two, comma-separated")
    for name in () if pair else ("find_prompts", "test_prompts"):
        if "{language}" not in options[name]:
            raise UsageError(f"--{name.replace('_', '-')} {options[name]!r}: expected {{language}} in it, which stands for each language")
    unknown = [part for part in listed(options.get("definitions")) or () if part not in ("union", "intersection")]
    if unknown:
        raise UsageError(f"--definitions {unknown[0]!r} is unknown; expected union, intersection or both")


def named_files(text: str | None, names: tuple[str, ...] = ()) -> dict[str, str]:
    """`NAME=FILE,…` as a dictionary."""
    found: dict[str, str] = {}
    for part in listed(text) or ():
        name, sign, path = part.partition("=")
        if not sign or not name or not path:
            raise UsageError(f"{part!r}: expected NAME=FILE, several of them separated by commas")
        found[name] = resolve(path)
    missing = [name for name in names if found and name not in found]
    if missing:
        raise UsageError(f"--sets has no set for {missing[0]!r}; expected one for every language")
    return found


def models(session: Session, base: str | None, model: str) -> tuple[Any, Any]:
    """The less safe model, where there is one, and the model."""
    if base is None:
        return None, session.model(model)
    pair = session.pair(base, model)
    return pair.base, pair.aligned


def finding(session: Session, options: dict[str, Any], method: str, tell: Any) -> dict[str, Any]:
    """Arguments of finding a set on every group."""
    return {
        "method": method,
        "units": options["units"],
        "top": options["top"],
        "sites": listed(options["sites"]) or (("down",) if method == "contrast" else None),
        "max_new_tokens": options["max_new_tokens"],
        "batch_size": session.batch_size(),
        "place": session.folder.path,
        "progress": tell,
    }


def measuring(session: Session, random: int, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of measuring."""
    return {"random": random, "seed": session.common.seed, "max_new_tokens": max_new_tokens, "batch_size": session.batch_size()}


def kept(session: Session, sets: dict[str, Any]) -> dict[str, str]:
    """Write the sets that have members; where they are."""
    files = {}
    for number, (name, neurons) in enumerate((name, neurons) for name, neurons in sets.items() if len(neurons)):
        file = session.folder.path(f"neurons-{number}.safetensors")
        neurons.save(file)
        files[name] = str(file)
    return files


def wanted(sets: dict[str, Any], definitions: str) -> dict[str, Any]:
    """The sets to deactivate: without the definitions that are not asked for."""
    asked = listed(definitions) or ()
    left_out = [f"minus {name}" for name in ("union", "intersection") if name not in asked]
    return {name: part for name, part in sets.items() if not any(name.endswith(end) for end in left_out)}


def apart(session: Session, options: dict[str, Any], model: Any) -> tuple[Any, Any]:
    """Requests to find on and to measure on, by group."""
    from safety_neurons.prompts import Prompts
    from safety_neurons.studies import Groups

    files = named_files(options["suites"])
    if files:
        whole = {name: session.prompts(path, model) if pathlib.Path(path).exists() else suite(path) for name, path in files.items()}
        find = {name: Prompts(list(prompts)[::2], name) for name, prompts in whole.items()}
        test = {name: Prompts(list(prompts)[1::2], name) for name, prompts in whole.items()}
    else:
        find, test = (dict(Groups.by(session.prompts(options[name], model), options["by"]).members) for name in ("prompts", "harmful"))
    names = list(listed(options["groups"]) or [name for name in find if name in test])
    unknown = [name for name in names if name not in find or name not in test]
    if unknown or not names:
        raise UsageError(f"no group {(unknown or [options['by']])[0]!r} to find and to measure on; the groups are {', '.join(find)}")
    return (
        Groups({name: find[name][: options["find_limit"]] for name in names}),
        Groups({name: test[name][: options["test_limit"]] for name in names}),
    )


def suite(name: str) -> Any:
    """The prompts of a named suite."""
    from safety_neurons.suites import suite as open_suite

    return open_suite(name).prompts


def show_languages(result: dict[str, Any]) -> None:
    """What is shared and what is specific, then the matrix."""
    rows = [
        [
            row["language"],
            row["n_units"],
            counted(row["minus_intersection"], row["n_neurons"]),
            counted(row["minus_union"], row["n_neurons"]),
        ]
        for row in result["languages"]
    ]
    console.print_table(
        f"Units of each language's set; {result['shared']['n_units']} shared by all",
        ["language", "units", "specific, minus intersection", "specific, minus union"],
        rows,
        caption="units (share of the set's neurons, in brackets what unrelated sets would have)",
    )
    show_matrix("\nRefusals of harmful requests while a set is off, minus refusals without", result["matrix"], "change", "set that is off")
    untreated = ", ".join(f"{name} {rate['value']:.2f}" for name, rate in result["untreated"].items() if rate["value"] is not None)
    console.say(f"refused untreated: {untreated}")
    if result["skipped"]:
        console.say(f"empty sets, not measured: {', '.join(result['skipped'])}")


def counted(part: dict[str, Any], whole: int) -> str:
    """Units of a part, its share of the set's neurons, and the share by chance."""
    return f"{part['n_units']} ({100 * part['share']:.0f} %, chance {100 * part['expected'] / max(1, whole):.0f} %)"


def show_matrix(title: str, cells: list[dict[str, Any]], field: str, corner: str) -> None:
    """Sets down, groups across; a star where a set clearly does more than random ones."""
    groups = list(dict.fromkeys(cell["group"] for cell in cells))
    rows = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        mine = {cell["group"]: cell for cell in cells if cell["set"] == name}
        rows.append([name, *(in_cell(mine[group], field) for group in groups)])
    few = next((cell["change_against_random"]["why"] for cell in cells if (cell["change_against_random"] or {}).get("why")), "")
    notes = ["* clearly more than random sets with as many neurons in every matrix", few]
    console.print_table(title, [corner, *groups], rows, caption="\n".join(note for note in notes if note), compared=cells)


def in_cell(cell: dict[str, Any], field: str) -> str:
    """A number, with a star where the set does more than random sets do."""
    from safety_neurons.results import is_clear

    value, against = cell[field]["value"], cell["change_against_random"]
    if value is None:
        return "–"
    if field == "change":
        return f"{value:+.2f}{'*' if is_clear(against) and against['value'] < 0 else ''}"
    return f"{value:.2f}{'*' if is_clear(against) and against['value'] > 0 else ''}"


def show_transfer(result: dict[str, Any]) -> None:
    """The matrix of causal effects, then what patching costs."""
    show_matrix("Causal effect: found on (rows), measured on (columns)", result["matrix"], "causal_effect", "found on")
    means = result["own_and_other"]
    shown = {name: "–" if mean["value"] is None else f"{mean['value']:.2f}" for name, mean in means.items()}
    console.say(f"mean causal effect on the set found on {shown['own']}, on others {shown['other']}")
    names = list(dict.fromkeys(name for row in result["ability"] for name in row["capability"]))
    rows = [
        [row["name"], digits(row["harmless_refused"]), *(digits(row["capability"].get(name)) for name in names), digits(row["task"])]
        for row in result["ability"]
    ]
    console.print_table("\nAbility while patched", ["arm", "harmless refused", *names, "task"], rows)


def digits(number: dict[str, Any] | None) -> str:
    """A value and below it its interval, three digits that matter."""
    if number is None or number["value"] is None:
        return "–"
    return f"{number['value']:.3g}\n[{number['low']:.3g}, {number['high']:.3g}]"
