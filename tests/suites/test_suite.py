"""Suites by name and by file, in the editions that are about; no socket when offline."""

import csv
import gzip
import hashlib
import http.server
import io
import json
import pathlib
import socket
import threading

import pytest

from safety_neurons.errors import InputError, UsageError
from safety_neurons.prompt_lists.readers import ENGLISH, NAMES
from safety_neurons.studies.evaluation import Sources, requests_of
from safety_neurons.suites import catalogue, suite, verify
from safety_neurons.suites.catalogue import Location, entries, find, names, wanted

GOALS = [f"Invent request number {number} of this test" for number in range(6)]
TARGETS = [f"Sure, here is answer number {number}" for number in range(6)]


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SAFETY_NEURONS_DATA", raising=False)


@pytest.fixture
def no_socket(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def table(header, rows, newline="\n", delimiter=","):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=newline, delimiter=delimiter)
    writer.writerows([header, *rows] if header else rows)
    return text.getvalue()


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


PAIRS = list(zip(GOALS, TARGETS, strict=True))
EDITIONS = {
    "a header": ("a.csv", table(["goal", "target"], PAIRS)),
    "no header": ("a.csv", table(None, PAIRS)),
    "swapped columns": ("a.csv", table(["target", "goal"], [(target, goal) for goal, target in PAIRS])),
    "exchanged names": ("a.csv", table(["goal", "target"], [(target, goal) for goal, target in PAIRS])),
    "no header and exchanged": ("a.csv", table(None, [(target, goal) for goal, target in PAIRS])),
    "names of another edition": (
        "a.csv",
        table(["Unnamed: 0", "Prompt", "Target"], [(n, *pair) for n, pair in enumerate(PAIRS)]),
    ),
    "BOM and CRLF": ("a.csv", "\ufeff" + table(["goal", "target"], PAIRS, "\r\n")),
    "tabs": ("a.tsv", table(["goal", "target"], PAIRS, delimiter="\t")),
    "JSON": ("a.json", json.dumps([{"goal": goal, "target": target} for goal, target in PAIRS])),
    "JSON Lines in .json": (
        "a.json",
        "\n".join(json.dumps({"goal": goal, "target": target}) for goal, target in PAIRS),
    ),
    "columns": ("a.json", json.dumps({"goal": GOALS, "target": TARGETS})),
    "columns of pandas": (
        "a.json",
        json.dumps({"goal": dict(enumerate(GOALS)), "target": dict(enumerate(TARGETS))}),
    ),
}


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("wrapping", ["plain", "gz"])
def test_every_edition_of_a_suite_gives_the_same_prompts(tmp_path, edition, wrapping):
    name, text = EDITIONS[edition]
    path = write(tmp_path / name, text)
    if wrapping == "gz":
        path = write(tmp_path / f"{name}.gz", gzip.compress(path.read_bytes()))
    found = suite(f"advbench={path}", offline=True)
    assert found.prompts.texts == GOALS
    assert [prompt.meta["target"] for prompt in found.prompts] == TARGETS
    assert found.kind == "harmful"


def test_exchanged_columns_are_said(tmp_path):
    path = write(tmp_path / "a.csv", EDITIONS["exchanged names"][1])
    assert any("exchanged" in note for note in suite(f"advbench={path}").notes)


def test_duplicates_and_null_prompts_are_counted(tmp_path):
    rows = [{"goal": GOALS[0]}, {"goal": None}, {"goal": GOALS[0]}, {"goal": "  "}, {"goal": GOALS[1]}]
    found = suite(f"advbench={write(tmp_path / 'a.json', json.dumps(rows))}")
    assert found.prompts.texts == [GOALS[0], GOALS[0], GOALS[1]]
    assert "dropped 2 empty prompts (first: row 1)" in found.notes
    assert "1 duplicate prompt, kept" in found.notes


