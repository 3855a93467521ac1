"""evaluate from the command line: its object, its gate, resumption, an endpoint, and what it refuses."""

import json
import pathlib
import subprocess
import sys

import pytest
from running import command, done, record, refused

from safety_neurons.model import load
from safety_neurons.neurons import NeuronSet

SERVER = """
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        harmful = "bomb" in text or "kill" in text
        answer = "I'm sorry, but I cannot help with that." if harmful else "Sure, here is how."
        body = json.dumps({"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def neurons(tiny_pair, tmp_path_factory):
    table = load(tiny_pair.plain).table
    path = tmp_path_factory.mktemp("set") / "neurons.safetensors"
    NeuronSet({"layers.0.down": list(range(24)), "layers.1.down": list(range(8))}, table).save(path)
    return path


def words(pair, out, *more):
    asked = [
        "--suite",
        pair.harmful,
        "--over-refusal",
        pair.harmless,
        "--max-new-tokens",
        "4",
        "--limit",
        "4",
    ]
    return ["evaluate", *asked, "--out", out, *more]


def gate_file(folder, text):
    path = pathlib.Path(folder) / "gate.toml"
    path.write_text(text)
    return path


def test_the_object_has_both_arms_and_the_run_goes_into_a_report(tiny_pair, neurons, tmp_path):
    more = [
        "--model",
        tiny_pair.plain,
        "--deactivate",
        neurons,
        "--capability",
        "perplexity,kl",
        "--capability-limit",
        "3",
    ]
    found = done(*words(tiny_pair, tmp_path / "run", *more))
    assert [entry["kind"] for entry in found["treated"]["suites"]] == ["harmful", "harmless"]
    assert {entry["n"] for entry in found["untreated"]["suites"]} == {4}
    assert len(found["treated"]["suites"][0]["judges"]) == 3
    assert found["baseline"] is None
    assert set(found["changes"][0]) >= {"suite", "judge", "measure", "difference", "mcnemar"}
    assert found["agreement"][0]["kind"] == "harmful"
    files = {"run.json", "completions.jsonl", "judgements.sqlite", "capability.json"}
    assert files <= {path.name for path in (tmp_path / "run").iterdir()}
    assert done(*words(tiny_pair, tmp_path / "run", *more)) == found
    page = pathlib.Path(
        done("report", tmp_path / "run", "--out", tmp_path / "report.html")["report"]
    ).read_text(encoding="utf-8")
    assert "How safe, how helpful, how capable?" in page
    assert "32 neurons deactivated" in page
    assert "Over-refusal" in page


def test_a_gate_that_is_not_met_exits_with_three_and_says_every_miss(tiny_pair, tmp_path):
    model = ["--model", tiny_pair.plain]
    strict, lax = gate_file(tmp_path, "harm = 0.0\nover_refusal = 0.0\n"), tmp_path / "lax.toml"
    lax.write_text("harm = 1.0\nover_refusal = 1.0\nunscored = 1.0\n")
    passed = done(*words(tiny_pair, tmp_path / "run", *model, "--gate", lax))
    assert passed["gate"] == {"passed": True, "missed": []}
    said = command(*words(tiny_pair, tmp_path / "run", *model, "--gate", strict))
    assert said.code == 3
    missed = [line for line in said.err.splitlines() if line.startswith("gate not met: ")]
    as_json = command(*words(tiny_pair, tmp_path / "run", *model, "--gate", strict, "--json"))
    assert as_json.code == 3
    assert as_json.err == ""
    assert as_json.json["exit_code"] == 3
    assert [f"gate not met: {line}" for line in as_json.json["gate"]["missed"]] == missed
    assert len(missed) >= 1


def test_a_run_is_started_anew_in_another_way_with_overwrite(tiny_pair, tmp_path):
    asked = words(tiny_pair, tmp_path / "run", "--model", tiny_pair.plain)
    done(*asked)
    longer = [*asked, "--max-new-tokens", "7"]
    assert command(*longer).code != 0
    assert done(*longer, "--overwrite")["baseline"] is None


def test_a_donor_s_activations_are_patched_and_an_earlier_run_is_the_baseline(tiny_pair, neurons, tmp_path):
    before = done(
        *words(tiny_pair, tmp_path / "before", "--model", tiny_pair.base, "--capability", "perplexity")
    )
    more = [
        "--model",
        tiny_pair.base,
        "--donor",
        tiny_pair.aligned,
        "--patch",
        neurons,
        "--capability",
        "perplexity",
    ]
    found = done(*words(tiny_pair, tmp_path / "after", *more, "--baseline", tmp_path / "before"))
    assert found["untreated"] is None
    assert found["baseline"]["suites"] == before["untreated"]["suites"]
    assert found["treatment"].startswith("32 neurons patched from")
    assert found["capability_changes"][0]["drop"] is not None


def test_a_run_is_repeated_from_its_record(tiny_pair, tmp_path):
    first = done(*words(tiny_pair, tmp_path / "one", "--model", tiny_pair.plain))
    again = done("run", tmp_path / "one" / "run.json", "--out", tmp_path / "two")
    assert again["untreated"] == first["untreated"]
    assert record(tmp_path / "two")["verb"] == "evaluate"


def test_an_endpoint_answers_in_the_place_of_a_model(tiny_pair, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    sums = tmp_path / "test.jsonl"
    sums.write_text(
        "".join(json.dumps({"question": f"q{n}", "answer": f"#### {n}"}) + "\n" for n in range(7))
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{process.stdout.readline().strip()}/v1#served"
            more = ["--endpoint", url, "--offline", "--judge", "refusal", "--capability", f"gsm8k:{sums}"]
            found = done(*words(tiny_pair, tmp_path / "run", *more))
        finally:
            process.kill()
    harmful, harmless = found["untreated"]["suites"]
    (judge,) = harmful["judges"]
    bombs = sum(
        "bomb" in line or "kill" in line
        for line in pathlib.Path(tiny_pair.harmful).read_text().splitlines()[:4]
    )
    assert harmful["judges"][judge]["refused"]["value"] == pytest.approx(bombs / 4)
    assert harmless["judges"][judge]["over_refusal"]["value"] == 0
    assert found["untreated"]["capability"][0]["n"] == 2


@pytest.mark.parametrize(
    ("more", "words_said", "code"),
    [
        ([], "neither of --model and --endpoint", 2),
        (["--model", "m", "--endpoint", "http://localhost:1/v1#m"], "both of --model and --endpoint", 2),
        (["--endpoint", "http://localhost:1/v1#m", "--deactivate", "n"], "--model", 2),
        (["--endpoint", "http://example.org/v1#m", "--offline"], "offline", 2),
        (["--model", "m", "--patch", "n"], "belong together", 2),
        (["--model", "m", "--deactivate", "n", "--patch", "n", "--donor", "d"], "one treatment", 2),
        (["--model", "m", "--samples", "3"], "temperature", 2),
        (["--model", "m", "--gate", "none.toml"], "cannot read", 1),
        (["--model", "m", "--suite", ","], "names nothing", 2),
    ],
)
def test_what_contradicts_itself_is_refused_before_a_model_is_loaded(tmp_path, more, words_said, code):
    assert words_said in refused("evaluate", *more, "--out", tmp_path / "run", code=code)


def test_an_unknown_task_or_judge_is_refused(tiny_pair, tmp_path):
    model = ["--model", tiny_pair.plain]
    assert "unknown" in refused(*words(tiny_pair, tmp_path / "a", *model, "--capability", "gsm:file"), code=2)
    assert "expected" in refused(*words(tiny_pair, tmp_path / "b", *model, "--judge", "nobody"), code=2)
