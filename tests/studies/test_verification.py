"""verify: every number recomputed from the completions that were kept, controls and ceiling held to what they
are.
"""

import numpy as np
import pandas
import pytest

from conforming import misfits
from families import build
from safety_neurons.errors import ForeignModelError, NeuronError, UnsupportedModelError
from safety_neurons.judges import judge_refusal
from safety_neurons.model import LanguageModel, load_pair
from safety_neurons.neurons import NeuronSet, Provenance, Scores
from safety_neurons.prompt_lists import Prompts
from safety_neurons.results.measured import VerificationRecord
from safety_neurons.studies import (
    bench,
    compare,
    cross_patch,
    evaluate,
    helpfulness,
    progressive,
    transfer,
    verify_both,
    verify_deactivate,
    verify_patch,
    verify_scale,
)
from safety_neurons.studies.bench import Bench
from safety_neurons.studies.evaluation import Sources, requests_of
from safety_neurons.studies.guard_data import cases_of
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tiny_pair import GENERAL, HARMFUL, HARMLESS

OPTIONS = {"max_new_tokens": 6, "batch_size": 6}


@pytest.fixture(scope="module")
def pair(tiny_pair):
    return load_pair(tiny_pair.base, tiny_pair.aligned)


@pytest.fixture(scope="module")
def prompts():
    return Prompts.from_list(HARMFUL), Prompts.from_list(HARMLESS)


@pytest.fixture(scope="module")
def scores(pair):
    generator = np.random.default_rng(0)
    keys = [f"layers.{layer}.down" for layer in range(2)]
    table = pair.base.table
    return Scores({key: generator.normal(size=table[key].size) for key in keys}, table)


@pytest.fixture(scope="module")
def verified(pair, prompts, scores):
    return verify_patch(
        pair.base,
        pair.aligned,
        scores.top(0.3),
        *prompts,
        text=Prompts.from_list(GENERAL),
        random=3,
        **OPTIONS,
    )


def refusals(verification, arm):
    return [verdict.refused for verdict in judge_refusal(verification.bench.completions.arm(arm)).verdicts]


def test_rates_are_those_of_the_completions_that_were_kept(verified):
    names = {"untreated": verified.untreated, "aligned": verified.aligned, "ceiling": verified.ceiling}
    names["ceiling by parameters"] = verified.limits.parameters
    names |= {f"treated {verified.n_neurons}": verified.treated}
    names |= {f"random {number} of {verified.n_neurons}": arm for number, arm in enumerate(verified.random)}
    assert len(verified.bench.completions) == len(names) * (len(HARMFUL) + len(HARMLESS))
    for name, arm in names.items():
        for kind, rate in (("harmful", arm.harmful_refused), ("harmless", arm.harmless_refused)):
            told = refusals(verified, f"{name}/{kind}")
            scored = [verdict for verdict in told if verdict is not None]
            assert (rate.n, rate.unscored) == (len(scored), told.count(None))
            assert rate.value == (pytest.approx(sum(scored) / len(scored)) if scored else None)


def test_completions_of_arms_are_those_of_the_models_themselves(verified, pair, prompts):
    for name, model in (("untreated", pair.base), ("aligned", pair.aligned)):
        plain = model.complete(prompts[0], **OPTIONS)
        kept = verified.bench.completions.arm(f"{name}/harmful")
        assert [one.token_ids for one in kept] == [one.token_ids for one in plain]


def test_the_ceiling_of_adapters_on_down_is_the_aligned_model(verified):
    for kind in ("harmful", "harmless"):
        ceiling, aligned = (
            verified.bench.completions.arm(f"{name}/{kind}") for name in ("ceiling", "aligned")
        )
        assert [one.token_ids for one in ceiling] == [one.token_ids for one in aligned]
    assert verified.ceiling.perplexity == pytest.approx(verified.aligned.perplexity, rel=1e-4)


