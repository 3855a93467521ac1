"""The house rules a machine can check. FLOORS, read from the top down, is the architecture."""

import ast
import functools
import importlib
import pathlib
import subprocess
import sys

import pytest

import safety_neurons

SOURCE = pathlib.Path(safety_neurons.__file__).parent
FLOORS = [
    {"errors", "counting", "strict_json"},
    {"arguments"},
    {"declarations"},
    {"prompt_lists", "neurons", "results", "analysis", "display"},
    {"model"},
    {"organism", "detectors", "interventions", "tuning", "guard", "judges", "suites", "capability"},
    {"studies"},
    {"report"},
    {"cli"},
    {"__main__"},
]
READERS, WORKERS = FLOORS[7], FLOORS[4] | FLOORS[5] | FLOORS[6]
FLOOR = {box: level for level, boxes in enumerate(FLOORS) for box in boxes}
HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_backward_hook",
)


def box_of(path: pathlib.Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


MODULES = {path: box_of(path) for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"}


@functools.cache
def nodes(path: pathlib.Path) -> list[ast.AST]:
    """All nodes of a module's syntax tree, itself first."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: pathlib.Path) -> set[str]:
    """Boxes of the package that a module imports, inside functions too."""
    seen = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            seen.add("a relative import")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "safety_neurons":
            parts = (node.module or "").split(".")
            seen |= (
                {parts[1]}
                if len(parts) > 1
                else {alias.name for alias in node.names} - {"__version__", "lazily"}
            )
        elif isinstance(node, ast.Import):
            seen |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("safety_neurons.")
            }
    return seen


def breaks_the_floors(box: str, seen: str) -> bool:
    if seen == box:
        return False
    if seen not in FLOOR:
        return True
    return (
        FLOOR[seen] > FLOOR[box]
        or (FLOOR[seen] == FLOOR[box] and FLOOR[box] != 3)
        or (box in READERS and seen in WORKERS)
    )


def test_imports_only_go_down():
    bad = [
        f"{path.relative_to(SOURCE)} imports {seen}"
        for path, box in MODULES.items()
        for seen in imports(path)
        if breaks_the_floors(box, seen)
    ]
    assert not bad, bad


def test_the_floor_rule_can_fail():
    assert breaks_the_floors("judges", "detectors")
    assert breaks_the_floors("neurons", "model")
    assert breaks_the_floors("report", "model")
    assert breaks_the_floors("model", "a relative import")
    assert not breaks_the_floors("detectors", "neurons")


def test_nouns_do_not_import_one_another_in_a_circle():
    arrows = {(box, seen) for path, box in MODULES.items() for seen in imports(path) if box != seen}
    assert not [(a, b) for a, b in arrows if (b, a) in arrows]


def test_every_box_has_a_floor():
    assert set(MODULES.values()) <= set(FLOOR)


def test_modules_and_functions_stay_small():
    """A file is an idea one reads in one sitting."""
    long = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 900:
            long.append(f"{path.relative_to(SOURCE)}: {text.count(chr(10))} lines")
        for node in nodes(path):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.end_lineno - node.lineno > 100
            ):
                long.append(
                    f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}: "
                    f"{node.end_lineno - node.lineno} lines"
                )
    assert not long, long


def test_hooks_live_in_one_file():
    bad = [
        str(path.relative_to(SOURCE))
        for path in MODULES
        if path != SOURCE / "model" / "hooks.py"
        and any(word in path.read_text(encoding="utf-8") for word in HOOKS)
    ]
    assert not bad, bad


def test_the_nouns_import_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "peft"}
    for path, box in MODULES.items():
        if FLOOR.get(box, 9) > 3:
            continue
        for node in nodes(path):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", None) or ""]
            )
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {name.split(".")[0] for name in names} & heavy, path


@pytest.mark.parametrize("module", ["safety_neurons", "safety_neurons.cli"])
def test_the_command_line_starts_without_the_heavy_libraries(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in "
        "sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_public_names_are_sorted_and_real():
    names = safety_neurons.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(safety_neurons, name) is not None, name


def test_every_verb_and_noun_of_a_box_that_a_reader_looks_for_has_a_public_name():
    wanted = {
        name
        for name in importlib.import_module("safety_neurons.detectors").__all__
        if name.startswith("find_")
    }
    wanted |= set(importlib.import_module("safety_neurons.interventions").__all__) | {
        "activation_statistics",
        "Completion",
        "Prompt",
    }
    wanted |= {"tune", "protected", "repair"}
    assert wanted <= set(safety_neurons.__all__)


def test_a_box_is_there_without_an_import_of_its_own():
    code = (
        "import safety_neurons as sn; print(sn.organism.names is not None, sn.prompts(['a']).texts, "
        "sn.errors.InputError.exit_code)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True ['a'] 1"


def test_a_wrong_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'find_contrasts'"):
        safety_neurons.find_contrasts  # noqa: B018


def test_every_method_of_a_paper_names_its_source():
    missing = []
    for box in ("detectors", "tuning", "guard", "interventions"):
        if not (SOURCE / box).is_dir():
            continue
        module = importlib.import_module(f"safety_neurons.{box}")
        for name in module.__all__:
            thing = getattr(module, name)
            if box == "detectors" and not name.startswith("find_"):
                continue  # The runner and the registry: what they run names its own source.
            if callable(thing) and not isinstance(thing, type) and "Source:" not in (thing.__doc__ or ""):
                missing.append(f"{box}.{name}")
    assert not missing, missing


def test_the_library_never_unpickles_or_evaluates():
    """Files of others are read by torch.load of weights only, in one module, and by nothing that runs what is
    in them.
    """
    words = (
        "import pickle",
        "from pickle import",
        "torch.load(",
        "trust_remote_code=True",
        "weights_only=False",
    )
    admitted = {
        ("model/files.py", "from pickle import"),
        ("model/files.py", "torch.load("),
    }
    texts = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in MODULES}
    assert not [
        (path, word)
        for path, text in texts.items()
        for word in words
        if word in text and (path, word) not in admitted
    ]
    assert "Unpickler" not in "".join(texts.values())
    assert all(
        "weights_only=True)" in line for line in texts["model/files.py"].splitlines() if "torch.load(" in line
    )


def test_test_modules_have_names_of_their_own():
    names = [path.name for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
    assert not (twice := sorted({name for name in names if names.count(name) > 1})), (
        f"pytest imports one of each name: {twice}"
    )


def test_no_result_crosses_the_border_of_a_box_as_a_mapping_of_anything():
    """What studies, results and report give and take is typed (`results.records`), or free JSON by its name
    (`strict_json.JsonObject`).
    """
    free = set()
    for path in MODULES:
        if box_of(path) in ("studies", "results", "display", "report"):
            free |= {
                f"{path.relative_to(SOURCE).as_posix()} {name}" for name in _with_free_json(nodes(path)[0])
            }
    assert not free, free


def _with_free_json(node: ast.AST) -> set[str]:
    """Public functions, and methods of public classes, in whose signature `dict[str, Any]` stands."""
    names = set()
    for one in ast.iter_child_nodes(node):
        public = not getattr(one, "name", "_").startswith("_") or getattr(one, "name", "") == "__init__"
        if isinstance(one, ast.ClassDef) and public:
            names |= {f"{one.name}.{name}" for name in _with_free_json(one)}
        elif isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and public:
            hints = [
                hint for part in ast.walk(one.args) if isinstance(part, ast.arg) and (hint := part.annotation)
            ]
            names |= (
                {one.name}
                if any("dict[str, Any]" in ast.unparse(hint) for hint in (*hints, one.returns) if hint)
                else set()
            )
    return names


def test_no_class_has_the_name_of_another():
    names = [node.name for path in MODULES for node in nodes(path) if isinstance(node, ast.ClassDef)]
    assert not (twice := {name for name in names if names.count(name) > 1}), twice


def test_functions_take_eight_arguments_at_most():
    many = set()
    for path in MODULES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len(names) - (names[:1] in (["self"], ["cls"])) > 8:
                    many.add(f"{path.relative_to(SOURCE).as_posix()} {node.name}")
    assert not many, many


def test_modules_do_not_import_one_another_in_a_circle():
    """Imports inside functions count; a box's own page (`__init__`), which only hands names on, does not."""
    names = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path
        for path in MODULES
        if path.name != "__init__.py"
    }
    below = {name: {seen for seen in _modules(path, names) if seen != name} for name, path in names.items()}
    reach: dict[str, set[str]] = {}
    for name in names:
        seen, open_ = set(), list(below[name])
        while open_:
            one = open_.pop()
            if one not in seen:
                seen.add(one)
                open_ += below[one]
        reach[name] = seen
    circles = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in names
        if name in reach[name]
    }
    assert not circles


def test_a_module_of_few_lines_serves_several():
    """What one module alone needs, and is short, stands in that module."""
    names = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path
        for path in MODULES
        if path.name not in ("__init__.py", "__main__.py")
    }
    used = [name for path in MODULES for name in _modules(path, names) if names[name] != path]
    small = {name for name, path in names.items() if path.read_text(encoding="utf-8").count("\n") < 60}
    assert not (lone := {name for name in small if used.count(name) <= 1}), lone


def _modules(path: pathlib.Path, names: dict[str, pathlib.Path]) -> set[str]:
    seen = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            seen |= {
                name
                for one in node.names
                for name in (f"{node.module}.{one.name}", node.module)
                if name in names
            }
        elif isinstance(node, ast.Import):
            seen |= {one.name for one in node.names if one.name in names}
    return seen
