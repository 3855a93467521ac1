import copy
import types
import warnings

import pytest
import torch
import transformers

from families import build
from safety_neurons.errors import ModelError, UsageError
from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel, load, run_batches, token_losses
from safety_neurons.model.decoding import Decoding, cache_in, cache_name, cut, without_cache
from safety_neurons.model.hooks import around
from safety_neurons.model.language_model import UNKNOWN, generate
from safety_neurons.model.passes import PassOptions
from safety_neurons.prompt_lists import Prompt, Prompts
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer


def _everything(model, tokenizer):
    """All that a caller could find changed: weights, modes, hooks, attributes, configurations, the
    tokenizer.
    """
    modules = [
        (
            name,
            module.training,
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]
    weights = {
        name: (value.clone(), value.requires_grad, value.grad) for name, value in model.named_parameters()
    }
    settings = copy.deepcopy(
        (
            model.config.to_dict(),
            model.generation_config.to_dict(),
            tokenizer.init_kwargs,
            tokenizer.chat_template,
        )
    )
    return modules, weights, settings, tokenizer.backend_tokenizer.to_str(), len(tokenizer)


def _same(before, after):
    assert before[0] == after[0]
    for name, (value, wanted, grad) in before[1].items():
        assert torch.equal(value, after[1][name][0]), name
        assert (wanted, grad) == after[1][name][1:]
    assert before[2:] == after[2:]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_callers_is_left_changed_also_after_an_exception(training):
    model, tokenizer = tiny_llama().train(training), tiny_tokenizer(CHAT_TEMPLATE, pad=False)
    model.generation_config.update(do_sample=True, temperature=0.3)
    before = _everything(model, tokenizer)
    lm = LanguageModel(model, tokenizer)
    lm.complete(["help", "kill a tree"], max_new_tokens=3)
    lm.complete(["help"], max_new_tokens=3, sample=True)
    token_losses(lm, ["kill a tree"])
    _ = lm.table
    run_batches(lm, [[1, 5, 6]], len, options=PassOptions(last_layer=0))
    _same(before, _everything(model, tokenizer))

    def fail(*_):
        raise RuntimeError("in the middle")

    with around(before={model.model.layers[1]: fail}):
        for call in (lambda: lm.complete(["help"], max_new_tokens=3), lambda: run_batches(lm, [[1, 5]], len)):
            with pytest.raises(RuntimeError, match="in the middle"):
                call()
    _same(before, _everything(model, tokenizer))


def test_a_model_in_memory_is_described_by_its_parts():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    lm = LanguageModel(model, tokenizer, name="mine")
    assert lm.model is model
    assert lm.inner is model
    assert (lm.name, lm.dtype, lm.device, lm.max_length, lm.n_ids) == (
        "mine",
        torch.float32,
        torch.device("cpu"),
        128,
        96,
    )
    assert (lm.pad_id, lm.bos_id, lm.eos_ids) == (0, 1, (2,))
    assert lm.folder is None
    assert "mine" in repr(lm)
    with lm.active():
        pass


def test_the_anatomy_is_found_and_proved_once():
    lm = LanguageModel(tiny_llama())
    assert lm.anatomy is lm.anatomy
    assert lm.table.n_neurons == 2 * (32 + 16 + 16 + 32 + 3 * 48)
    assert lm.fingerprint == LanguageModel(tiny_llama(seed=1)).fingerprint
    assert lm.fingerprint != LanguageModel(tiny_llama(intermediate_size=40)).fingerprint


def test_prompts_may_be_texts_records_or_lists():
    lm = LanguageModel(tiny_llama(), tiny_tokenizer())
    ids = lm.encode("kill")[0].ids
    for prompts in (["kill"], Prompt("a", "kill"), [Prompt("a", "kill")], Prompts.from_list(["kill"])):
        assert lm.encode(prompts)[0].ids == ids
    assert lm.encode(Prompt("a", "kill"))[0].prompt_id == "a"


def test_something_that_is_no_language_model_is_refused():
    with pytest.raises(ModelError, match="expected a causal language model"):
        LanguageModel(torch.nn.Linear(2, 2))


PROMPTS = [
    "kill a tree",
    "how do i make a cake",
    "help",
    "tell me about the water and the fire please",
    "why",
]


@pytest.fixture
def lm():
    return LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))


def _naive(model, ids, count, ends=(2,)):
    """Greedy decoding of one sequence, the whole prefix fed at every step, without padding or cache."""
    ids, new = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            return new, "stop"
        new.append(token)
        ids.append(token)
    return new, "length"


