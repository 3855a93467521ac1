import pathlib
import subprocess
import sys

import pytest

from safety_neurons.errors import UsageError
from safety_neurons.judges import agreement, judge
from safety_neurons.judges.guards import verdict_of
from safety_neurons.model import Reply
from safety_neurons.results import Completion


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
    assert agreement(judge(f"openai:{address}#tiny").judge(answers), judge("refusal").judge(answers)).kappa.value == 1


@pytest.mark.parametrize("name", ["openai:#m", "openai:http://x", "openai:ftp://x/v1#m", "openai:http://u:p@x/v1#m"])
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
