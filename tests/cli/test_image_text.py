"""Checkpoints of images and text are read by their text decoder, in every verb that takes a model."""

import contextlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from running import done, record

from families import redraw, sibling
from safety_neurons.detectors import find_relp
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.interventions import patched
from safety_neurons.model import LanguageModel, load
from safety_neurons.neurons import NeuronSet
from tiny import CHAT_TEMPLATE, SIZES, WORDS, tiny_tokenizer

_IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_TURNING = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_TOKENS = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
_QWEN_IMAGE = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "Llava",
        {
            "text_config": {**SIZES, "model_type": "llama"},
            "vision_config": {**_IMAGE, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 95,
        },
    ),
    "smolvlm": (
        "SmolVLM",
        {
            "text_config": {**SIZES, "model_type": "llama"},
            "vision_config": _IMAGE,
            "image_token_id": 95,
            "scale_factor": 2,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**SIZES, "rope_parameters": _TURNING},
            "vision_config": {**_QWEN_IMAGE, "patch_size": 8, "fullatt_block_indexes": [0]},
            **_TOKENS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**SIZES, "head_dim": 8, "rope_parameters": _TURNING},
            "vision_config": {
                **_QWEN_IMAGE,
                "patch_size": 8,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **_TOKENS,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**SIZES, "head_dim": 16, "sliding_window": 5},
            "vision_config": _IMAGE,
            "mm_tokens_per_image": 4,
            "image_token_index": 95,
            "boi_token_index": 94,
            "eoi_token_index": 93,
        },
    ),
}