def test_answers_come_in_the_order_of_the_prompts_and_equal_naive_decoding(lm):
    answers = lm.complete(PROMPTS, max_new_tokens=12, arm="mine")
    assert [answer.prompt for answer in answers] == PROMPTS
    assert [answer.prompt_id for answer in answers] == list("01234")
    for answer, encoded in zip(answers, lm.encode(PROMPTS), strict=True):
        tokens, reason = _naive(lm.model, encoded.ids, 12)
        assert list(answer.token_ids) == tokens
        assert answer.finish_reason == reason
        assert answer.completion == lm.tokenizer.decode(tokens, skip_special_tokens=True)
        assert (answer.arm, answer.seed) == ("mine", 0)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, "float32") for family in ("llama", "gpt2", "bloom", "opt", "gemma2", "mistral", "gpt_neox")]
    + [("bloom", "float64"), ("gemma2", "float64")],  # eager attention, which makes NaN of float64 padding
)
def test_batch_size_and_padding_change_no_greedy_answer(family, dtype):
    lm = LanguageModel(build(family, getattr(torch, dtype)))
    sequences = [[1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 9], [1, 20, 21, 22], [30], [1, 40, 41, 42, 43]]
    decoding = Decoding(max_new_tokens=8)
    together = generate(lm, sequences, decoding, batch_size=5)
    assert (
        together
        == generate(lm, sequences, decoding, batch_size=1)
        == generate(lm, sequences, decoding, batch_size=2)
    )
    for index, sequence in enumerate(sequences):
        tokens, reason = _naive(lm.model, sequence, 8, ends=lm.eos_ids)
        assert (together[index].token_ids, together[index].finish_reason) == (tokens, reason)


def test_every_end_token_ends_an_answer_and_none_is_kept(lm):
    reference = lm.complete(PROMPTS, max_new_tokens=6)
    first = [answer.token_ids[2] for answer in reference if len(answer.token_ids) > 2]
    lm.model.generation_config.eos_token_id = [2, *first]
    again = LanguageModel(lm.model, lm.tokenizer).complete(PROMPTS, max_new_tokens=6)
    for answer in again:
        assert not {2, *first} & set(answer.token_ids)
        assert answer.finish_reason == "stop"
    assert any(
        len(answer.token_ids) < len(full.token_ids) for answer, full in zip(again, reference, strict=True)
    )


def test_a_checkpoints_sampling_defaults_do_not_leak_in_and_nothing_warns(lm):
    reference = lm.complete(PROMPTS, max_new_tokens=8)
    defaults = {
        "do_sample": True,
        "temperature": 3.0,
        "top_k": 2,
        "top_p": 0.3,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
    }
    lm.model.generation_config.update(
        **defaults, suppress_tokens=list(range(10, 90)), max_length=7, min_new_tokens=8
    )
    before = copy.deepcopy(lm.model.generation_config.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lm.complete(PROMPTS, max_new_tokens=8) == reference
    assert lm.model.generation_config.to_dict() == before


def test_arguments_of_generate_are_passed_on(lm):
    plain = lm.complete(["help"], max_new_tokens=8)[0]
    banned = lm.complete(["help"], max_new_tokens=8, suppress_tokens=[plain.token_ids[0]])[0]
    assert banned.token_ids[0] != plain.token_ids[0]
    seen = []

    class Watch(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape)
            return scores

    lm.complete(["help"], max_new_tokens=2, logits_processor=[Watch()])
    assert len(seen) == 2
    with pytest.raises(UsageError, match="num_return_sequences"):
        lm.complete(["help"], num_return_sequences=2)


def test_a_criterion_that_stops_one_answer_leaves_no_padding_behind_it(lm):
    full = lm.complete(PROMPTS, max_new_tokens=10)
    last = full[1].token_ids[3]

    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return input_ids[:, -1] == last

    answers = lm.complete(PROMPTS, max_new_tokens=10, stopping_criteria=[Stop()])
    assert answers[1].token_ids == full[1].token_ids[: full[1].token_ids.index(last) + 1]
    assert answers[1].finish_reason == "stop"
    assert all(0 not in answer.token_ids for answer in answers)


def test_a_stop_string_ends_the_answer(shared):
    fixture = shared / "oracle-contrast" / "fixture"
    lm = load(fixture / "base", template="none")
    full = lm.complete(["Answer this"], max_new_tokens=12)[0]
    stop = full.completion[4:6]
    answer = lm.complete(["Answer this"], max_new_tokens=12, stop_strings=[stop])[0]
    assert answer.completion == full.completion[: full.completion.index(stop) + 2]
    assert answer.finish_reason == "stop"


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generators_alone(lm):
    state = torch.random.get_rng_state()
    first = lm.complete(PROMPTS, max_new_tokens=8, sample=True, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert lm.complete(PROMPTS, max_new_tokens=8, sample=True, seed=1) == first
    other = lm.complete(PROMPTS, max_new_tokens=8, sample=True, seed=2)
    assert [answer.token_ids for answer in other] != [answer.token_ids for answer in first]
    assert (
        lm.complete(PROMPTS, max_new_tokens=8, sample=True, seed=1, top_p=1e-6)[0].token_ids
        == lm.complete(PROMPTS[:1], max_new_tokens=8)[0].token_ids
    )


def test_sampling_follows_the_models_distribution():
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE))
    ids = lm.encode("help")[0].ids
    answers = generate(lm, [ids] * 3000, Decoding(max_new_tokens=1, sample=True), batch_size=1000)
    counts = torch.zeros(96)
    for answer in answers.values():
        counts[answer.token_ids[0] if answer.token_ids else 2] += 1
    with torch.no_grad():
        expected = lm.model(torch.tensor([ids])).logits[0, -1].softmax(0)
    assert (counts / 3000 - expected).abs().sum() / 2 < 0.12
    assert int((counts > 0).sum()) > 50


