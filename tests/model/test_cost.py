"""What a run needs, told from shapes: parameters of public models, and sums of what can be counted."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import pytest
import transformers

from families import build
from safety_neurons.errors import ModelError, UnsupportedModelError
from safety_neurons.model import LanguageModel, estimate
from safety_neurons.model import outline as outline_module
from safety_neurons.model.batches import Batch, forward
from safety_neurons.model.cost import CostEstimate, Work, _forward, _probe_tokens, cost
from safety_neurons.model.decoding import SHARED
from safety_neurons.model.hooks import around
from safety_neurons.model.outline import Outline, outlines
from safety_neurons.model.pace import Throughput, TimedLayers
from safety_neurons.prompt_lists import Prompts
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_llama_folder, tiny_tokenizer

PROMPTS = Prompts.from_list(["kill a tree", "help", "tell me about the water"])
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QWEN_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "dtype": "bfloat16",
}


def outline_of(config: dict[str, object], folder: pathlib.Path, **options: str) -> Outline:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    [found], total = outlines([folder], **options)
    assert total == found.weights_bytes
    return found


def test_parameters_and_bytes_of_a_70b_are_those_that_are_published(tmp_path: pathlib.Path) -> None:
    few = {**LLAMA_70B, "num_hidden_layers": 2}  # layers are alike: two of them tell the other 78
    two, four = (outline_of({**few, "num_hidden_layers": n}, tmp_path / str(n)) for n in (2, 4))
    layer = (four.n_parameters - two.n_parameters) // 2
    assert two.n_parameters + 78 * layer == 70_553_706_496
    assert two.active_parameters == two.n_parameters
    assert layer == 8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672 + 2 * 8192
    assert two.decoder_parameters == 2 * layer + 8192
    assert two.weights_bytes == 2 * two.n_parameters + sum(
        buffer.numel() * buffer.element_size() for buffer in two.model.buffers()
    )
    assert two.table.n_neurons == 2 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    eight, four_bits = (
        outline_of(few, tmp_path / "2", quantize=bits).weights_bytes for bits in ("8bit", "4bit")
    )
    ends = 2 * 2 * 128256 * 8192
    assert eight == pytest.approx(ends + 2 * layer, rel=0.001)
    assert four_bits == pytest.approx(ends + 2 * layer * (0.5 + 4 / 64), rel=0.001)


def test_a_token_passes_22_of_the_235_billion_parameters_of_a_mixture(tmp_path: pathlib.Path) -> None:
    two, four = (outline_of({**QWEN_235B, "num_hidden_layers": n}, tmp_path / str(n)) for n in (2, 4))
    totals = [two.n_parameters, two.active_parameters]
    layers = [(four.n_parameters - totals[0]) // 2, (four.active_parameters - totals[1]) // 2]
    whole, active = (total + 92 * layer for total, layer in zip(totals, layers, strict=True))
    assert (whole, active) == (235_093_634_560, 22_190_763_520)
    assert two.anatomy.experts_per_token(0) == 8
    assert two.table.n_neurons == 2 * (2 * 8192 + 2 * 512 + 3 * 128 * 1536)


def test_no_logits_are_counted_where_none_are_needed(tmp_path: pathlib.Path) -> None:
    small = {
        **LLAMA_70B,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "head_dim": 8,
        "num_hidden_layers": 2,
    }
    outline = outline_of({**small, "vocab_size": 262144}, tmp_path / "model")
    read, losses, written = (
        cost(outline, [work], outline.weights_bytes, 0)
        for work in (
            Work("read", (320,)),
            Work("losses", (400,), logits=True),
            Work("answers", (320,), passes=0, new_tokens=8, answers=1),
        )
    )
    assert (read.logits_bytes, read.cache_bytes) == (0, 0)
    assert losses.logits_bytes == 400 * 262144 * 2 + 2**22 * 8  # of a part of them also probabilities
    assert written.logits_bytes == 262144 * (2 + 4)  # of one token a sequence
    assert written.cache_bytes == 328 * 2 * 2 * 64 * 2
    assert read.memory_bytes < losses.memory_bytes


def test_arms_that_answer_together_share_batches_and_what_prompts_begin_with(tmp_path: pathlib.Path) -> None:
    [outline], _ = outlines([tiny_llama_folder(tmp_path / "model")])

    def planned(**how: int) -> CostEstimate:
        work = Work("answers", (40,) * 10, passes=0, new_tokens=8, answers=4, **how)
        return cost(outline, [work], 0, 0)

    apart, together, pair = planned(), planned(together=4), planned(together=4, models=2)
    assert together.cache_bytes == 4 * apart.cache_bytes > 0
    assert pair.cache_bytes == 2 * together.cache_bytes
    assert together.flops == apart.flops
    for shared, spared in ((SHARED - 1, 0), (SHARED, 4 * 10 - 4)):
        less = together.flops - planned(together=4, shared=shared).flops
        assert less == pytest.approx(spared * _forward(outline, shared))


def test_what_every_prompt_begins_with_is_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        outline_module, "UNLIKE", ("kill me", "tell it")
    )  # which the tiny tokenizer tells apart
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))
    bare = LanguageModel(lm.model)
    rows = [row.ids for row in lm.encode(["kill me", "tell it", "zebra"])]
    begins = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
    assert Outline.of(lm).common_start == begins.index(False) > 0
    assert Outline.of(bare).common_start == 0


def test_an_estimate_adds_up_what_can_be_counted() -> None:
    model = tiny_llama()
    lm = LanguageModel(model, tiny_tokenizer(CHAT_TEMPLATE))
    plan = estimate([lm], PROMPTS, max_new_tokens=4, batch_size=1)
    assert plan.weights_bytes == sum(4 * parameter.numel() for parameter in model.parameters()) + sum(
        buffer.numel() * buffer.element_size() for buffer in model.buffers()
    )
    assert (plan.prompts, plan.batches, plan.new_tokens, plan.truncated) == (3, 3, 12, 0)
    assert plan.tokens == sum(len(item.ids) for item in lm.encode(PROMPTS)) + 12
    assert plan.statistics_bytes == 8 * 3 * lm.table.n_neurons
    assert plan.seconds > 0
    assert plan.fits
    assert plan.memory_bytes > plan.weights_bytes
    json.dumps(dataclasses.asdict(plan))
    other = LanguageModel(model, lm.tokenizer)
    assert estimate([lm, other], PROMPTS).weights_bytes == plan.weights_bytes
    more = LanguageModel(tiny_llama(seed=1), lm.tokenizer)
    assert estimate([lm, more], PROMPTS).weights_bytes == 2 * plan.weights_bytes


def test_the_parts_of_a_time_add_up_and_weights_take_longer_the_more_often_they_are_hashed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [outline], weights = outlines([tiny_llama_folder(tmp_path / "model")])
    monkeypatch.setattr(Throughput, "hashed", lambda _: 1e6)
    works = [Work("read", (5, 7), models=2), Work("write", (5, 7), passes=0, new_tokens=3, answers=2)]
    plan = dataclasses.replace(cost(outline, works, weights, 0, hashed=3 * weights), start_seconds=1.5)
    parts = (plan.start_seconds, plan.loading_seconds, plan.proof_seconds, plan.work_seconds)
    assert plan.seconds == sum(parts)
    assert min(parts) > 0
    assert plan.loading_seconds == 3 * weights / 1e6
    assert cost(outline, works, weights, 0).loading_seconds == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3_next", "qwen2_moe", "gpt_oss"])
def test_tokens_of_the_proof_are_those_that_are_fed(family: str) -> None:
    lm = LanguageModel(build(family))
    fed: list[int] = []
    with around(
        before={lm.inner.get_input_embeddings(): lambda args, _: fed.append(args[0].numel())}, after={}
    ):
        assert lm.table.n_neurons
    assert sum(fed) == _probe_tokens(Outline.of(lm))


class OwnPace:
    """A method whose batches take what a clock says, and what is done once before them."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    @contextlib.contextmanager
    def __call__(self, lm: LanguageModel) -> Iterator[Callable[[Batch], object]]:
        if self.fails:
            raise UnsupportedModelError("no such\nsite")
        yield lambda batch: forward(lm.model, batch)


