"""The project's own scoring of GSM8K and MMLU against lm-evaluation-harness on the same model.

Skipped where that is not installed.
"""

import json
import pathlib
import socket

import huggingface_hub.constants
import pytest
import tokenizers
import transformers

from safety_neurons.capability import measure_gsm8k, measure_harness, measure_mmlu, measures, task, tasks
from safety_neurons.errors import InputError, UsageError
from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from tiny import tiny_llama

needs_harness = pytest.mark.skipif(not tasks.available(), reason="lm-evaluation-harness is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def byte_tokenizer():
    """Every byte a token, and one for the beginning and the end."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<s>": 0, "</s>": 1, **{char: n + 2 for n, char in enumerate(alphabet)}}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def model():
    sizes = {
        "vocab_size": 258,
        "max_position_embeddings": 384,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return LanguageModel(tiny_llama(**sizes), byte_tokenizer())


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Sums whose answers hold what a random byte model is likely to write, so that some of them are right."""
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [
        {"question": f"What is {n} and {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
        for n in range(12)
    ]
    for name, part in (("train", rows[:4]), ("test", rows[4:])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part), encoding="utf-8"
        )
    return folder


def write_task(folder, name, include, data, **more):
    """A task file of the harness: its own task with other data."""
    import lm_eval

    root = pathlib.Path(lm_eval.__file__).parent / "tasks"
    config = {
        "include": str(root / include),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in data.items()}},
        "fewshot_config": {"sampler": "first_n"},
        **more,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return folder


@needs_harness
@pytest.mark.parametrize("treated", [False, True])
def test_multiple_choice_is_scored_as_the_harness_scores_it(model, shared, tmp_path, monkeypatch, treated):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    data = measures.read_mmlu(shared / "data" / "mmlu" / "mmlu_dev_val.zip")
    subject = "anatomy"
    rows = {
        split: [
            {"question": one.text, "choices": list(one.choices), "answer": one.answer}
            for one in part
            if one.subject == subject
        ]
        for split, part in (("dev", data.shown[subject]), ("test", data.asked))
    }
    for split, part in rows.items():
        (tmp_path / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part), encoding="utf-8"
        )
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    files = {split: tmp_path / f"{split}.jsonl" for split in rows}
    write_task(tmp_path, "own_anatomy", "mmlu/default/_default_template_yaml", files, description=head)
    monkeypatch.setattr(
        measures,
        "read_mmlu",
        lambda *_: data._replace(asked=[one for one in data.asked if one.subject == subject]),
    )
    neurons = NeuronSet({"layers.0.down": list(range(30)), "layers.1.up": list(range(20))}, model.table)
    context = {"treatment": lambda: deactivated(model, neurons)} if treated else {}
    for shots in (0, 2):
        theirs = measure_harness(
            model, ["own_anatomy"], tasks_folder=tmp_path, shots=shots, batch_size=4, **context
        )[0]
        ours = measure_mmlu(model, "anywhere", shots=shots, batch_size=4, **context)
        assert ours.outcomes == theirs.outcomes
        assert ours.rate.value == theirs.rate.value
        assert len(ours.outcomes) == 14
        assert 0 < sum(ours.outcomes) < 14