def with_verdicts(monkeypatch, told):
    """Replaces the judge: an arm's name -> its verdicts on harmful prompts."""
    real = bench.judge_refusal

    def judge(completions):
        found = real(completions)
        name, _, kind = completions[0].arm.rpartition("/")
        verdicts = (
            [v if v is None else bool(v) for v in told.get(name, told["else"])]
            if kind == "harmful"
            else [False] * len(HARMLESS)
        )
        changed = [
            type(old)(old.label, new, old.p_refusal, old.why)
            for old, new in zip(found.verdicts, verdicts, strict=True)
        ]
        return type(found)(found.judge, tuple(changed), found.rate, found.completions)

    monkeypatch.setattr(bench, "judge_refusal", judge)


@pytest.mark.parametrize("sizes", [(0.05, 0.1, 0.2), (0.05, 0.1, 0.2, 0.3, 0.5)])
def test_all_differences_of_a_sweep_are_one_family(pair, prompts, scores, sizes):
    """Two for every size and that of harm: seven are not corrected, eleven are."""
    found = verify_deactivate(pair.aligned, scores, *prompts, sizes=sizes, random=3, **OPTIONS)
    told = [one for point in found.points for one in (point.change, point.against_random)]
    told.append(found.harm_change)
    assert found.change == found.points[-1].change
    assert all(one.p is not None for one in told)
    by_hand, largest = {}, 0.0
    for rank, p in enumerate(sorted(one.p for one in told)):
        largest = max(largest, min(1.0, p * (len(told) - rank)))
        by_hand.setdefault(p, largest)
    assert [one.p_holm for one in told] == [by_hand[one.p] if len(sizes) > 3 else None for one in told]


def test_the_causal_effect_is_the_share_of_the_gap_over_prompts_scored_everywhere(
    pair, prompts, scores, monkeypatch
):
    told = {
        "untreated": [0, 0, 0, 1, 0, 0, 0, 0, None],
        "aligned": [1, 1, 1, 1, 1, 1, 0, 1, 1],
        "treated 29": [1, 0, 1, None, 1, 0, 0, 1, 1],
        "ceiling": [1, 1, 1, 1, 1, 1, 0, 1, 1],
        "else": [0, 0, 0, 1, 0, 0, 1, 0, 0],
    }
    with_verdicts(monkeypatch, told)
    found = verify_patch(pair.base, pair.aligned, scores, *prompts, sizes=[0.3], random=2, **OPTIONS)
    effect = found.causal_effect
    assert (effect.n, effect.unscored) == (7, 2)
    assert effect.value == pytest.approx((4 / 7) / (6 / 7))
    assert effect.low < effect.value < effect.high
    assert found.ceiling_effect.low < found.ceiling_effect.value == 1 < found.ceiling_effect.high
    assert found.change.value == pytest.approx(4 / 7)
    pairs = [(1, 0), (0, 0), (1, 0), (1, 0), (0, 0), (0, 1), (1, 0), (1, 0)]
    assert found.change_against_random.value == pytest.approx(sum(a - b for a, b in pairs) / 8)
    assert not found.change_against_random.clear
    assert "2 random sets" in found.record()["change_against_random"]["why"]
    assert found.points[0].random_effects[0].value == pytest.approx((2 / 8 - 1 / 8) / (7 / 8 - 1 / 8))


def test_the_effect_is_undefined_where_base_and_aligned_do_not_differ(pair, prompts, scores):
    found = verify_patch(pair.base, pair.base, scores, *prompts, sizes=[0.1], random=0, **OPTIONS)
    assert found.causal_effect.value is None
    assert "includes 0" in found.causal_effect.why
    assert found.change.value == 0
    assert found.change_against_random is None
    told = found.bench.completions
    assert [one.token_ids for one in told.arm("treated 10/harmful")] == [
        one.token_ids for one in told.arm("untreated/harmful")
    ]


def test_random_sets_have_the_same_counts_and_share_no_member(pair, prompts, scores, monkeypatch):
    from safety_neurons.studies import verification

    seen = []
    real = verification.patched
    monkeypatch.setattr(
        verification,
        "patched",
        lambda base, aligned, members: (
            seen.extend(getattr(members, "sets", [members])),
            real(base, aligned, members),
        )[1],
    )
    verify_patch(pair.base, pair.aligned, scores, *prompts, sizes=[0.2], random=3, seed=5, **OPTIONS)
    sets = list(dict.fromkeys(seen))
    chosen, controls, everything = sets[0], sets[1:4], sets[4]
    assert chosen == scores.top(0.2)
    assert len({*controls}) == 3
    for control in controls:
        assert control.counts() == chosen.counts()
        assert len(control & chosen) == 0
    assert everything == NeuronSet.all(pair.base.table).only(sites=["down"])


