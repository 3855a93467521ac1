import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuron_strategies import TABLE, table, values
from safetensors.numpy import save_file
from scipy.stats import spearmanr

from safety_neurons.errors import ForeignModelError, NeuronError, NumericalError, UsageError
from safety_neurons.neurons import HandMadeWarning, Provenance, Scores, Selection, Votes, sort_keys


@given(values(), values())
def test_rank_correlation_is_spearmans_with_mean_ranks(first, second):
    a, b = Scores(first, TABLE), Scores(second, TABLE)
    flat = [np.concatenate([scores[key] for key in scores]) for scores in (a, b)]
    if min(np.ptp(one) for one in flat) == 0:
        assert np.isnan(a.rank_correlation(b))
    else:
        assert a.rank_correlation(b) == pytest.approx(spearmanr(*flat).statistic)


def test_rank_correlation_looks_at_shared_keys_only():
    a = Scores({"layers.0.q": np.arange(8.0), "layers.0.k": np.arange(4.0)})
    b = Scores({"layers.0.q": np.arange(8.0) ** 3})
    assert a.rank_correlation(b) == pytest.approx(1.0)
    with pytest.raises(NeuronError, match="no key in common"):
        b.rank_correlation(Scores({"layers.0.k": np.arange(4.0)}))
    with pytest.raises(NeuronError, match="one architecture"):
        b.rank_correlation(Scores({"layers.0.q": np.arange(3.0)}))


@given(values())
def test_saving_and_loading_gives_the_same_scores_and_the_same_sets(tmp_path_factory, chosen):
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    noisy = {
        key: value + np.linspace(0, 1e-9, len(value)) for key, value in chosen.items()
    }  # Differs below float32 only.
    scores = Scores(noisy, TABLE)
    scores.save(path)
    loaded = Scores.load(path, TABLE)
    assert loaded == scores
    assert loaded["layers.0.q"].dtype == np.float32
    assert loaded.top(0.3) == scores.top(0.3)
    assert loaded.threshold(0.0) == scores.threshold(0.0)


def test_scores_cannot_be_changed_and_leave_the_callers_array_alone():
    mine = np.arange(8, dtype=np.float32)
    scores = Scores({"layers.0.q": mine})
    mine[0] = 99
    assert scores["layers.0.q"][0] == 0
    with pytest.raises(ValueError, match="read-only"):
        scores["layers.0.q"][0] = 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_score_that_is_no_number_is_refused_with_its_place(bad):
    with pytest.raises(NumericalError, match=r"1 of 2 scores of 'layers\.0\.k'"):
        Scores({"layers.0.k": [0.0, bad]})


def test_a_vector_of_another_length_than_the_matrix_is_refused():
    with pytest.raises(NeuronError, match="3 scores"):
        Scores({"layers.0.q": [1.0, 2.0, 3.0]}, TABLE)


def test_restricting_keeps_the_named_sites_and_layers():
    scores = Scores({key: np.zeros(size) for key, size in TABLE.sizes.items()}, TABLE)
    assert scores.restrict(["down"], "1:").keys() == ["layers.1.down"]
    assert len(scores.restrict(["down"], "1:").top(0.5)) == 3
    with pytest.raises(NeuronError, match="no score is left"):
        scores.restrict(["down"]).restrict(["q"])


def test_agreement_cannot_be_asked_of_means():
    with pytest.raises(UsageError, match="every prompt"):
        Scores({"layers.0.q": [1.0]}).select(Selection(top=0.5, agreement=1.0))


def test_a_set_carries_the_provenance_of_its_scores_and_the_selection():
    made = Provenance("scores", "contrast", ("b", "a"), TABLE.fingerprint, "ff", {"positions": "completion"})
    found = Scores({"layers.0.down": np.arange(6.0)}, TABLE, made).top(0.5)
    assert found.provenance.kind == "neurons"
    assert found.provenance.method == "contrast"
    assert found.provenance.config == {
        "positions": "completion",
        "selection": {"top": 0.5},
        "sites": ["down"],
        "layers": [0],
    }