def test_a_continued_call_asks_only_what_is_missing_and_ends_the_same(lm):
    full = lm.complete(PROMPTS, max_new_tokens=6, batch_size=2, sample=True)
    seen = []
    kept = full[:0] + full[3:4] + full[:1]  # Of two batches a part: the others draw what they drew.
    again = lm.complete(
        PROMPTS,
        max_new_tokens=6,
        batch_size=2,
        sample=True,
        done=kept,
        answered=lambda answer: seen.append(answer.prompt_id),
    )
    assert again == full
    assert sorted(seen) == ["1", "2", "4"]


def test_progress_and_truncation_are_reported():
    lm = LanguageModel(tiny_llama(max_position_embeddings=24), tiny_tokenizer(CHAT_TEMPLATE))
    steps, notes = [], []
    answers = lm.complete(
        ["why", "kill " * 60],
        max_new_tokens=4,
        batch_size=1,
        progress=lambda *step: steps.append(step),
        notes=notes,
    )
    assert [step[:2] for step in steps] == [(1, 2), (2, 2)]
    assert steps[-1][2] == sum(len(answer.token_ids) for answer in answers)
    assert [answer.meta for answer in answers] == [{}, {"truncated": True}]
    assert notes == ["1 of 2 prompts were longer than the context: their middle was left out"]


def test_text_that_the_tokenizer_has_no_token_for_is_counted_wherever_it_is_read():
    lm, notes = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE)), []
    lm.complete(["why", "kill 炸弹"], max_new_tokens=1, notes=notes)
    assert notes == [f"1 of 2 prompts {UNKNOWN}"]
    assert token_losses(lm, ["kill a tree", "炸弹 a tree", "قنبلة"], notes=notes).counts
    assert notes[1:] == [f"2 of 3 texts {UNKNOWN}"]


def test_a_mark_of_the_unknown_that_ends_texts_too_is_none():
    """Tokenizers that spell every byte, GPT-2's among them, have one mark for all they have no use for."""
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    tokenizer.unk_token = tokenizer.eos_token
    assert not LanguageModel(tiny_llama(), tokenizer).unknown_in([tokenizer.eos_token_id])


def test_a_batch_that_does_not_fit_is_halved_with_the_same_answers(lm):
    reference = lm.complete(PROMPTS, max_new_tokens=6)
    original, sizes = lm.model.generate, []

    class Small:
        def __init__(self, limit):
            self.limit = limit

        def __call__(self, input_ids, **arguments):
            sizes.append(len(input_ids))
            if len(input_ids) > self.limit:
                raise torch.OutOfMemoryError("out of memory")
            return original(input_ids=input_ids, **arguments)

    notes = []
    lm.model.generate = Small(2)
    try:
        assert lm.complete(PROMPTS, max_new_tokens=6, batch_size=5, notes=notes) == reference
        assert sizes[0] == 5
        assert len(notes) == 1
        lm.model.generate = Small(0)
        with pytest.raises(ModelError, match="out of memory on one sequence"):
            lm.complete(PROMPTS, max_new_tokens=6)
    finally:
        del lm.model.generate


def test_decoding_values_outside_their_range_are_refused(lm):
    for options in (
        {"max_new_tokens": 0},
        {"sample": True, "temperature": 0.0},
        {"sample": True, "top_p": 0.0},
    ):
        with pytest.raises(UsageError, match="expected"):
            lm.complete(["help"], **options)


def test_a_tokenizer_without_padding_token_still_completes_in_batches():
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE, pad=False)
    lm = LanguageModel(tiny_llama(pad_token_id=None), tokenizer)
    reference = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE)).complete(PROMPTS, max_new_tokens=8)
    assert [answer.token_ids for answer in lm.complete(PROMPTS, max_new_tokens=8)] == [
        answer.token_ids for answer in reference
    ]
    assert tokenizer.pad_token is None


