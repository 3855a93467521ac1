"""The whole flow on a folder shaped like a real checkpoint: Llama 3, scaled down, with real prompts where
they are at hand.
"""

import json

import pytest
import tokenizers
import torch
import transformers
from running import command, done

from safety_neurons.neurons import NeuronSet

HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] "
    "}}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}{% if "
    "add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def byte_tokenizer(texts):
    """A byte-level BPE of its own, with the header tokens of Llama 3."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[], initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=HEADERS[0], eos_token=HEADERS[3]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(HEADERS[1:3]) + [HEADERS[4]]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two random models of one shape, in bfloat16: the second differs in its feed-forward layers."""
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer = byte_tokenizer(
        [
            "Write a story about how to make a cake and open the door.",
            "Develop a plan to explain it step by step.",
        ]
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(name) for name in (HEADERS[4], HEADERS[3])],
    )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                )
    model.to(torch.bfloat16)
    for name in ("base", "aligned"):
        if name == "aligned":
            with torch.no_grad():
                for layer in model.model.layers:
                    weight = layer.mlp.down_proj.weight
                    weight += torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.05
        model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def files(shared):
    harmful = shared / "data" / "advbench" / "harmful_behaviors.csv"
    harmless = sorted((shared / "data").rglob("*alpaca*"))
    candidates = [path for path in harmless if path.suffix in (".json", ".jsonl", ".csv") and path.is_file()]
    if not harmful.is_file() or not candidates:
        pytest.skip("AdvBench and the Alpaca instructions are not at hand")
    return str(harmful), str(candidates[0])


@pytest.mark.slow
def test_the_whole_flow_runs_on_it(checkpoints, files, tmp_path):
    harmful, harmless = files
    pair = ["--base", checkpoints / "base", "--aligned", checkpoints / "aligned"]
    asked = ["--prompts", harmful, "--limit", "3"]
    measured = ["--harmful", harmful, "--harmless", harmless, "--limit", "2", "--max-new-tokens", "3"]

    examined = done("doctor", "--model", checkpoints / "aligned", "--out", tmp_path / "doctor")
    assert examined["healthy"], examined["checks"]
    assert "14/14" in examined["checks"][0]["measured"]

    importance = done(
        "find",
        "importance",
        "--model",
        checkpoints / "aligned",
        *asked,
        "--top",
        "0.01",
        "--out",
        tmp_path / "importance",
    )
    assert importance["prompts"] == {"used": 3, "failed": 0, "truncated": 0}
    sites = {key.rsplit(".", 1)[1] for key in NeuronSet.load(importance["neurons"]).table.keys}
    assert sites == {"q", "k", "v", "o", "gate", "up", "down"}
    for method, more in (
        ("contrast", ["--max-new-tokens", "6"]),
        ("importance-contrast", ["--sites", "down"]),
        ("attribution-patching", []),
    ):
        found = done("find", method, *pair, *asked, *more, "--top", "0.05", "--out", tmp_path / method)
        assert found["n_neurons"] == 22
    done("find", "attribution", "--model", checkpoints / "aligned", *asked, "--out", tmp_path / "attribution")

    words = [
        "verify",
        "patch",
        *pair,
        "--scores",
        tmp_path / "contrast",
        "--sizes",
        "0.05,0.3",
        *measured,
        "--random",
        "1",
    ]
    patched = done(*words, "--text", "builtin:general-test", "--out", tmp_path / "patch")
    assert (
        patched["untreated"]["harmful_refused"]["n"] + patched["untreated"]["harmful_refused"]["unscored"]
        == 2
    )
    assert patched["overlap_with_find_prompts"]["harmful"] == 2
    words = [
        "verify",
        "deactivate",
        "--model",
        checkpoints / "aligned",
        "--neurons",
        tmp_path / "importance",
        *measured,
    ]
    done(*words, "--text", "none", "--random", "1", "--out", tmp_path / "deactivate")
    table = done(
        "compare",
        *pair,
        *asked[:2],
        *measured,
        "--methods",
        "contrast,weight-change",
        "--random",
        "1",
        "--out",
        tmp_path / "compare",
    )
    assert [row["method"] for row in table["methods"]] == ["contrast", "weight-change", "random 0"]

    runs = [tmp_path / name for name in ("doctor", "contrast", "patch", "compare")]
    page = done("report", *runs, "--out", tmp_path / "report.html")["report"]
    assert (tmp_path / "report.html").stat().st_size > 10_000, page


def test_its_chat_template_and_every_end_token_are_used(checkpoints, tmp_path):
    from safety_neurons.model import load

    model = load(checkpoints / "base")
    ids = model.encode(["Write a story."])[0].ids
    text = model.tokenizer.decode(ids)
    turn = "<|start_header_id|>user<|end_header_id|>\n\nWrite a story.<|eot_id|>"
    assert text == f"<|begin_of_text|>{turn}<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert len(model.eos_ids) == 2
    assert (
        json.loads((checkpoints / "base" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    )


def test_its_dry_run_says_what_it_would_need(checkpoints):
    said = command(
        "find",
        "contrast",
        "--base",
        checkpoints / "base",
        "--aligned",
        checkpoints / "aligned",
        "--dry-run",
        "--limit",
        "5",
    )
    assert said.code == 0
    assert "weights" in said.out


def test_it_is_evaluated_under_patching(checkpoints, tmp_path):
    from safety_neurons.model import load

    table = load(checkpoints / "base").table
    NeuronSet({"layers.0.down": list(range(0, 224, 2)), "layers.1.down": list(range(50))}, table).save(
        tmp_path / "neurons.safetensors"
    )
    words = [
        "--model",
        checkpoints / "base",
        "--donor",
        checkpoints / "aligned",
        "--patch",
        tmp_path / "neurons.safetensors",
    ]
    asked = [
        "--limit",
        "4",
        "--max-new-tokens",
        "4",
        "--capability",
        "perplexity,kl",
        "--capability-limit",
        "4",
    ]
    found = done("evaluate", *words, *asked, "--out", tmp_path / "run")
    assert found["treatment"].startswith("162 neurons patched")
    assert [entry["kind"] for entry in found["treated"]["suites"]] == ["harmful", "harmless"]
    kl = found["treated"]["capability"][1]
    assert kl["task"] == "kl"
    assert kl["value"] > 0