def test_foreign_hand_made_and_mistaken_files_are_told_apart(tmp_path):
    Scores({"layers.0.q": np.arange(8.0)}, TABLE).save(tmp_path / "s.safetensors")
    with pytest.raises(ForeignModelError):
        Scores.load(tmp_path / "s.safetensors", table(heads=6))
    Scores({"layers.0.q": np.arange(8.0)}, TABLE).top(0.5).save(tmp_path / "n.safetensors")
    with pytest.raises(NeuronError, match="expected 'scores'"):
        Scores.load(tmp_path / "n.safetensors")
    save_file({"layers.0.q": np.arange(8.0)}, tmp_path / "hand.safetensors")
    with pytest.warns(HandMadeWarning):
        assert len(Scores.load(tmp_path / "hand.safetensors", TABLE)) == 8
    save_file({"layers.0.q": np.arange(9.0)}, tmp_path / "hand.safetensors")
    with pytest.raises(NeuronError, match="9 scores for .*, expected 8"):
        Scores.load(tmp_path / "hand.safetensors", TABLE)


def test_scores_are_shown_in_one_line_and_in_a_table():
    scores = Scores({"layers.0.q": np.arange(8.0)}, TABLE)
    assert repr(scores) == "Scores(8 neurons in 1 layer: q 8)"
    assert '<th scope="row"><bdi>q</bdi></th>' in scores._repr_html_()


def naive_largest(chosen, count):
    """The first `count` of all neurons sorted by score downwards, ties by layer, site, index."""
    ordered = [
        (-value, position, index)
        for position, key in enumerate(sort_keys(chosen))
        for index, value in enumerate(chosen[key])
    ]
    keys = sort_keys(chosen)
    return {(keys[position], index) for _, position, index in sorted(ordered)[:count]}


@given(values(), st.floats(0, 1))
def test_top_takes_exactly_the_rounded_share_and_breaks_ties_in_order(chosen, fraction):
    wanted = max(round(fraction * TABLE.n_neurons), 1 if fraction > 0 else 0)
    found = Scores(chosen, TABLE).top(fraction)
    assert len(found) == wanted
    assert set(found) == naive_largest(chosen, wanted)


@given(values(), st.integers(0, TABLE.n_neurons))
def test_count_takes_exactly_that_many_and_smaller_counts_are_subsets(chosen, count):
    scores = Scores(chosen, TABLE)
    assert set(scores.count(count)) == naive_largest(chosen, count)
    assert set(scores.count(count // 2)) <= set(scores.count(count))


@given(values(), st.integers(0, 10))
def test_top_per_matrix_takes_that_many_of_each(chosen, k):
    found = Scores(chosen, TABLE).top_per_matrix(k)
    for key, size in TABLE.sizes.items():
        assert {(key, index) for index in found[key].tolist()} == naive_largest(
            {key: chosen[key]}, min(k, size)
        )


@given(values(), st.floats(-2, 5, width=32))
def test_threshold_takes_all_that_are_at_least_as_large(chosen, eps):
    found = Scores(chosen, TABLE).threshold(eps)
    assert set(found) == {
        (key, index) for key, value in chosen.items() for index in range(len(value)) if value[index] >= eps
    }


def test_a_threshold_equal_to_a_score_takes_it_whatever_float32_makes_of_it():
    assert len(Scores({"layers.0.q": [0.7]}).threshold(0.7)) == 1


def test_the_order_of_keys_given_does_not_matter():
    chosen = {"layers.1.q": np.zeros(3), "layers.0.down": np.zeros(3), "layers.0.q": np.zeros(3)}
    assert set(Scores(chosen).count(4)) == {
        ("layers.0.q", 0),
        ("layers.0.q", 1),
        ("layers.0.q", 2),
        ("layers.0.down", 0),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top": 0.1, "count": 3},
        {"top": 5},
        {"top": -0.1},
        {"count": -1},
        {"threshold": float("nan")},
        {"top": 0.1, "agreement": 0.0},
        {"top": 0.1, "agreement": 2.0},
    ],
)
def test_contradicting_or_impossible_options_are_a_usage_error(options):
    with pytest.raises(UsageError, match="expected"):
        Selection(**options)


def test_more_neurons_than_there_are_is_a_usage_error():
    with pytest.raises(UsageError, match="4 neurons asked, but 3"):
        Selection(count=4).choose({"layers.0.q": np.zeros(3)})


def test_nan_is_an_error_that_names_the_key():
    with pytest.raises(NumericalError, match=r"layers\.0\.q"):
        Selection(top=0.5).choose({"layers.0.q": np.array([0.0, np.nan])})


def test_the_default_stands_in_only_when_nothing_is_given():
    assert Selection.of(default_top=0.05) == Selection(top=0.05)
    assert Selection.of(count=3, agreement=1.0, default_top=0.05).config() == {"count": 3, "agreement": 1.0}


@given(
    st.lists(values(), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.25, 0.5, 2 / 3, 1.0]),
    st.integers(1, 30),
)
def test_streamed_votes_equal_votes_counted_from_what_was_stored(per_prompt, share, count):
    rule, votes, stored = Selection(count=count), Votes(TABLE.sizes), []
    for number, chosen in enumerate(per_prompt):
        if number == len(per_prompt) // 2:  # As after a kill: everything goes on from the state.
            state, votes = votes.state(), Votes(TABLE.sizes)
            votes.restore(state)
        stored.append(rule.choose(chosen))
        votes.add(stored[-1])
    expected = {
        key: np.flatnonzero(np.mean([one[key] for one in stored], axis=0) >= share - 1e-9)
        for key in TABLE.keys
    }
    members = votes.members(share)
    assert {key: indices.tolist() for key, indices in members.items()} == {
        key: indices.tolist() for key, indices in expected.items() if len(indices)
    }
    assert votes.n_prompts == len(per_prompt)
    highest = votes.agreement_for_one()
    assert votes.members(highest)
    assert highest == 1.0 or not votes.members(min(1.0, highest + 1e-6))


