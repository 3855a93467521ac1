import json
import re

import pytest

import report_runs
from page_text import HALF, Outline
from safety_neurons.display.registry import DISPLAYS
from safety_neurons.errors import InputError, RunError, UsageError
from safety_neurons.report import write_report
from safety_neurons.report.page import read_runs, sheet
from safety_neurons.results import Completion, Completions

ARMS = ("untreated", "random 0 of 5", "ceiling", "factor 2")


def test_the_page_is_one_file_that_loads_nothing(page, outline):
    text = page.read_text(encoding="utf-8")
    assert all(link.startswith("#") for link in outline.links)
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    assert outline.tags["script"] == 3
    assert "default-src &#39;none&#39;" in text
    assert "unsafe-" not in text


def test_the_first_screen_says_what_was_found_and_what_was_not(outline):
    assert (
        "Which neurons make organism:natural/dpo refuse harmful requests which organism:natural/sft answers"
        in outline.text
    )
    assert "neurons ranked by attribution-patching (5 %) is enough: it restores" in outline.text
    assert "ranked by contrast (10 %) the effect is not clearly above chance" in outline.text
    assert "not clearly above chance at this budget: weight-change, contrast, importance." in outline.text
    assert "a clear loss" in outline.text
    assert "share of the planted units found: importance-contrast 1.00" in outline.text


def test_every_figure_has_words_and_a_caption_and_every_table_headers(page, outline):
    text = page.read_text(encoding="utf-8")
    assert outline.tags["figure"] == outline.tags["figcaption"] == 16
    assert all(len(label) > 40 for label in re.findall(r'role="img" aria-label="([^"]*)"', text))
    assert (
        len(re.findall(r"<table", text))
        == len(re.findall(r"<caption", text))
        == len(re.findall(r"<thead", text))
    )
    assert {"main", "header", "nav", "h1", "h2", "footer"} <= set(outline.tags)
    assert outline.tags["h1"] == 1
    assert 'class="skip" href="#main"' in text


def test_figures_carry_no_colour_of_their_own(page):
    text = page.read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r'(?:fill|stroke)="([^"]*)"', drawings)) <= {"none", "transparent"}
    assert "#f0" not in drawings
    assert "style=" not in drawings


def test_numbers_in_the_page_are_those_of_the_runs(page, outline):
    runs = page.parents[1]
    result = json.loads((runs / "verify-contrast" / "run.json").read_text())["result"]
    for point in result["sizes"]:
        effect = point["causal_effect"]
        shown = f"{effect['value']:.2f} [{effect['low']:.2f}, {effect['high']:.2f}]".replace("-", "\u2212")
        assert f"{point['n_neurons']:,} patched" in outline.text
        assert shown in outline.text


def test_hostile_text_changes_nothing(hostile, outline):
    text = hostile.read_text(encoding="utf-8")
    seen = Outline(text)
    assert set(seen.tags) <= set(outline.tags)
    assert seen.tags["script"] == outline.tags["script"]
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in seen.links)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\ufeff\x00\x07\ud800-\udfff]", text)
    assert "⟨U+202E⟩" in seen.text
    assert "⟨U+D800⟩" in seen.text
    assert "{{ 7 * 7 }}" in seen.text
    assert len(text) < 2_000_000


def test_a_record_with_half_a_pair_is_refused_in_one_line(tmp_path):
    run = report_runs.patch_run(tmp_path / "verify", "contrast", (0.1, 0.5), n=10)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"notes": [HALF]}))
    with pytest.raises(InputError, match=r"run\.json' is not JSON \(half a surrogate pair\)") as refused:
        write_report([run], tmp_path / "out.html")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out.html").exists()


def test_the_data_block_holds_no_character_that_ends_it(hostile):
    text = hostile.read_text(encoding="utf-8")
    block = re.search(
        r'<script type="application/json" id="completions-data">(.*?)</script>', text, re.DOTALL
    )[1]
    assert not re.search("[<>&]", block)
    record = json.loads(block)
    assert any("</script>" in each for each in record["texts"])
    assert max(map(len, record["texts"])) < 4100


def test_five_thousand_completions_stay_below_five_megabytes(tmp_path):
    run = report_runs.patch_run(tmp_path / "verify", "contrast", (0.1, 0.5), n=10)
    words = "word " * 400
    arms = (
        "untreated/harmful",
        "treated 82/harmful",
        "aligned/harmful",
        "ceiling/harmful",
        "random 0 of 82/harmful",
    )
    made = [
        Completion(f"p{n}", f"{n} {words}", f"{n} {arm} {words}", (), "stop", arm)
        for n in range(1000)
        for arm in arms
    ]
    Completions(made).save(run / "completions.jsonl")
    page = write_report([run], tmp_path)
    assert page == tmp_path / "report.html"
    assert page.stat().st_size < 5_000_000
    assert "All 5,000 completions, at most 500 characters" in Outline(page.read_text(encoding="utf-8")).text


def test_a_run_of_both_sides_and_every_verb_with_completions_have_a_page(tmp_path):
    both = report_runs.both_run(tmp_path / "both", "contrast", n=10)
    seen = Outline(write_report([both], tmp_path / "both.html").read_text(encoding="utf-8"))
    for said in ("Sufficient and necessary", "Are they sufficient", "Are they necessary"):
        assert said in seen.text
    names = [verb for verb, shown in DISPLAYS.items() if shown.completions]
    assert {"verify-both", "verify-scale", "compare", "tune", "evaluate", "guard-evaluate"} <= set(names)
    answers = Completions([Completion("p", "ask", "say", (), "stop", f"{arm}/harmful") for arm in ARMS])
    for verb in names:
        folder = report_runs.run_folder(tmp_path / verb, verb, report_runs.PAIR, {})
        answers.save(folder / "completions.jsonl")
        made = sheet(*read_runs([folder]), "answers")
        assert [made.arms[place] for place in made.shown] == ["untreated", "factor 2"]