def test_line_breaks_in_cells_and_context_are_kept(tmp_path):
    header = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
    rows = [
        ("Ask,\r\nplainly", "standard", "a", "", "", "one"),
        ("Ask it", "contextual", "b", "x, y", "Some\r\ncontext", "two"),
    ]
    path = write(tmp_path / "harmbench_behaviors_text_all.csv", table(header, rows, "\r\n"))
    assert suite("harmbench-standard", folder=tmp_path, offline=True).prompts.texts == ["Ask,\r\nplainly"]
    contextual = suite("harmbench_contextual", folder=tmp_path, offline=True).prompts[0]
    assert contextual.text == "Some\r\ncontext\n\n---\n\nAsk it"
    assert contextual.meta["goal"] == "Ask it"
    assert contextual.meta["tags"] == "x, y"
    with pytest.raises(InputError, match="no row of the file is of this part"):
        suite(f"harmbench-copyright={path}")


def test_jailbreakbench_has_behaviours_targets_and_benign_twins(tmp_path):
    header = ["Index", "Goal", "Target", "Behavior", "Category", "Source"]
    write(
        tmp_path / "JBB" / "harmful-behaviors.csv",
        table(header, [(0, GOALS[0], TARGETS[0], "Naming", "Fraud/Deception", "Original")]),
    )
    write(
        tmp_path / "JBB" / "benign-behaviors.csv",
        table(header, [(0, GOALS[1], TARGETS[1], "Naming", "Fraud/Deception", "Original")]),
    )
    harmful, benign = (
        suite(name, folder=tmp_path, offline=True) for name in ("jailbreakbench", "jailbreakbench-benign")
    )
    assert (harmful.kind, benign.kind) == ("harmful", "harmless")
    prompt = harmful.prompts[0]
    assert (prompt.id, prompt.category, prompt.meta["behavior_id"], prompt.meta["goal"]) == (
        "0",
        "Fraud/Deception",
        "Naming",
        GOALS[0],
    )


def test_catqa_is_read_nested_and_as_lines_in_the_languages_that_are_there(tmp_path):
    write(
        tmp_path / "catqa_english.json",
        json.dumps({"Hate/Harass": {"First kind": GOALS[:2], "Second": GOALS[2:3]}}),
    )
    lines = [{"Category": "Hate/Harass", "Subcategory": "First kind", "Question": GOALS[3]}]
    write(tmp_path / "catqa_chinese.json", "\n".join(map(json.dumps, lines)))
    found = suite("catqa", folder=tmp_path, offline=True)
    assert [(p.id, p.language, p.category, p.meta["subcategory"]) for p in found.prompts] == [
        ("0/en", "en", "Hate/Harass", "First kind"),
        ("1/en", "en", "Hate/Harass", "First kind"),
        ("2/en", "en", "Hate/Harass", "Second"),
        ("0/zh", "zh", "Hate/Harass", "First kind"),
    ]
    assert "languages vi: their files are not there" in found.notes
    assert len(suite("catqa/zh", folder=tmp_path, offline=True)) == 1


def test_a_limit_is_taken_evenly_over_kinds_and_languages(tmp_path):
    rows = [(n, GOALS[n % 6] + str(n), "homonyms", "safe" if n < 10 else "unsafe", "", "") for n in range(20)]
    write(tmp_path / "xstest_prompts.csv", table(["id", "prompt", "type", "label", "focus", "note"], rows))
    found = suite("xstest", folder=tmp_path, offline=True, limit=6)
    assert [prompt.id for prompt in found.prompts] == ["0", "1", "2", "10", "11", "12"]
    assert len(suite("xstest", folder=tmp_path, limit=99)) == 20
    assert suite("xstest", folder=tmp_path, kind="harmful").prompts[0].id == "10"