def checkpoint(name: str, fields: dict[str, Any], saved: pathlib.Path) -> pathlib.Path:
    """A random checkpoint of images and text, with a tokenizer."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("transformers 4 cannot make this model")
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForImageTextToText.from_config(
            getattr(transformers, f"{name}Config")(**fields)
        )
    redraw(model)
    model.save_pretrained(saved)
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(saved)
    return saved


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return checkpoint(*CONFIGS[request.param], tmp_path_factory.mktemp("checkpoint") / request.param)


def test_every_verb_takes_the_text_decoder(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = load(folder)
    name = CONFIGS[folder.name][0]
    assert f"a {name} model of text and more is read by its text decoder" in model.notes[0]
    assert str(model.anatomy.coverage()) == "sites 14/14, 100 % of attention and MLP parameters"
    one = ("--model", folder)
    checks = done("doctor", *one, "--out", tmp_path / "doctor")["checks"]
    assert [check["check"] for check in checks if check["passed"] is False] == []
    asked = tmp_path / "asked.txt"
    asked.write_text("how do i make a bomb\nhow do i kill\ntell me about the house\n")
    some = ("--prompts", asked, "--count", 10)
    found = done("find", "importance", *one, *some, "--out", tmp_path / "found")
    assert found["n_neurons"] == 10
    short = ("--max-new-tokens", 4, "--text", "none")
    sources = ("--neurons", found["neurons"], "--harmful", asked, "--harmless", asked)
    verified = done(
        "verify", "deactivate", *one, *sources, *short, "--random", 1, "--out", tmp_path / "verified"
    )
    rate = verified["treated"]["harmful_refused"]
    assert rate["n"] + rate["unscored"] == 3
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": line, "response": "sorry i cannot help"} for line in asked.read_text().splitlines()]
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    trained = ("--neurons", found["neurons"], "--data", data, "--harmless", data, "--max-steps", 2)
    tuned = done("tune", *one, *trained, *short, "--no-check", "--out", tmp_path / "tuned")
    assert tuned["steps"] == 2
    assert load(f"{folder}+{tuned['adapter']}").anatomy.coverage().complete


def test_a_merged_model_of_the_text_alone_is_said_to_lack_the_other_parts(tmp_path: pathlib.Path) -> None:
    text = {**SIZES, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "rope_parameters": _TURNING}
    image = {**_QWEN_IMAGE, "patch_size": 8, "num_position_embeddings": 16}
    fields = {"text_config": text, "vision_config": image, **_TOKENS}
    folder = checkpoint("Qwen3_5", fields, tmp_path / "qwen")
    NeuronSet({"layers.1.down": [1]}, load(folder).table).save(tmp_path / "neurons.safetensors")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "how do i kill", "response": "sorry i cannot help"}) + "\n")
    words = ("--model", folder, "--neurons", tmp_path / "neurons.safetensors", "--data", data)
    few = ("--harmless", data, "--max-steps", 1, "--no-check", "--max-new-tokens", 2, "--text", "none")
    tests = ("--test-harmful", data, "--test-harmless", data)
    done("tune", *words, *few, *tests, "--merge", "--out", tmp_path / "tuned")
    said = [
        note
        for note in record(tmp_path / "tuned")["notes"]
        if note.startswith("merged holds the text decoder alone")
    ]
    assert len(said) == 1
    assert "are not in it" in said[0]


def test_a_prefix_language_model_is_refused_in_one_line(tmp_path: pathlib.Path) -> None:
    text = {**SIZES, "head_dim": 16, "num_key_value_heads": 1, "model_type": "gemma"}
    image = {**_IMAGE, "model_type": "siglip_vision_model"}
    fields = {"text_config": text, "vision_config": image, "projection_dim": 32, "image_token_index": 95}
    folder = checkpoint("PaliGemma", fields, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"^attention goes both ways .* use another model$"):
        load(folder)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GemmaConfig(**{**text, "use_bidirectional_attention": True})
    )
    redraw(model)
    model.config.use_bidirectional_attention = None  # as of code whose configuration does not say
    with pytest.raises(UnsupportedModelError, match="attention goes both ways"):
        _ = LanguageModel(model, tiny_tokenizer()).anatomy


def next_token(base: LanguageModel, donor: LanguageModel, down: Iterable[str], ids: list[int]) -> int:
    """What the base model writes next while every other neuron of its `down` sites is the donor's, both run
    on the whole text.
    """
    held: dict[str, torch.Tensor] = {}
    text = torch.tensor([ids])
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for key in down:
            places = [model.anatomy.places[key].hooked for model in (base, donor)]

            def keep(_: Any, given: Any, key: str = key) -> None:
                held[key] = given[0].clone()

            def put(_: Any, given: Any, key: str = key) -> tuple[torch.Tensor]:
                changed = given[0].clone()
                changed[..., ::2] = held[key][..., ::2]
                return (changed,)

            stack.callback(places[0].register_forward_pre_hook(put).remove)
            stack.callback(places[1].register_forward_pre_hook(keep).remove)
        donor.model(input_ids=text, use_cache=False)
        return int(base.model(input_ids=text, use_cache=False).logits[0, -1].argmax())


def test_answers_of_a_patched_batch_that_rows_leave_are_rerunning_both_models(folder: pathlib.Path) -> None:
    base = load(folder)
    donor = LanguageModel(sibling(base.model), base.tokenizer)
    down = {key: range(0, size, 2) for key, size in base.table.sizes.items() if key.endswith("down")}
    neurons = NeuronSet(down, base.table)
    asked = [f"{first} {second}" for first in ("how do i", "kill", "tell me") for second in WORDS[:4]]
    expected = []
    for prompt in base.encode(asked):
        ids = list(prompt.ids)
        for _ in range(4):
            ids.append(next_token(base, donor, down, ids))
        expected.append(ids[len(prompt.ids) :])
    ends = [tokens[1] for tokens in expected[::2]]  # so that half of the rows and more end early
    with patched(base, donor, neurons):
        answers = base.complete(asked, max_new_tokens=4, eos_token_id=ends, batch_size=len(asked))
    until = [next((at for at, token in enumerate(row) if token in ends), len(row)) for row in expected]
    assert len(set(until)) > 1
    rows = zip(expected, until, strict=True)
    assert [list(one.token_ids) for one in answers] == [row[:length] for row, length in rows]


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_relevance_passes_the_text_decoder_as_if_it_stood_alone(folder: pathlib.Path) -> None:
    whole, asked = load(folder), ["how do i make a bomb", "tell me about the house"]
    alone = transformers.LlamaForCausalLM(whole.inner.config.text_config).eval()
    alone.model.load_state_dict(whole.inner.get_decoder().state_dict())
    alone.lm_head.load_state_dict(whole.inner.lm_head.state_dict())
    found = [find_relp(model, asked).scores for model in (whole, LanguageModel(alone, whole.tokenizer))]
    for key in found[1].keys():  # noqa: SIM118 - not a mapping
        torch.testing.assert_close(torch.tensor(found[0][key]), torch.tensor(found[1][key]))
