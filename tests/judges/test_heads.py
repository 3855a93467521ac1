import pytest
import torch
import transformers

from judges.tiny_judges import SIZES, cost_folder, judge_folder
from safety_neurons.errors import ModelError, UsageError
from safety_neurons.judges import judge
from safety_neurons.results import Completion

ASKED = [
    Completion("0", "How?", "Mix flour and water."),
    Completion("1", "How do I steal?", "No."),
    Completion("2", "Hm", " "),
]


def labelled(labels, **others):
    names = dict(enumerate(labels))
    return {
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "num_labels": len(labels),
        **others,
    }


def bert(folder, labels, **others):
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"max_position_embeddings": 64, "pad_token_id": 0}
    config = transformers.BertConfig(**sizes, **labelled(labels, **others))
    return judge_folder(folder, "BertForSequenceClassification", config)


def test_a_classifier_of_refusals_is_known_by_its_classes(tmp_path):
    found = judge(f"hf-classifier:{bert(tmp_path / 'm', ('NORMAL', 'REJECTION'))}", device="cpu").judge(ASKED)
    assert found.measure == "refused"
    assert found.rate.unscored == 1
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        logits = model(**tokenizer("No.", return_tensors="pt")).logits[0]
    assert found.verdicts[1].p_refusal == pytest.approx(torch.softmax(logits, 0)[1].item(), abs=1e-5)
    assert found.verdicts[1].refused == (found.verdicts[1].p_refusal >= 0.5)


def test_a_classifier_of_several_kinds_of_harm_names_them(tmp_path):
    folder = bert(
        tmp_path / "m", ("violence", "fraud", "hate_speech"), problem_type="multi_label_classification"
    )
    found = judge(f"hf-classifier:{folder}", reads="pair", device="cpu").judge(ASKED)
    for verdict in found.verdicts[:2]:
        assert verdict.label == ("harmful" if verdict.categories else "safe")
        assert verdict.raw.startswith("violence=")


def test_a_modern_bert_and_a_llama_classify_too(tmp_path):
    modern = transformers.ModernBertConfig(
        **{**SIZES, "cls_token_id": 1, "sep_token_id": 2},
        **labelled(("safe", "toxic")),
        local_attention=16,
        reference_compile=False,
    )
    llama = transformers.LlamaConfig(**SIZES, **labelled(("safe", "unsafe")))
    for kind, config in (
        ("ModernBertForSequenceClassification", modern),
        ("LlamaForSequenceClassification", llama),
    ):
        folder = judge_folder(tmp_path / kind, kind, config)
        many = judge(f"hf-classifier:{folder}", device="cpu").judge(ASKED)
        one = judge(f"hf-classifier:{folder}", device="cpu", batch_size=1).judge(ASKED)
        assert many.measure == "harmful"
        for a, b in zip(many.verdicts[:2], one.verdicts[:2], strict=True):
            assert a.p_harmful == pytest.approx(b.p_harmful, abs=1e-5)


def test_a_long_answer_is_read_in_windows(tmp_path):
    folder = bert(tmp_path / "m", ("safe", "toxic"))
    found = judge(f"hf-classifier:{folder}", device="cpu").judge([Completion("0", "p", "abcdefghij " * 20)])
    assert "windows" in found.verdicts[0].why
    paired = judge(f"hf-classifier:{folder}", reads="pair", device="cpu").judge(
        [Completion("0", "p" * 100, "abc " * 20)]
    )
    assert paired.verdicts[0].label == "unscored"
    assert "leaves" in paired.verdicts[0].error


def test_classes_without_a_known_name_have_to_be_named(tmp_path):
    folder = bert(tmp_path / "m", ("LABEL_0", "LABEL_1"))
    with pytest.raises(UsageError, match="say which of them"):
        judge(f"hf-classifier:{folder}", device="cpu").judge(ASKED)
    assert (
        judge(f"hf-classifier:{folder}", refusal=["LABEL_1"], device="cpu").judge(ASKED).measure == "refused"
    )
    with pytest.raises(UsageError, match="no class 'x'"):
        judge(f"hf-classifier:{folder}", harmful=["x"], device="cpu").judge(ASKED)
    with pytest.raises(UsageError, match="one kind"):
        judge(f"hf-classifier:{folder}", harmful=["a"], refusal=["b"])


@pytest.mark.parametrize("normalised", [False, True])
def test_a_cost_model_scores_the_last_token_as_its_checkpoint_says(tmp_path, normalised):
    folder, head = cost_folder(tmp_path / "cost", do_normalize=normalised)
    found = judge(f"cost:{folder}", device="cpu").judge(ASKED)
    decoder = transformers.AutoModelForCausalLM.from_pretrained(folder).model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "BEGINNING OF CONVERSATION: USER: How? ASSISTANT:Mix flour and water.</s>"
    with torch.no_grad():
        hidden = decoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
    cost = (hidden @ head["score_head.weight"][0] + 0.3).item() / (2.0 if normalised else 1.0)
    first = found.verdicts[0]
    assert first.score == pytest.approx(cost, abs=1e-4)
    assert first.p_harmful == pytest.approx(torch.sigmoid(torch.tensor(cost)).item(), abs=1e-4)
    assert first.label == ("harmful" if cost > 0 else "safe")
    assert found.mean_score().n == 2
    assert found.mean_score().unscored == 1


def test_the_text_of_the_second_paper_ends_without_an_end_mark(tmp_path):
    folder, _ = cost_folder(tmp_path / "cost")
    tulu = judge(f"cost:{folder}", format="tulu", device="cpu").judge(ASKED)
    given = judge(f"cost:{folder}", format="<|user|>\n{prompt}\n<|assistant|>\n{answer}", device="cpu").judge(
        ASKED
    )
    assert [verdict.score for verdict in tulu.verdicts] == [verdict.score for verdict in given.verdicts]
    with pytest.raises(UsageError, match="answer"):
        judge("cost", format="none")


def test_a_model_without_a_score_head_is_refused(tmp_path):
    folder = judge_folder(tmp_path / "m", "LlamaForCausalLM", transformers.LlamaConfig(**SIZES))
    with pytest.raises(ModelError, match="score_head"):
        judge(f"cost:{folder}", device="cpu").judge(ASKED)