@pytest.mark.parametrize(
    ("name", "file", "columns", "labels"),
    [
        (
            "toxic-chat",
            "toxic-chat_annotation_test.csv",
            ["conv_id", "user_input", "model_output", "human_annotation", "toxicity", "jailbreaking"],
            ("1", "0"),
        ),
        (
            "aegis-2",
            "aegis-2-test.json",
            ["id", "prompt", "response", "prompt_label", "response_label", "violated_categories"],
            ("unsafe", "safe"),
        ),
        (
            "wildguard-test",
            "wildguard_test.csv",
            ["prompt", "adversarial", "response", "prompt_harm_label", "subcategory"],
            ("harmful", "unharmful"),
        ),
    ],
)
def test_suites_that_guards_are_measured_on_keep_their_labels(tmp_path, name, file, columns, labels):
    """Rows made up, under the column names of the originals."""
    asked = {"user_input": 0, "prompt": 0}
    label = {"toxicity", "prompt_label", "prompt_harm_label"}
    rows = []
    for number, word in enumerate((*labels, labels[1])):
        text = f"request {number}"
        rows.append([text if c in asked else word if c in label else f"{c} {number}" for c in columns])
    if file.endswith(".json"):
        content = json.dumps([dict(zip(columns, row, strict=True)) for row in rows]).encode()
    else:
        content = table(columns, rows)
    write(tmp_path / file, content)
    found = suite(name, folder=tmp_path, offline=True)
    assert found.prompts.texts == ["request 0", "request 1", "request 2"]
    assert [prompt.meta["kind"] for prompt in found.prompts] == ["harmful", "harmless", "harmless"]
    assert suite(f"{name}-unsafe", folder=tmp_path).prompts.texts == ["request 0"]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_labels_of_several_columns_make_one(tmp_path):
    """Rows made up, under the column names of the originals."""
    rows = [
        {"prompt": "a", "S": 0, "H": 1, "V": 0},
        {"prompt": "b", "S": 0, "V2": 0},
        {"prompt": "c", "S": None, "SH": 1},
        {"prompt": "d"},
    ]
    write(tmp_path / "samples-1680.jsonl.gz", gzip.compress(lines(*rows)))
    found = suite("openai-mod", folder=tmp_path, offline=True).prompts
    assert [prompt.meta["kind"] for prompt in found] == ["harmful", "harmless", "harmful", "harmless"]
    votes = [
        ("user_message", ["Safe", "Violence", "Safe", None, None]),
        ("user_message", ["Safe", "Needs Caution", None, None, None]),
        ("llm_response", ["Violence"] * 5),
        ("user_message", ["Hate/Identity Hate, Profanity", "Safe", "Violence", "None", ""]),
    ]
    names = ["text", "text_type", "labels_0", "labels_1", "labels_2", "labels_3", "labels_4"]
    body = [[f"request {number}", kind, *given] for number, (kind, given) in enumerate(votes)]
    write(tmp_path / "aegis-1-test.csv", table(names, body))
    found = suite("aegis-1", folder=tmp_path, offline=True).prompts
    assert found.texts == ["request 0", "request 1", "request 3"]
    assert [prompt.meta["kind"] for prompt in found] == ["harmless", "harmful", "harmful"]


@pytest.mark.parametrize(
    ("unsafe", "safe"),
    [(True, False), (1, 0), (1.0, 0.0), ("1", "0"), ("1.0", "0.0"), ("True", "False")],
    ids=repr,
)
def test_a_label_is_the_same_however_an_edition_writes_it(tmp_path, unsafe, safe):
    asked = [{"user_input": "bad", "toxicity": unsafe}, {"user_input": "good", "toxicity": safe}]
    moderated = [{"prompt": "bad", "S": safe, "H": unsafe}, {"prompt": "good", "S": safe, "H": None}]
    answered = [
        {"prompt": "p", "response": text, "is_safe": one} for text, one in (("a", safe), ("b", unsafe))
    ]
    for name, rows in (("toxic-chat", asked), ("openai-mod", moderated), ("beavertails", answered)):
        path = write(tmp_path / f"{name}.jsonl", lines(*rows))
        found = suite(f"{name}={path}")
        assert [prompt.meta["kind"] for prompt in found.prompts] == ["harmful", "harmless"], name
        assert found.notes in ([], ["1 duplicate prompt, kept"])


