import json
import shutil
import sys
import warnings

import peft
import pytest
import safetensors.torch
import torch
import transformers
from safetensors.torch import load_file, save_file

from safety_neurons.errors import MismatchError, ModelError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel, load, load_pair, run_batches
from safety_neurons.model.outline import outlines
from safety_neurons.prompt_lists import Prompt
from safety_neurons.tuning import merged_base
from tiny import tiny_adapter_folder, tiny_llama, tiny_llama_folder, tiny_tokenizer

IDS = [[1, 5, 6, 7, 9], [1, 20, 21]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = tiny_llama_folder(root / "base")
    made = {
        name: tiny_adapter_folder(base, root / name, seed=seed)
        for seed, name in enumerate(("first", "second"), start=1)
    }
    made["lora"] = tiny_adapter_folder(
        base, root / "lora", seed=3, kind="lora", targets=("q_proj", "down_proj")
    )
    made["lora2"] = tiny_adapter_folder(base, root / "lora2", seed=4, kind="lora", targets=("up_proj",))
    return {"base": base, **made}


def _logits(lm):
    return run_batches(lm, IDS, lambda batch: batch.output.flatten(0, 1)[batch.rows], with_logits=True)[0]


def _scaled(*folders):
    """The base model with its down projections scaled by the product of the adapters' vectors: what unmerged
    (IA)³ adapters do.
    """
    model = tiny_llama()
    for folder in folders:
        for name, vector in load_file(folder / "adapter_model.safetensors").items():
            layer = int(name.split("layers.")[1].split(".")[0])
            model.model.layers[layer].mlp.down_proj.weight.data *= vector.flatten()
    return LanguageModel(model)


def test_a_model_without_adapters_needs_no_peft(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # so that its import is an error
    assert torch.equal(_logits(load(folders["base"])), _logits(LanguageModel(tiny_llama())))
    with pytest.raises(ImportError):
        load(f"{folders['base']}+{folders['first']}")


def test_adapters_of_one_type_act_together_and_stay_unmerged(folders):
    lm = load(f"{folders['base']}+{folders['first']}+{folders['second']}")
    assert lm.adapters == ("a0", "a1")
    torch.testing.assert_close(
        _logits(lm), _logits(_scaled(folders["first"], folders["second"])), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(
        lm.inner.model.layers[0].mlp.down_proj.base_layer.weight,
        tiny_llama().model.layers[0].mlp.down_proj.weight,
    )


def test_a_pair_on_one_base_shares_it_and_each_view_has_its_own_adapters(folders):
    pair = load_pair(
        f"{folders['base']}+{folders['first']}", f"{folders['base']}+{folders['first']}+{folders['second']}"
    )
    assert pair.shared
    assert pair.base.model is pair.aligned.model
    torch.testing.assert_close(_logits(pair.base), _logits(_scaled(folders["first"])), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        _logits(pair.aligned), _logits(_scaled(folders["first"], folders["second"])), atol=1e-4, rtol=1e-4
    )


def test_an_adapter_that_is_named_twice_counts_twice_and_is_shared_all_the_same(folders):
    once, twice = (
        f"{folders['base']}+{folders['first']}",
        f"{folders['base']}+{folders['first']}+{folders['first']}",
    )
    pair = load_pair(once, twice)
    assert pair.shared
    assert (pair.base.adapters, pair.aligned.adapters) == (("a0",), ("a0", "a1"))
    for view in (load(twice), pair.aligned):
        torch.testing.assert_close(
            _logits(view), _logits(_scaled(folders["first"], folders["first"])), atol=1e-4, rtol=1e-4
        )


def test_the_plain_base_of_a_pair_is_the_plain_model(folders):
    pair = load_pair(folders["base"], f"{folders['base']}+{folders['second']}")
    assert pair.shared
    assert torch.equal(_logits(pair.base), _logits(LanguageModel(tiny_llama())))
    torch.testing.assert_close(
        _logits(pair.aligned), _logits(_scaled(folders["second"])), atol=1e-4, rtol=1e-4
    )


def test_what_was_active_is_active_again_after_a_block_and_after_an_exception(folders):
    pair = load_pair(folders["base"], f"{folders['base']}+{folders['first']}+{folders['second']}")
    layers = [module for module in pair.base.model.modules() if hasattr(module, "_active_adapter")]

    def state():
        wanted = [parameter.requires_grad for parameter in pair.base.model.parameters()]
        return (
            [(layer.active_adapters, layer._disable_adapters) for layer in layers],
            pair.base.model.base_model.active_adapter,
            wanted,
        )

    before = state()
    with pair.aligned.active():
        assert layers[0].active_adapters == ["a0", "a1"]
        with pair.base.active():
            assert layers[0].disable_adapters
        assert layers[0].active_adapters == ["a0", "a1"]
        assert not layers[0].disable_adapters
    assert state() == before
    with pytest.raises(RuntimeError, match="in the middle"), pair.aligned.active(), pair.base.active():
        raise RuntimeError("in the middle")
    assert state() == before


def test_low_rank_adapters_add_up(folders):
    lm = load(f"{folders['base']}+{folders['lora']}+{folders['lora2']}")
    merged = load(f"{folders['base']}+{folders['lora']}+{folders['lora2']}", merge_adapters=True)
    torch.testing.assert_close(_logits(lm), _logits(merged), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(_logits(lm), _logits(load(f"{folders['base']}+{folders['lora']}")), atol=1e-2)


def test_a_mix_of_types_names_the_option_that_merges_and_merging_follows_the_order(folders):
    spec = f"{folders['base']}+{folders['lora']}+{folders['first']}"
    with pytest.raises(UsageError, match=r"lora is LORA.*first is IA3.*merge_adapters"):
        load(spec)
    merged = load(spec, merge_adapters=True)
    other = load(f"{folders['base']}+{folders['first']}+{folders['lora']}", merge_adapters=True)
    assert merged.adapters is None
    assert not hasattr(merged.model, "peft_config")
    assert not torch.allclose(_logits(merged), _logits(other), atol=1e-3)
    weights = tiny_llama().model.layers[0].mlp.down_proj.weight.data
    low = load_file(folders["lora"] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    settings = json.loads((folders["lora"] / "adapter_config.json").read_text())
    weights = weights + settings["lora_alpha"] / settings["r"] * low[name.format("B")] @ low[name.format("A")]
    vector = load_file(folders["first"] / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.mlp.down_proj.ia3_l"
    ]
    torch.testing.assert_close(
        merged.model.model.layers[0].mlp.down_proj.weight.data, weights * vector.reshape(1, -1)
    )


def test_a_mixed_pair_is_two_models(folders):
    pair = load_pair(f"{folders['base']}+{folders['lora']}", f"{folders['base']}+{folders['first']}")
    assert not pair.shared
    assert pair.base.model is not pair.aligned.model


def _damaged(folders, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(folders["first"], folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    return f"{folders['base']}+{folder}"


def test_missing_unknown_and_misshapen_adapter_weights_are_errors(folders, tmp_path):
    with pytest.raises(ModelError, match=r"1 missing .*down_proj\.ia3_l"):
        load(_damaged(folders, tmp_path / "one", lambda weights: weights.pop(sorted(weights)[0])))
    with pytest.raises(ModelError, match=r"1 unknown \(base_model\.model\.other\)"):
        load(
            _damaged(
                folders,
                tmp_path / "two",
                lambda weights: weights.update({"base_model.model.other": torch.ones(2)}),
            )
        )
    with pytest.raises(ModelError, match=r"shape \[1, 3\]; expected \[1, 48\]"):
        load(
            _damaged(
                folders,
                tmp_path / "three",
                lambda weights: weights.update({sorted(weights)[0]: torch.ones(1, 3)}),
            )
        )


def test_a_copy_of_the_embedding_in_an_adapters_file_is_no_error_unless_it_differs(folders, tmp_path):
    embedding = tiny_llama().model.embed_tokens.weight.detach().clone()
    name = "base_model.model.model.embed_tokens.weight"
    load(_damaged(folders, tmp_path / "same", lambda weights: weights.update({name: embedding})))
    with pytest.raises(ModelError, match=r"1 unknown .*embed_tokens"):
        load(_damaged(folders, tmp_path / "other", lambda weights: weights.update({name: embedding + 1})))


def test_adapters_follow_the_type_and_place_of_the_model(folders):
    pair = load_pair(folders["base"], f"{folders['base']}+{folders['first']}", dtype="float64")
    assert {parameter.dtype for parameter in pair.aligned.model.parameters()} == {torch.float64}
    assert _logits(pair.aligned).dtype == torch.float64
    half = load(f"{folders['base']}+{folders['first']}", dtype="bfloat16")
    assert torch.isfinite(_logits(half)).all()


def test_folders_that_are_no_adapter_are_refused_in_one_line(folders, tmp_path):
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load(f"{folders['base']}+{folders['base']}")
    pickled = tmp_path / "pickled"
    shutil.copytree(folders["first"], pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match="is a pickle"):
        load(f"{folders['base']}+{pickled}")
    with pytest.raises(ModelError, match=r"no config\.json; this is an adapter: write BASE\+"):
        load(folders["first"])
    broken = tmp_path / "broken"
    shutil.copytree(folders["first"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        load(f"{folders['base']}+{broken}")


def test_an_adapter_for_other_projections_does_not_fit(folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders["first"], other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["nothing"], "feedforward_modules": ["nothing"]})
    )
    with pytest.raises(ModelError, match="does not fit the model"):
        load(f"{folders['base']}+{other}")


def test_an_adapted_model_already_in_memory_is_taken_as_it_is(folders):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_llama(), folders["first"])
    lm = LanguageModel(model, tiny_tokenizer())
    assert lm.model is model
    torch.testing.assert_close(_logits(lm), _logits(_scaled(folders["first"])), atol=1e-4, rtol=1e-4)
    keys = set(vars(model)) | set(vars(model.base_model))
    lm.complete(["tree"], max_new_tokens=2)
    assert set(vars(model)) | set(vars(model.base_model)) == keys
    with pytest.raises(ModelError, match="expected a PEFT model"):
        LanguageModel(tiny_llama(), adapters=["a0"])


def test_recorded_activations_of_stacked_adapters_are_reproduced(shared):
    folder = shared / "oracle-contrast"
    fixture = folder / "fixture"
    sft, dpo = (
        f"{fixture / 'base'}+{fixture / 'adapter_sft'}",
        f"{fixture / 'base'}+{fixture / 'adapter_sft'}+{fixture / 'adapter_dpo'}",
    )
    pair = load_pair(sft, dpo, template="none")
    assert pair.shared
    recorded = safetensors.torch.load_file(folder / "generation.safetensors")
    for name, lm in (("sft", pair.base), ("dpo", pair.aligned)):
        prompts = recorded[f"plain/{name}/eval_prompts/batch0/prompt_ids"]
        mask = recorded[f"plain/{name}/eval_prompts/batch0/attention_mask"]
        sequences = recorded[f"plain/{name}/eval_prompts/batch0/sequences"]
        with lm.running(), torch.no_grad():
            again = lm.model.generate(
                input_ids=prompts,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=sequences.shape[1] - prompts.shape[1],
                pad_token_id=3,
            )
        assert torch.equal(again, sequences[:, : again.shape[1]])
        assert (sequences[:, again.shape[1] :] == 3).all()


def test_recorded_completions_are_reproduced_from_the_prompts(shared):
    folder = shared / "oracle-contrast"
    fixture = folder / "fixture"
    aligned = load(f"{fixture / 'base'}+{fixture / 'adapter_sft'}+{fixture / 'adapter_dpo'}", template="none")
    recorded = safetensors.torch.load_file(folder / "generation.safetensors")
    prompts, mask, sequences = (
        recorded[f"plain/dpo/eval_prompts/batch0/{name}"]
        for name in ("prompt_ids", "attention_mask", "sequences")
    )
    texts = [aligned.tokenizer.decode(row[kept.bool()][1:]) for row, kept in zip(prompts, mask, strict=True)]
    answers = aligned.complete(texts, max_new_tokens=sequences.shape[1] - prompts.shape[1])
    for answer, row in zip(answers, sequences, strict=True):
        generated = [int(token) for token in row[prompts.shape[1] :] if int(token) not in (2, 3)]
        assert list(answer.token_ids) == generated


def _configured(folder, **entries):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **entries}))
    return folder


def _tuned(base, folder, config):
    """An adapter of any kind, its parameters moved.

    Its folder and the logits of the model it was saved from.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        adapted.eval().save_pretrained(folder)
        return folder, adapted(torch.arange(5, 15)[None]).logits


TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **TARGETS),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, **TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **TARGETS),
    "loha": lambda: peft.LoHaConfig(r=2, **TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=2, **TARGETS),
    "hra": lambda: peft.HRAConfig(r=2, **TARGETS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "lora with a head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "lora with tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[5], **TARGETS),
}


READ = ("adalora", "lora with a head", "lora with tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_runs_as_it_was_saved_and_its_neurons_are_read_or_refused_by_name(
    folders, tmp_path, kind
):
    folder, expected = _tuned(folders["base"], tmp_path / kind, KINDS[kind]())
    for merged in (False, True):
        lm = load(f"{folders['base']}+{folder}", merge_adapters=merged)
        with torch.no_grad(), lm.running():
            assert torch.allclose(lm.model(torch.arange(5, 15)[None]).logits, expected, atol=1e-3)
        if merged or kind in READ:
            assert lm.anatomy.coverage().complete
        else:
            with pytest.raises(UnsupportedModelError, match="merge_adapters"):
                _ = lm.anatomy


def test_an_adapter_on_weights_that_two_layers_share_runs_unmerged_and_is_not_merged(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["base"], tie_word_embeddings=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    transformers.AutoTokenizer.from_pretrained(folders["base"]).save_pretrained(tmp_path / "tied")
    for number, layers in enumerate((["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", *layers], task_type="CAUSAL_LM")
        folder, expected = _tuned(tmp_path / "tied", tmp_path / str(number), config)
        lm = load(f"{tmp_path / 'tied'}+{folder}")
        with torch.no_grad(), lm.running():
            assert torch.allclose(lm.model(torch.arange(5, 15)[None]).logits, expected, atol=1e-5)
        with pytest.raises(ModelError, match="cannot be merged, since it would change two layers"):
            load(f"{tmp_path / 'tied'}+{folder}", merge_adapters=True)
        with pytest.raises(ModelError, match="cannot be merged, since it would change two layers"):
            merged_base(lm)


def test_adapters_that_are_no_change_of_weights_are_refused_by_name(folders, tmp_path):
    for config in (
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
    ):
        name = config.peft_type.value
        folder, _ = _tuned(folders["base"], tmp_path / name, config)
        with pytest.raises(ModelError, match=f"a {name} adapter"):
            load(f"{folders['base']}+{folder}")


def test_an_adapter_that_repeats_layers_runs_unmerged_and_is_not_merged(folders, tmp_path):
    config = peft.LoraConfig(r=2, layer_replication=[[0, 2], [1, 2]], **TARGETS)
    folder, expected = _tuned(folders["base"], tmp_path / "repeated", config)
    lm = load(f"{folders['base']}+{folder}")
    with torch.no_grad(), lm.running():
        assert torch.allclose(lm.model(torch.arange(5, 15)[None]).logits, expected)
    with pytest.raises(ModelError, match="cannot be merged, since it would change two layers"):
        load(f"{folders['base']}+{folder}", merge_adapters=True)


@pytest.mark.parametrize(
    "entries",
    [
        {"target_modules": "(a+)+$"},
        {"target_modules": r"(.*)*q_projx"},
        {"target_modules": r"(?:.|\w)+q_projx"},
        {"target_modules": ".*.*.*.*.*.*.*.*x"},
        {"target_modules": r"(\w+)\1+\1+x"},
        {"layers_to_transform": [0], "layers_pattern": ["(a|a)*b"]},
        {"rank_pattern": {"([a-z_.0-9]+)*x": 4}},
        {"alpha_pattern": {"([a-z_.0-9]+){1,99}x": 4}},
        {"exclude_modules": "([a-z]*)*x"},
        {"modules_to_save": ["([a-z_.]*)*x"]},
        {"target_modules": "("},
        {"r": 10**9},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": True},
    ],
)
def test_an_adapters_configuration_that_would_not_come_to_an_end_is_refused(folders, tmp_path, entries):
    folder = _configured(
        tiny_adapter_folder(folders["base"], tmp_path / "lora", seed=1, kind="lora"), **entries
    )
    with pytest.raises(ModelError, match="expected") as error:
        load(f"{folders['base']}+{folder}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("adalora", "init_r"),
        ("loha", "r"),
        ("hra", "r"),
        ("vera", "r"),
        ("fourierft", "n_frequency"),
        ("loha", "rank_pattern"),
    ],
)
def test_a_rank_that_no_weight_of_the_adapter_has_is_refused_before_memory_is_asked_for(
    folders, tmp_path, kind, size
):
    folder, _ = _tuned(folders["base"], tmp_path / kind, KINDS[kind]())
    _configured(folder, **{size: {"q_proj": 10**9} if size == "rank_pattern" else 10**9})
    with pytest.raises(ModelError, match=f"says {size} 1,000,000,000"):
        load(f"{folders['base']}+{folder}")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.\d+\.mlp\.(up|down)_proj",
        ".*down_proj",
        r"model\.layers\.(0|1)\..*(q_proj|down_proj)",
        r".*(?<!x)down_proj",
    ],
)
def test_ordinary_expressions_are_taken(folders, tmp_path, pattern):
    folder, _ = _tuned(
        folders["base"],
        tmp_path / "lora",
        peft.LoraConfig(r=2, target_modules=pattern, task_type="CAUSAL_LM"),
    )
    assert load(f"{folders['base']}+{folder}").adapters == ("a0",)


def test_the_tokenizer_in_an_adapters_folder_is_used_and_noted_where_it_differs(folders, tmp_path):
    folder = tiny_adapter_folder(folders["base"], tmp_path / "adapter", seed=1, kind="lora")
    own = transformers.AutoTokenizer.from_pretrained(folders["base"])
    own.save_pretrained(folder)
    assert not load(f"{folders['base']}+{folder}").notes
    own.chat_template = "{% for m in messages %}{{ m.content }} write {% endfor %}"
    own.save_pretrained(folder)
    for lm in (
        load(f"{folders['base']}+{folder}"),
        load_pair(folders["base"], f"{folders['base']}+{folder}").aligned,
    ):
        assert lm.template.render(lm.tokenizer, Prompt("0", "tree")) == "tree write "
        assert lm.notes == [
            "adapter: the tokenizer in the adapter's folder is used, which differs in its chat template"
        ]
    assert (
        load_pair(folders["base"], f"{folders['base']}+{folder}").base.tokenizer.chat_template
        != own.chat_template
    )


def test_an_adapter_for_a_model_of_another_name_is_noted(folders, tmp_path):
    folder = tiny_adapter_folder(folders["base"], tmp_path / "adapter", seed=1, kind="lora")
    assert not load(f"{folders['base']}+{folder}").notes
    _configured(folder, base_model_name_or_path="org/another-7b")
    assert "made for 'org/another-7b'" in load(f"{folders['base']}+{folder}").notes[0]
    assert (
        "made for 'org/another-7b'"
        in load_pair(folders["base"], f"{folders['base']}+{folder}").aligned.notes[0]
    )


@pytest.mark.parametrize(("kind", "part", "neutral"), [("lora", "lora_B", 0.0), ("ia3", "ia3_l", 1.0)])
def test_an_adapter_that_changes_nothing_is_noted(folders, tmp_path, kind, part, neutral):
    folder = tiny_adapter_folder(folders["base"], tmp_path / "adapter", seed=1, kind=kind)
    weights = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in weights if part in name)
    idle = {name: torch.full_like(w, neutral) if part in name else w for name, w in weights.items()}
    for kept, notes in ((idle, 1), (idle | {first: weights[first]}, 0)):
        save_file(kept, folder / "adapter_model.safetensors")
        assert ["changes nothing" in note for note in load(f"{folders['base']}+{folder}").notes] == [
            True
        ] * notes


def test_an_adapter_of_no_weight_is_noted(folders, tmp_path):
    folder = tiny_adapter_folder(folders["base"], tmp_path / "adapter", seed=1, kind="lora")
    _configured(folder, lora_alpha=0)
    assert "its lora_alpha is 0" in load(f"{folders['base']}+{folder}").notes[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_taken_from_the_adapter(tmp_path, tied):
    base = tiny_llama_folder(tmp_path / "base", tie_word_embeddings=tied)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(101, mean_resizing=False)
    torch.nn.init.normal_(plain.get_input_embeddings().weight, std=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, **TARGETS)).eval()
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ids = torch.tensor([[5, 6, 98, 100]])
    for merged in (False, True):
        lm = load(f"{base}+{tmp_path / 'adapter'}", merge_adapters=merged)
        with torch.no_grad(), lm.running():
            assert torch.allclose(lm.model(ids).logits, adapted(ids).logits, atol=1e-5)
        assert "an embedding of 101 tokens" in lm.notes[0]
    pair = load_pair(base, f"{base}+{tmp_path / 'adapter'}")
    assert (pair.base.n_ids, pair.aligned.n_ids, pair.shared) == (96, 101, False)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wide = {name: torch.ones(101, 31) if "embed" in name else value for name, value in weights.items()}
    save_file(wide, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"brings an embedding of \[101, 31\]"):
        load(f"{base}+{tmp_path / 'adapter'}")


BEGUN = {begins: {"init_lora_weights": begins} for begins in ("pissa", "olora")}
if hasattr(peft.tuners.lora.config, "KasaConfig"):
    BEGUN["kasa"] = {"kasa_config": peft.tuners.lora.config.KasaConfig()}


@pytest.mark.parametrize("begins", BEGUN)
def test_a_base_that_an_adapter_takes_a_part_out_of_is_not_shared(folders, tmp_path, begins):
    config = peft.LoraConfig(r=2, **BEGUN[begins], **TARGETS)
    folder, expected = _tuned(folders["base"], tmp_path / begins, config)
    pair = load_pair(folders["base"], f"{folders['base']}+{folder}")
    assert torch.equal(_logits(pair.base), _logits(load(folders["base"])))
    plain, both = (
        outlines([folders["base"], spec])[1] for spec in (folders["base"], f"{folders['base']}+{folder}")
    )
    assert both > 1.9 * plain
    with torch.no_grad(), pair.aligned.running():
        assert torch.allclose(pair.aligned.model(torch.arange(5, 15)[None]).logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "corda"),
        ("alora_invocation_tokens", [5, 6]),
        ("use_rslora", "false"),
        ("use_rslora", 0),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("peft_type", "lora"),
        ("peft_type", None),
        ("peft_type", "OF_TOMORROW"),
        ("peft_type", ["LORA"]),
    ],
)
def test_an_entry_that_would_be_computed_as_something_else_is_refused_by_its_name(
    folders, tmp_path, entry, value
):
    folder = _configured(shutil.copytree(folders["lora"], tmp_path / "odd"), **{entry: value})
    with pytest.raises(ModelError, match=rf"adapter_config\.json.* {entry}.*; expected") as caught:
        load(f"{folders['base']}+{folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"use_new_trick": True}, "use_new_trick"),
        ({"use_new_trick": False, "another": None, "third": []}, None),
        ({"lora_alpha": ...}, "no lora_alpha; PEFT's 8"),
        ({"alpha_pattern": {"q_porj": 64}}, "alpha_pattern names 'q_porj'"),
        ({"rank_pattern": {"0.self_attn.v_proj": 4}}, "rank_pattern names '0.self_attn.v_proj'"),
        ({"alpha_pattern": {"q_proj": 64}, "rank_pattern": {"layers.0.mlp.down_proj": 2}}, None),
    ],
)
def test_what_a_configuration_says_and_nobody_does_is_noted(folders, tmp_path, entries, said):
    folder = shutil.copytree(folders["lora"], tmp_path / "new")
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    notes = load(f"{folders['base']}+{folder}").notes
    assert [said in note for note in notes] == ([] if said is None else [True])