@needs_harness
def test_sums_are_scored_as_the_harness_scores_them(model, sums, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    write_task(
        tmp_path,
        "own_sums",
        "gsm8k/gsm8k.yaml",
        {"train": sums / "train.jsonl", "test": sums / "test.jsonl"},
        generation_kwargs={
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "max_gen_toks": 24,
        },
    )
    ours_answers = {}
    ours = measure_gsm8k(
        model, sums, shots=3, max_new_tokens=24, batch_size=4, answered=ours_answers.__setitem__
    )
    theirs = measure_harness(model, ["own_sums"], tasks_folder=tmp_path, shots=3, batch_size=4)[0]
    assert theirs.metric.startswith("exact_match")
    assert ours.rate.value == theirs.details["exact_match,strict-match"]
    assert ours.details["flexible"]["value"] == theirs.details["exact_match,flexible-extract"]
    assert len(ours_answers) == 8


@needs_harness
def test_given_answers_get_the_scores_the_harness_gives_them(sums, tmp_path, monkeypatch):
    """Answers of every kind, given to both: right and wrong, marked and unmarked."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    answers = [
        "#### 8",
        "It is $10.",
        "#### 12.",
        "14",
        "#### 15\n#### 16",
        "eighteen",
        "#### 20,",
        "#### 2,2",
    ]

    class Given(LM):
        def loglikelihood(self, requests):
            raise AssertionError

        loglikelihood_rolling = loglikelihood

        def generate_until(self, requests):
            assert all("Question: What is" in request.args[0] for request in requests)
            return list(answers)

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    write_task(
        tmp_path,
        "given_sums",
        "gsm8k/gsm8k.yaml",
        {"train": sums / "train.jsonl", "test": sums / "test.jsonl"},
    )
    manager = TaskManager(include_path=str(tmp_path))
    found = simple_evaluate(
        model=Given(), tasks=["given_sums"], num_fewshot=2, task_manager=manager, bootstrap_iters=0
    )["results"]
    ours = measures.score_sums("gsm8k", answers, measures.read_sums(sums))
    assert ours.rate.value == found["given_sums"]["exact_match,strict-match"]
    assert ours.details["flexible"]["value"] == found["given_sums"]["exact_match,flexible-extract"]
    assert 0 < ours.rate.value < ours.details["flexible"]["value"] < 1


@needs_harness
def test_numbers_are_read_as_the_harness_reads_them(tmp_path):
    from lm_eval.filters.extraction import RegexFilter

    texts = [
        "so 3.\n#### 1,234",
        "#### 5 and #### 6",
        "The answer is $18.",
        "it is -7",
        "####7",
        "#### -0.5 dollars",
        "none",
        "",
        "..",
        "1.5.2",
        "#### .",
        "#### ,",
        "$1,000.00",
        "12 - 5",
        "x=3, y=-4.",
        "#### $5",
        "½",
        "٣ is three",
        "a\n#### 9\n#### 10.",
        "-$3",
        "--7",
    ]
    hard = RegexFilter(regex_pattern="#### (\\-?[0-9\\.\\,]+)")
    soft = RegexFilter(regex_pattern="(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    assert [measures.strict(text) for text in texts] == [
        row[0] for row in hard.apply([[text] for text in texts], [{}] * len(texts))
    ]
    assert [measures.flexible(text) for text in texts] == [
        row[0] for row in soft.apply([[text] for text in texts], [{}] * len(texts))
    ]


@pytest.mark.skipif(tasks.available(), reason="lm-evaluation-harness is installed")
def test_without_the_harness_its_tasks_are_refused_with_what_to_install(model):
    for name in ("arc_challenge", "lm-eval:wikitext", "gsm8k"):
        with pytest.raises(UsageError, match="not installed"):
            task(name)
    with pytest.raises(UsageError, match="not installed"):
        measure_harness(model, ["arc_challenge"])


def test_a_task_is_named_with_what_it_is_measured_on():
    assert task("mmlu:folder").source == "folder"
    assert task("perplexity").source == "builtin:general-test"
    assert task("kl").compares
    with pytest.raises(UsageError, match="unknown"):
        task("gsm:file")


def test_offline_is_a_state_of_the_block_only():
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with tasks.without_hub():
        assert huggingface_hub.constants.HF_HUB_OFFLINE is True
    assert huggingface_hub.constants.HF_HUB_OFFLINE is before


@needs_harness
def test_a_task_whose_data_are_not_here_opens_no_connection_offline(model, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *address, **_: tried.append(address) or (_ for _ in ()).throw(OSError("no network")),
    )
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: tried.append(address))
    config = {
        "task": "absent",
        "dataset_path": "nobody/absent-data",
        "test_split": "test",
        "output_type": "multiple_choice",
    }
    config |= {"doc_to_text": "a", "doc_to_choice": ["a", "b"], "doc_to_target": 0}
    (tmp_path / "absent.yaml").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="cannot run absent"):
        measure_harness(model, ["absent"], tasks_folder=tmp_path, offline=True)
    assert tried == []