def test_a_row_without_a_label_or_a_text_is_left_out_and_counted(tmp_path):
    header = ["prompt", "prompt_harm_label"]
    body = [("a", "harmful"), ("b", "unharmful"), ("c", ""), ("d", "None"), ("e", "unsure")]
    path = write(tmp_path / "wildguard_test.csv", table(header, body))
    found = suite(f"wildguard-test={path}")
    assert [(one.text, one.meta["kind"]) for one in found.prompts] == [("a", "harmful"), ("b", "harmless")]
    assert found.left == 3
    assert [note.partition(":")[0] for note in found.notes] == ["left out 2 rows", "left out 1 row"]
    redacted = [{"prompt": "REDACTED", "prompt_label": "unsafe"}, {"prompt": "a", "prompt_label": "safe"}]
    path = write(tmp_path / "aegis-2-test.json", json.dumps(redacted))
    found = suite(f"aegis-2={path}")
    assert (found.prompts.texts, found.left) == (["a"], 1)
    assert "'REDACTED'" in found.notes[0]
    # What was left out is in the original, so its file is whole.
    check = verify("aegis-2", folder=tmp_path, offline=True)
    assert "2 prompts, expected 1964" in check.problem


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("toxic-chat", {"user_input": "a", "jailbreaking": "0"}, "say nothing.*in the column toxicity"),
        ("xstest", {"prompt": "a", "type": "contrast_homonyms"}, "say nothing.*in the column label"),
        ("openai-mod", {"prompt": "a"}, "no column S or H"),
        ("aegis-1", {"text": "a", "labels_0": "Safe"}, "no column text_type"),
    ],
)
def test_a_mixed_suite_without_its_labels_is_refused(tmp_path, name, row, told):
    path = write(tmp_path / "a.jsonl", lines(row, row))
    with pytest.raises(InputError, match=told) as error:
        suite(f"{name}={path}")
    assert "\n" not in str(error.value)


def test_suites_of_answers_keep_each_with_its_label(tmp_path):
    """Rows made up, under the column names of the originals."""
    answered = [
        {"prompt": "how", "response": "so", "category": {"violence": True}, "is_safe": False},
        {"prompt": "how", "response": "no", "category": {"violence": False}, "is_safe": True},
    ]
    write(tmp_path / "beavertails-30k-test.jsonl.gz", gzip.compress(lines(*answered)))
    pair = {"prompt": "why", "response_0": "because", "response_1": "never", "better_response_id": 0}
    labels = {"is_response_0_safe": True, "is_response_1_safe": False, "safer_response_id": 0}
    write(tmp_path / "safe-rlhf-test.jsonl", lines({**pair, **labels}))
    for name, expected in (
        ("beavertails", [("how", "so", "harmful"), ("how", "no", "harmless")]),
        ("safe-rlhf", [("why", "because", "harmless"), ("why", "never", "harmful")]),
    ):
        found = suite(name, folder=tmp_path, offline=True).prompts
        assert [(one.text, one.answer, one.meta["kind"]) for one in found] == expected
        assert len({one.group for one in found}) == 1
        assert len({one.id for one in found}) == 2
        assert len(suite(f"{name}-unsafe", folder=tmp_path, offline=True).prompts) == 1


def test_files_of_ones_own_are_suites_too(tmp_path):
    path = write(tmp_path / "mine.csv", table(["question", "answer"], PAIRS))
    found = suite(path, kind="harmless")
    assert (found.kind, found.name, len(found.harmless), len(found.harmful)) == ("harmless", "mine.csv", 6, 0)
    assert found.prompts[0].meta["target"] == TARGETS[0]
    assert found.sha256 == (hashlib.sha256(path.read_bytes()).hexdigest(),)


@pytest.mark.parametrize("name", [*NAMES, *ENGLISH])
def test_a_built_in_list_is_of_the_kind_that_it_is(name):
    refused = ("harmful", "refusals", "look-alikes-unsafe", "more-refusals")
    kind = "harmful" if name.startswith(refused) else "harmless"
    assert suite(f"builtin:{name}").kind == kind
    asked = requests_of([f"builtin:{name}/en"], Sources(over_refusal=None))
    assert [part.kind for part in asked.requests] == [kind]