def test_votes_without_prompts_and_votes_that_do_not_fit_are_errors():
    votes = Votes({"layers.0.q": 3})
    with pytest.raises(NeuronError, match="no prompt"):
        votes.members(0.5)
    with pytest.raises(NeuronError, match="announced"):
        votes.add({"layers.0.q": np.zeros(4, bool)})
    with pytest.raises(NeuronError, match="announced"):
        votes.add({"layers.0.k": np.zeros(3, bool)})
    assert votes.n_prompts == 0
    with pytest.raises(NeuronError, match="start anew"):
        votes.restore(Votes({"layers.0.q": 4}).state())


def test_a_prompt_of_which_a_key_read_nothing_says_nothing_of_it():
    votes = Votes({"layers.0.q": 2, "layers.0.experts.0.up": 2, "layers.0.experts.1.up": 2})
    votes.add({"layers.0.q": np.array([True, False])})
    votes.add({"layers.0.q": np.array([True, False]), "layers.0.experts.0.up": np.array([False, True])})
    assert {key: indices.tolist() for key, indices in votes.members(1.0).items()} == {
        "layers.0.q": [0],
        "layers.0.experts.0.up": [1],
    }
    assert votes.agreement_for_one() == 1.0
    again = Votes({"layers.0.q": 2, "layers.0.experts.0.up": 2, "layers.0.experts.1.up": 2})
    again.restore(votes.state())
    assert again.members(1.0).keys() == votes.members(1.0).keys()


RULES = [
    Selection(top=1.0),
    Selection(top=0.5),
    Selection(count=5),
    Selection(top_per_matrix=2),
    Selection(threshold=0.5),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.config()))
def test_an_expert_without_a_token_gets_no_vote_and_no_neuron_of_score_zero_gets_one(rule):
    sizes = {"layers.0.experts.0.up": 4, "layers.0.experts.1.up": 4, "layers.0.up": 4}
    votes = Votes(sizes)
    for number in range(20):
        scores = {
            "layers.0.experts.1.up": np.array([0.0, 0.0, 0.0, 2.0]),
            "layers.0.up": np.array([0.0, 1.0, 0.0, 3.0]),
        }
        if number:
            del scores["layers.0.experts.1.up"]  # only the first prompt is routed to it
        votes.cast(rule, scores | ({"layers.0.experts.0.up": np.zeros(4)} if number % 2 else {}))
    members = {key: indices.tolist() for key, indices in votes.members(1.0).items()}
    assert members["layers.0.experts.1.up"] == [3]
    assert set(members) == {"layers.0.experts.1.up", "layers.0.up"}
    assert set(members["layers.0.up"]) <= {1, 3}
    assert any("layers.0.experts.1.up, 1" in note for note in votes.said_of(members.keys()))


@pytest.mark.parametrize("rule", [*RULES[:4], Selection(threshold=0.0)], ids=lambda rule: str(rule.config()))
def test_chosen_neurons_of_score_zero_are_counted_aloud(rule):
    scores = Scores({"layers.0.experts.0.up": np.zeros(4), "layers.0.up": np.array([0.0, 0.0, 0.0, 3.0])})
    chosen = scores.select(rule)
    zeros = sum(float(scores[key][index]) == 0 for key, indices in chosen.items() for index in indices)
    assert zeros > 0
    assert len(chosen.notes) == 1
    assert chosen.notes[0].startswith(
        f"{zeros} of the {len(chosen)} chosen neurons have a score of exactly 0"
    )
    assert scores.select(Selection(count=1)).notes == ()