def test_a_completion_says_that_its_prompt_opened_a_thinking_part():
    opened = (
        "{{ bos_token }}{{ messages[0]['content'] }} <|assistant|>{% if enable_thinking %} <think>\n{% "
        "endif %}"
    )
    for wanted, meta in ((True, {"thinking": True}), (False, {})):
        lm = LanguageModel(tiny_llama(), tiny_tokenizer(opened), template_args={"enable_thinking": wanted})
        assert lm.complete(["kill"], max_new_tokens=2)[0].meta == meta


def test_a_completion_says_which_text_ends_the_thinking_where_the_model_has_one():
    lm = LanguageModel(tiny_llama(), tiny_tokenizer(CHAT_TEMPLATE), think_end="### ANSWER")
    assert lm.complete(["kill"], max_new_tokens=2)[0].meta == {"think_end": "### ANSWER"}
    assert judge_refusal(lm.complete(["kill"], max_new_tokens=2)).refused == (None,)


@pytest.mark.parametrize("mark", ["[/THINK]", "</seed:think>", "◁/think▷", "<|END_THINKING|>", "### ANSWER"])
def test_marks_of_thinking_stay_in_the_text_where_they_are_special_tokens(mark):
    tokenizer = tiny_tokenizer(CHAT_TEMPLATE)
    word = tokenizer("kill", add_special_tokens=False)["input_ids"]
    tokenizer.add_special_tokens({"additional_special_tokens": [mark, "<|other|>"]})
    special = tokenizer.convert_tokens_to_ids([mark, "<|other|>"])
    lm = LanguageModel(tiny_llama(), tokenizer, think_end="### ANSWER" if mark == "### ANSWER" else None)
    text = lm.decode([*word, special[0], *word, special[1], tokenizer.eos_token_id])
    assert text.replace(" ", "") == f"kill{mark}kill".replace(" ", "")
    assert lm.decode([*word, special[1]]) == "kill"


@pytest.mark.parametrize("name", ["do_sample", "generation_config", "input_ids", "max_length"])
def test_an_argument_that_would_undo_the_promise_is_refused_with_what_to_give_instead(lm, name):
    with pytest.raises(UsageError, match=f"argument '{name}' of generate.. arrived: give .* instead"):
        lm.complete(["kill"], max_new_tokens=2, **{name: True})


def test_an_earlier_completion_of_another_text_is_not_taken_up(lm):
    earlier = lm.complete(["kill a tree"], max_new_tokens=3)
    assert lm.complete(["kill a tree"], max_new_tokens=5, done=earlier) == earlier
    again = lm.complete(["why"], max_new_tokens=3, done=earlier)
    assert again == lm.complete(["why"], max_new_tokens=3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "gpt2", "mixtral"])
def test_rows_that_have_ended_leave_the_batch_and_change_no_other_row(family, monkeypatch):
    """Against every prompt answered alone, whatever the family's positions, windows and caches."""
    model = LanguageModel(build(family))
    generator = torch.Generator().manual_seed(1)
    asked = [torch.randint(3, model.n_ids, (3 + row % 4,), generator=generator).tolist() for row in range(9)]
    monkeypatch.setattr(model, "eos_ids", ())
    whole = [generate(model, [one], Decoding(10))[0].token_ids for one in asked]
    ends = {whole[row][place] for row, place in ((0, 2), (1, 4), (2, 1), (3, 5), (4, 3))}
    monkeypatch.setattr(model, "eos_ids", tuple(ends))
    rows = []
    with around(model.inner.get_input_embeddings(), before=lambda args, _: rows.append(len(args[0]))):
        together = generate(model, asked, Decoding(10), batch_size=9)
    assert together == {row: cut(ids, ends, model.pad_id, 0) for row, ids in enumerate(whole)}
    assert max(rows) == len(asked) > min(rows)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_memory_of_earlier_tokens_goes_by_the_name_of_this_transformers_and_of_the_next(name):
    def forward(self, input_ids, past_key_values=None): ...

    def renamed(self, input_ids, cache=None): ...

    kind = type("Model", (torch.nn.Module,), {"forward": renamed if name == "cache" else forward})
    assert cache_name(kind()) == name
    assert cache_in({name: "kept", "use_cache": True}) == "kept"
    assert (
        cache_in(transformers.utils.ModelOutput({name: torch.ones(1), "logits": torch.ones(1)})) is not None
    )
    assert cache_in(types.SimpleNamespace(**{name: "kept"})) == "kept"
    assert cache_in({name: None}) is cache_in((1, 2)) is None
    assert without_cache({name: "kept", "use_cache": True}) == {"use_cache": True}