def test_a_set_of_more_than_half_a_matrix_says_that_its_controls_overlap(pair, prompts, scores):
    found = verify_deactivate(pair.aligned, scores, *prompts, sizes=[0.9], random=1, **OPTIONS)
    assert any("share members" in note for note in found.notes)


def test_overlap_with_the_prompts_a_set_was_found_on_is_counted(pair, prompts, scores):
    digests = Prompts.from_list([*HARMFUL[:4], *HARMLESS[:1]]).digests
    marked = NeuronSet(
        dict(scores.top(0.1).items()),
        pair.base.table,
        Provenance("neurons", config={"prompt_digests": digests}),
    )
    found = verify_deactivate(pair.aligned, marked, *prompts, random=0, **OPTIONS)
    assert found.overlap == {"harmful": 4, "harmless": 1}


def test_deactivating_everything_at_down_silences_the_layers(pair, prompts, scores):
    found = verify_deactivate(pair.aligned, scores, *prompts, sizes=[1.0], random=0, **OPTIONS)
    assert found.kind == "deactivate"
    assert found.aligned is None
    treated, ceiling = (found.bench.completions.arm(f"{name}/harmful") for name in ("treated 96", "ceiling"))
    assert [one.token_ids for one in treated] == [one.token_ids for one in ceiling]
    assert found.treated.divergence == pytest.approx(found.ceiling.divergence)


def test_routed_experts_are_left_out_of_the_ceiling_of_a_patch_and_that_is_said(prompts):
    model = LanguageModel(build("mixtral"), tiny_tokenizer(CHAT_TEMPLATE), name="experts")
    shared = LanguageModel(build("mixtral", seed=1), tiny_tokenizer(CHAT_TEMPLATE), name="other")
    chosen = NeuronSet({"layers.0.o": [1, 2], "layers.1.v": [3]}, model.table)
    few = prompts[0][:2], prompts[1][:2]
    found = verify_patch(model, shared, chosen, *few, random=1, **OPTIONS)
    assert not any("experts" in note for note in found.notes)
    dense = LanguageModel(build("qwen3_moe"), tiny_tokenizer(CHAT_TEMPLATE), name="experts in one layer")
    chosen = NeuronSet({"layers.0.down": [1, 2]}, dense.table)
    found = verify_patch(dense, dense, chosen, *few, random=1, **OPTIONS)
    assert any("routed experts" in note for note in found.notes)


@pytest.mark.parametrize(
    "given",
    [
        list,
        lambda texts: [{"goal": text} for text in texts],
        lambda texts: [[{"role": "user", "content": text}] for text in texts],
        pandas.DataFrame,
        lambda texts: (text for text in texts),
    ],
    ids=["texts", "records", "conversations", "table", "generator"],
)
def test_studies_take_requests_as_finders_do(pair, scores, monkeypatch, given):
    """Every public study of a pair or a model: whatever form requests come in, its bench has the same
    ones.
    """

    class Reached(Exception):  # noqa: N818 - the end of what is tested
        pass

    def reached(bench):
        raise Reached(bench.harmful.texts, bench.harmless.texts)

    monkeypatch.setattr(Bench, "__post_init__", reached)

    def asked(texts=HARMFUL):
        return given({"prompt": texts} if given is pandas.DataFrame else texts)

    members = scores.top(0.3)
    find = {"find_prompts": asked(), "methods": ["contrast"], "random": 0}
    models = {"a": pair.base, "b": pair.aligned}
    for study in (
        lambda: verify_deactivate(pair.aligned, members, asked(), asked(HARMLESS), text=asked()),
        lambda: verify_patch(pair.base, pair.aligned, members, asked(), asked(HARMLESS)),
        lambda: compare(pair.base, pair.aligned, asked(), asked(HARMLESS), **find),
        lambda: progressive(pair.aligned, members, asked(), asked(HARMLESS)),
        lambda: cross_patch(models, members, asked(), asked(HARMLESS), measure=helpfulness("answered")),
    ):
        with pytest.raises(Reached) as found:
            study()
        assert found.value.args == (HARMFUL, HARMLESS)
    (harmful, harmless) = requests_of([asked()], Sources(over_refusal=asked(HARMLESS))).requests
    assert (harmful.prompts.texts, harmless.prompts.texts) == (HARMFUL, HARMLESS)
    cases = cases_of(asked(), asked(HARMLESS))
    assert [case.prompt.text for case in cases.items] == [*HARMFUL, *HARMLESS]