def test_too_few_random_sets_are_named_where_an_effect_is_not_shown(tmp_path):
    run = report_runs.patch_run(tmp_path / "verify", "contrast", (0.1, 0.9), n=40, n_random=2)
    text = Outline(write_report([run], tmp_path).read_text(encoding="utf-8")).text
    assert "is not shown to restore more than chance" in text
    assert "2 random sets, at least 3 are needed to know how much they differ; ceiling" in text


def test_a_page_can_be_made_of_any_single_run(story, tmp_path):
    for run in story:
        text = Outline(write_report([run], tmp_path / f"{run.name}.html").read_text(encoding="utf-8")).text
        assert "What was found" in text, run


def test_a_tuned_set_is_said_to_help_or_not(tmp_path):
    shown = {}
    for refused in (0.97, 0.1):
        run = report_runs.tune_run(tmp_path / f"tuned-{refused}", "importance", refused)
        shown[refused] = Outline(
            write_report([run], tmp_path / f"{refused}.html").read_text(encoding="utf-8")
        ).text
    for text in shown.values():
        assert "Does tuning them make the model safer?" in text
        assert "bit for bit as it was" in text
        assert "Checks while training" in text
    assert "takes refusals of harmful requests from 0.10" in shown[0.97]
    assert "paired change +0.87" in shown[0.97]
    assert "Does tuning them make it safer? shown" in shown[0.97]
    assert "Does tuning them make it safer? not shown" in shown[0.1]


def test_an_undefined_effect_is_said_to_be_undefined(tmp_path):
    run = report_runs.patch_run(tmp_path / "verify", "contrast", (0.02, 0.02), n=12)
    record = json.loads((run / "run.json").read_text())
    nothing = {
        "value": None,
        "low": None,
        "high": None,
        "measure": "refused",
        "why": "base and aligned do not differ",
        "n": 12,
    }
    for point in record["result"]["sizes"]:
        point |= {"causal_effect": nothing, "random_effects": [nothing, nothing]}
    record["result"] |= {"causal_effect": nothing, "ceiling_effect": nothing}
    (run / "run.json").write_text(json.dumps(record))
    text = Outline(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "is undefined: base and aligned do not differ" in text


def test_files_that_are_gone_leave_a_page_without_their_figures(tmp_path):
    runs = [
        report_runs.find_run(tmp_path / "contrast", "contrast"),
        report_runs.patch_run(tmp_path / "v", "contrast", (0.1, 0.9), n=12),
    ]
    for gone in ("contrast/scores.safetensors", "contrast/neurons.safetensors", "v/completions.jsonl"):
        (tmp_path / gone).unlink()
    text = Outline(write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "no longer in the folder" in text
    assert "Completions side by side" not in text


def test_a_verb_of_a_later_version_is_listed_with_its_numbers(tmp_path):
    run = report_runs.run_folder(tmp_path / "guard", "guard", {"model": "m"}, {"trained_parameters": 12345})
    assert "12345" in Outline(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_bad_runs_are_named_in_one_line(tmp_path):
    good = report_runs.doctor_run(tmp_path / "doctor")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no run was given"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(InputError, match="'.*empty' has no run.json"):
        write_report([good, tmp_path / "empty"], tmp_path / "r.html")
    with pytest.raises(InputError, match="absent' does not exist"):
        write_report([tmp_path / "absent"], tmp_path / "r.html")
    record = json.loads((good / "run.json").read_text())
    broken = {
        "not finished": record | {"status": "running"},
        "not a run record": [1],
        "not a run record of this version.*safety-neurons/2": record | {"schema": "safety-neurons/2"},
        "not a run record of this version": record | {"result": []},
        "has not the result of 'doctor'": record | {"result": {"model": 1}},
    }
    for says, content in broken.items():
        (good / "run.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=says) as raised:
            write_report([good], tmp_path / "r.html")
        assert "\n" not in str(raised.value)
    (good / "run.json").write_text('{"verb": ')
    with pytest.raises(InputError, match="is not JSON"):
        write_report([good], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_page_that_cannot_be_written_is_an_error_and_leaves_the_old_one(tmp_path):
    run = report_runs.doctor_run(tmp_path / "doctor")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        write_report([run], tmp_path / "file" / "r.html")
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_neurons_behind_a_large_map_fit_and_small_cells_are_whole(tmp_path):
    run = report_runs.find_run(tmp_path / "contrast", "contrast", ("gate", "up", "down"), 0.05, n_layers=40)
    text = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="neurons-data">(.*?)</script>', text, re.DOTALL)[1]
    (found,) = json.loads(block)["runs"]
    kept = {place: sum(neuron[3][1] for neuron in cell["neurons"]) for place, cell in found["cells"].items()}
    assert sum(map(len, (cell["neurons"] for cell in found["cells"].values()))) <= 6000
    assert sum(cell["kept"] for cell in found["cells"].values()) > 6000
    assert all(kept[place] == cell["kept"] for place, cell in found["cells"].items() if cell["kept"] < 50)
    assert max(kept.values()) < 201
    assert len(block) < 600_000