def test_a_work_of_its_own_pace_takes_its_time_and_falls_back_with_a_note(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [outline], weights = outlines([tiny_llama_folder(tmp_path / "model")])
    monkeypatch.setattr(TimedLayers, "seconds", lambda *_: 1.0)
    plain = cost(outline, [Work("read", (5, 5, 7))], weights, 0)
    slow = Work("read", (5, 5, 7), reading=OwnPace())
    monkeypatch.setattr(TimedLayers, "reading", lambda *_: (2.0, 10.0))
    layers = len(outline.anatomy.layers)
    assert cost(outline, [slow], weights, 0).work_seconds == pytest.approx((2.0 + 10.0) * layers, rel=0.01)
    monkeypatch.undo()
    monkeypatch.setattr(TimedLayers, "seconds", lambda *_: 1.0)
    failed = cost(outline, [Work("read", (5, 5, 7), reading=OwnPace(fails=True))], weights, 0)
    assert failed.work_seconds == plain.work_seconds
    [note] = failed.notes
    assert "as if it were a plain pass (UnsupportedModelError: no such site)" in note


def three_layers(folder: pathlib.Path) -> tuple[Outline, int]:
    [outline], weights = outlines([tiny_llama_folder(folder, num_hidden_layers=3)])
    return outline, weights


def test_what_a_method_does_is_timed_in_its_layers_and_a_pass_in_all(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outline, weights = three_layers(tmp_path / "model")
    monkeypatch.setattr(TimedLayers, "seconds", lambda *_: 1.0)
    monkeypatch.setattr(TimedLayers, "reading", lambda *_: (2.0, 10.0))
    work = Work("read", (6, 6, 6), reading=OwnPace(), exact=(48, 32))

    def of(layers: tuple[int, ...] | None) -> float:
        return cost(outline, [dataclasses.replace(work, layers=layers)], weights, 0).work_seconds

    assert of(None) == of((0, 1, 2)) == pytest.approx(3 * (2.0 + 10.0), rel=0.01)
    for layers in ((0,), (1,), (0, 2)):
        expected = len(layers) * (2.0 + 10.0) + (3 - len(layers)) * 1.0
        assert of(layers) == pytest.approx(expected, rel=0.01)
    twice = dataclasses.replace(work, searches=2)  # what is done once is done in each search
    assert cost(outline, [twice], weights, 0).work_seconds == pytest.approx(3 * (2 * 2.0 + 10.0), rel=0.01)


def test_exact_importance_takes_arithmetic_and_memory_of_its_layers_alone(tmp_path: pathlib.Path) -> None:
    outline, weights = three_layers(tmp_path / "model")
    plain = Work("read", (6, 9))
    none, one, two, whole = (
        cost(outline, [dataclasses.replace(plain, exact=exact, layers=layers)], weights, 0)
        for exact, layers in ((None, None), ((48, 32), (1,)), ((48, 32), (0, 2)), ((48, 32), None))
    )
    assert one.flops > none.flops
    assert two.flops - none.flops == pytest.approx(2 * (one.flops - none.flops))
    assert whole.flops - none.flops == pytest.approx(3 * (one.flops - none.flops))
    kept = two.activations_bytes - one.activations_bytes  # factors of one output projection more
    assert whole.activations_bytes - two.activations_bytes == kept > 0


def test_gradients_take_arithmetic_and_memory_from_the_first_layer_of_a_method_on(
    tmp_path: pathlib.Path,
) -> None:
    outline, _ = three_layers(tmp_path / "model")
    once, whole, late = (
        cost(outline, [Work("read", (6, 6), passes=passes, logits=True, backward=back, layers=layers)], 0, 0)
        for passes, back, layers in ((1, False, None), (3, True, None), (3, True, (2,)))
    )
    head = 2 * outline.n_ids * outline.hidden * 12
    a_layer = (whole.flops - once.flops - 2 * head) / 2 / 3
    assert whole.flops - late.flops == pytest.approx(2 * 2 * a_layer, rel=0.01)
    assert whole.activations_bytes - late.activations_bytes == pytest.approx(2 * late.activations_bytes)


def test_an_estimate_reads_as_a_few_lines() -> None:
    lm = LanguageModel(tiny_llama(max_position_embeddings=8), tiny_tokenizer(CHAT_TEMPLATE))
    text = str(estimate([lm], Prompts.from_list(["kill " * 20])))
    for part in ("1 prompt, ", "1 prompt longer than the context", "memory about", "float32", "disk about"):
        assert part in text


def test_an_outline_counts_as_the_model_in_memory_does(tmp_path: pathlib.Path) -> None:
    folder = tiny_llama_folder(tmp_path / "model", tie_word_embeddings=True)
    [outline], _ = outlines([folder])
    lm = LanguageModel(tiny_llama(tie_word_embeddings=True), tiny_tokenizer(CHAT_TEMPLATE))
    assert outline.n_parameters == sum(parameter.numel() for parameter in lm.model.parameters())
    assert outline.table.fingerprint == lm.fingerprint
    assert outline.lengths(PROMPTS) == ([len(one.ids) for one in lm.encode(PROMPTS)], 0)
    assert all(parameter.is_meta for parameter in outline.model.parameters())


def test_a_folder_without_a_configuration_is_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json; expected .* with or without its weights"):
        outlines([tmp_path])
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}', encoding="utf-8")
    with pytest.raises(ModelError, match="describes no causal language model") as error:
        outlines([tmp_path])
    assert "\n" not in str(error.value)


def test_a_plan_counts_the_files_that_are_read_alone(tmp_path: pathlib.Path) -> None:
    folder = tiny_llama_folder(tmp_path / "model")
    whole = folder / "model.safetensors"
    (folder / "consolidated.safetensors").write_bytes(whole.read_bytes())  # As in folders of Mistral.
    assert outlines([folder])[0][0].weights_bytes == whole.stat().st_size


@pytest.mark.parametrize("named", [{"seq_length": 12}, {}])
def test_a_plan_cuts_prompts_where_a_run_does(named: dict[str, int]) -> None:
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))
    lm.tokenizer.model_max_length = 20
    lm.model.config = transformers.PretrainedConfig(**named)
    assert Outline.of(lm).max_length == lm.max_length == named.get("seq_length", 20)
