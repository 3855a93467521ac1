import numpy as np
import pytest
from hypothesis import given
from neuron_strategies import TABLE, table, values
from safetensors.numpy import save_file
from scipy.stats import spearmanr

from safety_neurons.errors import ForeignModelError, NeuronError, NumericalError, UsageError
from safety_neurons.neurons import HandMadeWarning, Provenance, Scores, Selection


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
    noisy = {key: value + np.linspace(0, 1e-9, len(value)) for key, value in chosen.items()}  # Differs below float32 only.
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
    assert found.provenance.config == {"positions": "completion", "selection": {"top": 0.5}, "sites": ["down"], "layers": [0]}


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
    with pytest.raises(NeuronError, match="out of range"):
        Scores.load(tmp_path / "hand.safetensors", TABLE)


def test_scores_are_shown_in_one_line_and_in_a_table():
    scores = Scores({"layers.0.q": np.arange(8.0)}, TABLE)
    assert repr(scores) == "Scores(8 neurons in 1 layer: q 8)"
    assert '<th scope="row"><bdi>q</bdi></th>' in scores._repr_html_()