def test_an_empty_set_and_one_of_another_model_are_refused(pair, prompts, scores):
    with pytest.raises(NeuronError, match="empty"):
        verify_deactivate(pair.aligned, NeuronSet({}, pair.base.table), *prompts, **OPTIONS)
    other = NeuronSet({"layers.0.down": [1]}, None, Provenance("neurons", model_fingerprint="0" * 64))
    with pytest.raises(ForeignModelError):
        verify_patch(pair.base, pair.aligned, other, *prompts, **OPTIONS)


def test_the_record_is_json_values_with_the_keys_of_the_design(verified):
    record = verified.record()
    assert misfits(record, VerificationRecord) == []
    assert record.keys() >= {"untreated", "treated", "random", "ceiling", "causal_effect"}
    assert record["treated"].keys() >= {"harmful_refused", "harmless_refused", "perplexity"}
    assert record["causal_effect"].keys() >= {"value", "low", "high", "measure", "why"}
    assert record["causal_effect"]["measure"] == "refused"


def refused_by(study, model, neurons, prompts, folder):
    """Runs one study of a set that it cannot treat."""
    how = {**OPTIONS, "random": 1, "completions_file": folder / "completions.jsonl"}
    if study == "evaluate":
        evaluate(model, "builtin:harmful-test", patch=neurons, donor=model, out=folder)
    elif study == "cross_patch":
        models = {"safety": model, "helpful": model}
        cross_patch(models, neurons, *prompts, measure=helpfulness("answered"), **how)
    elif study == "transfer":
        transfer(model, model, {"a": neurons}, {"a": prompts[0]}, prompts[1], **how)
    else:
        {"patch": verify_patch, "both": verify_both}[study](model, model, neurons, *prompts, **how)


@pytest.mark.parametrize("study", ["patch", "both", "transfer", "cross_patch", "evaluate"])
def test_a_set_that_cannot_be_patched_is_refused_before_anything_is_written(study, prompts, tmp_path):
    model = LanguageModel(build("mixtral"), tiny_tokenizer(CHAT_TEMPLATE))
    neurons = NeuronSet({"layers.0.experts.1.down": [0, 1], "layers.0.o": [3]}, model.table)
    with pytest.raises(UnsupportedModelError, match="leave out the 1 expert keys"):
        refused_by(study, model, neurons, prompts, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_set_that_cannot_be_switched_off_is_refused_before_either_side_is_written(
    pair, scores, prompts, tmp_path, monkeypatch
):
    def kept_on(*_):
        raise UnsupportedModelError("these stay on")

    monkeypatch.setattr("safety_neurons.studies.verification.deactivated", kept_on)
    how = {**OPTIONS, "completions_file": tmp_path / "completions.jsonl"}
    with pytest.raises(UnsupportedModelError, match="these stay on"):
        verify_both(pair.base, pair.aligned, scores, *prompts, sizes=(0.01,), **how)
    assert not list(tmp_path.iterdir())


def test_a_scaling_that_fails_is_refused_before_anything_is_written(pair, prompts, tmp_path, monkeypatch):
    def unread(*_, **__):
        raise UnsupportedModelError("this guard reads nothing")

    monkeypatch.setattr("safety_neurons.studies.scaling.scaled", unread)
    neurons = NeuronSet({"layers.0.down": [1]}, pair.base.table)
    with pytest.raises(UnsupportedModelError, match="reads nothing"):
        verify_scale(pair.base, neurons, *prompts, completions_file=tmp_path / "completions.jsonl")
    assert not list(tmp_path.iterdir())