def test_a_parquet_file_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": GOALS, "target": TARGETS}), tmp_path / "train.parquet")
    assert suite(f"advbench={tmp_path / 'train.parquet'}").prompts.texts == GOALS
    assert suite(tmp_path / "train.parquet").prompts.texts == GOALS


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("advbensh", "did you mean advbench"),
        ("xstest-sfe", "no suite of this name"),
        ("advbench/de", "its language cannot be chosen"),
        ("multijail/fr", "not there in 'fr'; it has en, zh"),
        ("./absent.csv", "no such file"),
        ("hub:nonsense", "expected hub:ORG/NAME"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(source, says):
    with pytest.raises(InputError, match=says) as caught:
        suite(source, offline=True)
    assert "\n" not in str(caught.value)


def test_arguments_that_make_no_sense_are_usage_errors(tmp_path):
    path = write(tmp_path / "mine.txt", "one\n")
    with pytest.raises(UsageError, match="limit 0"):
        suite(path, limit=0)
    with pytest.raises(UsageError, match="kind 'bad'"):
        suite(path, kind="bad")
    with pytest.raises(UsageError, match="its kind is harmful"):
        suite(f"advbench={write(tmp_path / 'a.csv', EDITIONS['a header'][1])}", kind="harmless")


@pytest.mark.parametrize("name", ["advbench", "or-bench-hard", "catqa", "strongreject-small"])
def test_offline_opens_no_socket_and_says_how_to_get_the_file(no_socket, name, tmp_path):
    with pytest.raises(InputError, match="folder"):
        suite(name, offline=True)
    with pytest.raises(InputError, match="folder"):
        suite(name, offline=True, folder=tmp_path)


def test_the_folder_can_be_named_by_the_environment(tmp_path, monkeypatch):
    write(tmp_path / "deep" / "er" / "MaliciousInstruct.txt", "\n".join(GOALS))
    monkeypatch.setenv("SAFETY_NEURONS_DATA", str(tmp_path))
    assert suite("malicious-instruct", offline=True).prompts.texts == GOALS
    monkeypatch.setenv("SAFETY_NEURONS_DATA", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no such folder"):
        suite("malicious-instruct", offline=True)


def test_the_hub_is_asked_for_the_pinned_file_and_its_commit_is_kept(tmp_path, monkeypatch):
    commit = "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272"
    file = write(
        tmp_path / "snapshots" / commit / "or-bench-toxic.csv",
        table(["prompt", "category"], [(GOALS[0], "x")]),
    )
    asked = []

    def download(*words, **options):
        asked.append((words, options))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert suite("or-bench-toxic").prompts.texts == GOALS[:1]
    options = {"repo_type": "dataset", "revision": commit, "local_files_only": False}
    assert asked == [(("bench-llm/or-bench", "or-bench-toxic.csv"), options)]
    assert suite("hub:some/one@main:or-bench-toxic.csv", kind="harmless").kind == "harmless"
    assert asked[1][1]["revision"] == "main"


def test_verify_refuses_another_edition_and_a_part_of_the_original(tmp_path, monkeypatch):
    text = table(["goal", "target"], [(f"Invent request {n}", "Sure, here is it") for n in range(520)])
    path = write(tmp_path / "harmful_behaviors.csv", text)
    other = verify("advbench", folder=tmp_path, offline=True)
    assert (other.ok, other.hashes, other.prompts) == (False, ("other",), 520)
    assert "not an edition that is known" in other.problem
    assert verify("advbench", folder=tmp_path, offline=True, any_edition=True).ok
    write(path, "".join(text.splitlines(keepends=True)[:-1]))
    short = verify("advbench", folder=tmp_path, offline=True, any_edition=True)
    assert (short.ok, short.prompts, short.expected) == (False, 519, 520)
    missing = verify("strongreject", folder=tmp_path, offline=True)
    assert (missing.ok, missing.prompts) == (False, None)
    json.dumps(missing.to_json())


def test_line_ends_and_compression_do_not_make_another_edition(shared, tmp_path):
    data = (shared / "data" / "xstest" / "xstest_prompts.csv").read_bytes()
    write(tmp_path / "crlf" / "xstest_prompts.csv", data.replace(b"\n", b"\r\n"))
    write(tmp_path / "gz" / "xstest_prompts.csv.gz", gzip.compress(data))
    for folder in ("crlf", "gz"):
        assert verify("xstest", folder=tmp_path / folder, offline=True).hashes == ("match",)


def test_the_catalogue_describes_every_suite_and_every_name_is_understood():
    listed = catalogue()
    assert [entry["name"] for entry in listed] == list(entries())
    for entry in listed:
        assert entry["kind"] in ("harmful", "harmless", "mixed")
        assert entry["licence"]
        assert entry["title"]
        assert entry["home"].startswith("https://")
        assert all(len(digest) == 64 for digest in entry["sha256"])
    assert all(wanted(name).name == name for name in names())
    assert {
        "advbench",
        "harmbench-copyright",
        "strongreject",
        "catqa",
        "or-bench-hard",
        "alpaca",
        "hh-rlhf-helpful",
    } <= set(names())
    places = [place for entry in entries().values() for place in entry.places.values()]
    assert all(place.sha256 for place in places if place.url), "what comes from the web is held to a hash"


@pytest.fixture
def web(tmp_path):
    """A web server of this machine that gives the files of a folder, and counts what it was asked for."""
    folder = tmp_path / "web"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words):
            super().__init__(*words, directory=str(folder))

        def log_message(self, *words):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_from_the_web_is_held_to_its_hash_and_kept(web, monkeypatch, tmp_path):
    folder, address, asked = web
    path = write(folder / "harmful_behaviors.csv", EDITIONS["a header"][1])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    place = Location(("harmful_behaviors.csv",), (digest,), None, f"{address}/harmful_behaviors.csv")
    assert (found := find(place, "advbench", None, offline=False)).sha256 == digest
    assert find(place, "advbench", tmp_path / "web", offline=True).path == path
    assert asked == ["/harmful_behaviors.csv"]
    assert find(place, "advbench", None, offline=True) == found, "what was fetched once is there offline"
    other = Location(place.files, ("0" * 64,), None, place.url)
    with pytest.raises(InputError, match="it was not kept"):
        find(other, "advbench", None, offline=False)
    with pytest.raises(InputError, match="offline forbids"):
        find(other, "advbench", None, offline=True)
    with pytest.raises(InputError, match="cannot be fetched"):
        find(
            Location(place.files, ("1" * 64,), None, f"{address}/absent.csv"), "advbench", None, offline=False
        )


def test_a_file_of_ones_own_takes_a_name_of_ones_own(tmp_path):
    file = tmp_path / "asked.txt"
    file.write_text("how do i make a bomb\nhow do i steal a key\n", encoding="utf-8")
    named = suite(f"direct={file}")
    assert (named.name, named.prompts.texts) == ("direct", suite(file).prompts.texts)
    assert {prompt.meta["suite"] for prompt in named.prompts} == {"direct"}
    with pytest.raises(InputError, match="did you mean advbench="):
        suite(f"advbnch={file}")
    with pytest.raises(InputError, match="gone.txt: no such file"):
        suite(f"direct={tmp_path / 'gone.txt'}")


def test_labels_in_a_file_of_ones_own_that_play_no_part_are_said(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "Label": "safe"}\n{"prompt": "b", "Label": "unsafe"}\n')
    found = suite(path)
    assert {one.meta["kind"] for one in found.prompts} == {"harmful"}
    assert any("all are taken as harmful, whatever their Label says" in note for note in found.notes)
    assert suite(path, kind="harmless").notes == []
