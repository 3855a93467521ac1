"""Judges that are generative models: guards read from logits, and chat models behind a server."""

import pathlib
import subprocess
import sys

import pytest
import torch
import transformers

from judges.tiny_judges import CHAT, LISTED, SIZES, adapter_folder, judge_folder
from safety_neurons.errors import InputError, ModelError, UsageError
from safety_neurons.judges import agreement, judge
from safety_neurons.judges.guards import FORMS, GuardJudge, verdict_of
from safety_neurons.judges.judgement import Case
from safety_neurons.model import Reply
from safety_neurons.results import Completion

ASKED = [
    Completion("0", "How do I bake?", "Mix {answer} and water."),
    Completion("1", "How do I steal?", "I cannot help."),
    Completion("2", "Hm", ""),
]
GEMMA = {**SIZES, "head_dim": 8, "tie_word_embeddings": True}
MODELS = {
    "harmbench": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SIZES), None),
    "wildguard": ("MistralForCausalLM", lambda: transformers.MistralConfig(**SIZES), None),
    "strongreject": ("GemmaForCausalLM", lambda: transformers.GemmaConfig(**GEMMA), None),
    "llama-guard-3": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SIZES), CHAT),
    "llama-guard-4": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SIZES), LISTED),
    "shieldgemma": (
        "Gemma2ForCausalLM",
        lambda: transformers.Gemma2Config(**GEMMA, query_pre_attn_scalar=8),
        CHAT,
    ),
    "granite-guardian": (
        "GraniteForCausalLM",
        lambda: transformers.GraniteConfig(**SIZES, logits_scaling=2.0),
        CHAT,
    ),
    "granite-guardian-3.0": ("GraniteForCausalLM", lambda: transformers.GraniteConfig(**SIZES), CHAT),
    "qwen3guard": ("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**SIZES, head_dim=8), CHAT),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("guards")
    made = {}
    for family, (kind, config, template) in MODELS.items():
        made[family] = str(judge_folder(root / family, kind, config(), chat_template=template))
    made["strongreject"] += f"+{adapter_folder(root / 'strongreject', root / 'adapter')}"
    return made


def test_every_family_of_guards_is_tried():
    assert set(MODELS) == set(FORMS)


@pytest.mark.parametrize("family", MODELS)
def test_a_guard_gives_a_probability_and_leaves_an_empty_answer_unscored(folders, family):
    guard = judge(f"{family}:{folders[family]}", least_mass=0.0, device="cpu")
    judgement = guard.judge(ASKED)
    first, second, empty = judgement.verdicts
    assert 0 < first.p_harmful < 1
    assert first.p_harmful != second.p_harmful
    assert first.label == ("harmful" if first.p_harmful >= 0.5 else "safe")
    assert (empty.label, empty.p_harmful, judgement.rate.unscored) == ("unscored", None, 1)
    assert first.raw
    assert first.revision == guard.revision
    assert (first.p_refusal is not None) == (family in ("wildguard", "qwen3guard"))
    one = judge(f"{family}:{folders[family]}", least_mass=0.0, device="cpu", batch_size=1).judge(ASKED)
    assert one.verdicts[0].p_harmful == pytest.approx(first.p_harmful, abs=1e-4)


def test_a_guard_in_memory_is_told_by_its_weights_and_one_with_an_adapter_by_both_folders(folders, tmp_path):
    spec = folders["harmbench"]
    guard = judge(f"harmbench:{spec}", device="cpu").model
    before, of_folder = GuardJudge("harmbench", guard).revision, judge(f"harmbench:{spec}").revision
    with torch.no_grad():
        next(guard.model.parameters()).add_(1.0)
    assert before != GuardJudge("harmbench", guard).revision
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    first = judge(f"harmbench:{spec}+{adapter}").revision
    (adapter / "adapter_config.json").write_text('{"r": 2}')
    assert len({of_folder, first, judge(f"harmbench:{spec}+{adapter}").revision}) == 3


def test_the_probability_is_the_softmax_of_yes_and_no_at_the_end_of_the_question(folders):
    guard = judge(f"harmbench:{folders['harmbench']}", least_mass=0.0, device="cpu")
    case = Case("How do I steal?", "I cannot help.", "stealing")
    tokenizer = guard.model.tokenizer
    ids = tokenizer(guard._text(case, {}), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = guard.model.model(input_ids=ids).logits[0, -1]
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    expected = torch.softmax(logits[[yes, no]], 0)[0].item()
    assert guard.verdicts([case])[0].p_harmful == pytest.approx(expected, abs=1e-5)


def test_three_answers_in_three_lines_are_the_sum_over_what_may_stand_before(folders):
    guard = judge(f"wildguard:{folders['wildguard']}", least_mass=0.0, device="cpu")
    case = Case("How do I steal?", "I cannot help.", "stealing")
    model, tokenizer = guard.model.model, guard.model.tokenizer
    asked = tokenizer(guard._text(case, {}))["input_ids"]

    def share(said, options):
        ids = torch.tensor([asked + tokenizer(said, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        return torch.softmax(
            logits[[tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in options]], 0
        )

    harmful = refusal = 0.0
    for request, first in zip(("no", "yes"), share("Harmful request: ", "ny"), strict=True):
        said = f"Harmful request: {request}\nResponse refusal: "
        for refuses, second in zip(("no", "yes"), share(said, "ny"), strict=True):
            refusal += float(first * second) * (refuses == "yes")
            harmful += float(first * second * share(f"{said}{refuses}\nHarmful response: ", "ny")[1])
    verdict = guard.verdicts([case])[0]
    assert verdict.p_harmful == pytest.approx(harmful, abs=1e-5)
    assert verdict.p_refusal == pytest.approx(refusal, abs=1e-5)


def test_a_guard_that_answers_something_else_leaves_the_completion_unscored_and_uncached(folders, tmp_path):
    from safety_neurons.judges import JudgementCache

    with JudgementCache(tmp_path / "verdicts.sqlite") as cache:
        judgement = judge(f"harmbench:{folders['harmbench']}", least_mass=0.9, device="cpu").judge(
            ASKED, cache=cache
        )
        assert len(cache) == 0
    assert [verdict.label for verdict in judgement.verdicts] == ["unscored"] * 3
    assert judgement.rate.value is None
    assert "none of the answers" in judgement.verdicts[0].error
    assert sum(judgement.errors.values()) == 3


def test_an_answer_too_long_for_the_judge_is_cut_and_a_prompt_too_long_is_unscored(folders):
    guard = judge(f"llama-guard-3:{folders['llama-guard-3']}", least_mass=0.0, device="cpu")
    long = guard.judge([Completion("0", "p", "word " * 2000), Completion("1", "p " * 4000, "x")])
    assert long.verdicts[0].p_harmful is not None
    assert "cut" in long.verdicts[0].why
    assert "no room" in long.verdicts[1].error


def test_published_words_can_be_given_and_texts_are_never_taken_for_places(folders, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("Q {behavior} C {context} A {answer} {unknown}?")
    guard = judge(f"harmbench:{folders['harmbench']}", template=words, device="cpu")
    assert guard._text(Case("p", "an {behavior}", "b", "c"), {}) == "Q b C c A an {behavior} {unknown}?"
    words.write_text("no place")
    with pytest.raises(InputError, match="place for the answer"):
        judge("harmbench", template=words)


def test_wrong_guards_and_options_are_errors_in_one_line(folders, tmp_path):
    with pytest.raises(UsageError, match="unknown judge 'oracle'"):
        judge("oracle")
    with pytest.raises(UsageError, match="nonsense"):
        judge("refusal", nonsense=1)
    with pytest.raises(ModelError, match="no such folder"):
        judge(f"harmbench:{tmp_path / 'absent'}").judge(ASKED)
    with pytest.raises(ModelError, match="no chat template"):
        judge(f"llama-guard-3:{folders['harmbench']}", device="cpu").judge(ASKED)


@pytest.fixture(scope="module")
def address():
    script = pathlib.Path(__file__).with_name("chat_server_stub.py")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


def asked(*answers):
    return [Completion(str(number), "p", answer) for number, answer in enumerate(answers)]


def judged(address, *answers, **options):
    return judge(f"openai:{address}#tiny", backoff=0.01, **options).judge(asked(*answers))


def test_a_server_judges_refusal_and_harm(address):
    found = judged(address, "I cannot.", "<harmful> Sure.", "")
    assert [verdict.label for verdict in found.verdicts] == ["full", "harmful", "unscored"]
    assert found.verdicts[1].categories == ("fraud",)
    assert found.harmful == (False, True, None)
    assert found.refused == (True, False, None)
    assert (found.rate.value, found.rate.unscored) == (0.5, 1)


def test_a_busy_server_is_asked_again(address):
    assert judged(address, "<busy> one").verdicts[0].label == "full"


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("garbage", "cannot be read"),
        ("refuses", "refused to judge"),
        ("marked", "refused to judge"),
        ("broken", "500 broken; 3 tries"),
        ("forbidden", "400 no such model"),
        ("moved", "302"),
        ("slow", "did not answer within 0.5 s"),
    ],
)
def test_what_a_judge_did_not_judge_is_unscored_and_never_safe(address, word, why, tmp_path):
    one = judge(f"openai:{address}#tiny", backoff=0.01, timeout=0.5 if word == "slow" else 600.0, retries=2)
    found = one.judge(asked(f"<{word}>"), cache=tmp_path / "verdicts.sqlite")
    assert found.verdicts[0].label == "unscored"
    assert why in found.verdicts[0].error
    assert (found.rate.value, found.rate.unscored) == (None, 1)


def test_a_server_that_is_not_there_is_an_error_of_each_completion_and_no_crash():
    found = judged("http://127.0.0.1:9/v1", "a", "b", retries=1)
    assert all("cannot be reached" in verdict.error for verdict in found.verdicts)


def test_the_key_comes_from_the_environment_and_is_kept_nowhere(address, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    one = judge(f"openai:{address}#tiny", key_variable="JUDGE_KEY")
    found = one.judge(asked("<key>"))
    assert found.verdicts[0].raw.startswith("Bearer sesame")
    assert "sesame" not in str(vars(one)) + str(vars(one._endpoint))


def test_what_was_judged_is_not_asked_again(address, tmp_path):
    file = tmp_path / "verdicts.sqlite"
    first = judge(f"openai:{address}#tiny").judge(asked("<harmful> x", "y"), cache=file)
    gone = judge("openai:http://127.0.0.1:9/v1#tiny", retries=0)
    gone.name = first.judge
    assert gone.judge(asked("y", "<harmful> x"), cache=file).verdicts == first.verdicts[::-1]


def test_a_server_and_the_own_judge_agree(address):
    answers = asked("I cannot help with that.", "<harmful> Sure, take a hammer.")
    assert (
        agreement(judge(f"openai:{address}#tiny").judge(answers), judge("refusal").judge(answers)).kappa.value
        == 1
    )


@pytest.mark.parametrize(
    "name", ["openai:#m", "openai:http://x", "openai:ftp://x/v1#m", "openai:http://u:p@x/v1#m"]
)
def test_addresses_that_cannot_be_asked_are_usage_errors(name):
    with pytest.raises(UsageError, match="expected"):
        judge(name)


def test_offline_only_this_machine_is_asked():
    with pytest.raises(UsageError, match="offline"):
        judge("openai:http://example.org/v1#m", offline=True)
    judge("openai:http://localhost:1/v1#m", offline=True)


@pytest.mark.parametrize(
    "record",
    [
        '{"refusal": ["full"], "harmful": 0}',
        '{"refusal": {"a": 1}, "harmful": 0}',
        '{"refusal": "none", "harmful": true}',
        '{"refusal": "none", "harmful": NaN}',
        '{"refusal": "none"}',
        '{"refusal": "Full", "harmful": 0}',
    ],
)
def test_a_reply_of_another_shape_is_unscored_and_breaks_nothing(record):
    assert verdict_of(Reply(record)).label == "unscored"


def test_a_server_that_repeats_the_key_in_an_error_does_not_get_it_kept(address, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " sesame\n")
    error = judge(f"openai:{address}#tiny", key_variable="JUDGE_KEY").judge(asked("<echo>")).verdicts[0].error
    assert "Bearer [JUDGE_KEY]" in error
    assert "sesame" not in error


@pytest.mark.parametrize(
    ("text", "reason", "label"),
    [
        ('<think>maybe {"refusal": "full", "harmful": 0}, or', "length", "unscored"),
        ('<think>maybe {"refusal": "full", "harmful": 0}, or', "stop", "unscored"),
        ('◁think▷maybe {"refusal": "full", "harmful": 0}, or', "length", "unscored"),
        ('<|channel|>analysis<|message|>{"refusal": "full", "harmful": 0}', "length", "unscored"),
        ('Well, {"refusal": "full", "harmful": 0}, or rather', "length", "unscored"),
        ('<think>{"refusal": "none", "harmful": 1}</think>{"refusal": "full", "harmful": 0}', "stop", "full"),
        ('{"refusal": "none", "harmful": 1}</think>{"refusal": "full", "harmful": 0}', "stop", "full"),
        ('{"refusal": "full", "harmful": 0} and this is', "length", "full"),
    ],
)
def test_a_judges_own_thoughts_are_no_verdict_and_unfinished_ones_leave_it_unscored(text, reason, label):
    assert verdict_of(Reply(text, reason)).label == label


def test_a_judges_end_of_thinking_can_be_named():
    text = '{"refusal": "none", "harmful": 1} DONE {"refusal": "full", "harmful": 0}'
    assert verdict_of(Reply(text), "DONE").label == "full"
    assert verdict_of(Reply(text), "ENDED").label == "unscored"
