"""Sets and scores from files: names, selections, tables, and what does not belong together."""

import pytest
from analysed_sets import random_scores, random_set, small_table

from safety_neurons.analysis import name_sets, read_named
from safety_neurons.errors import ForeignModelError, NeuronError, UsageError
from safety_neurons.neurons import NeuronSet

TABLE = small_table()


@pytest.fixture
def runs(tmp_path):
    scores = random_scores(TABLE, 1)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        scores.count(9).save(tmp_path / name / "neurons.safetensors")
        scores.save(tmp_path / name / "scores.safetensors")
    return tmp_path


def test_a_find_run_brings_set_and_scores_and_its_folder_is_its_name(runs):
    items = read_named([str(runs / "first"), f"other={runs / 'second'}", str(runs / "second" / "neurons.safetensors")])
    assert [item.name for item in items] == ["first", "other", "second"]
    assert [len(item.neurons) for item in items] == [9, 9, 9]
    assert [item.scores is None for item in items] == [False, False, True]


def test_runs_of_one_name_are_called_by_their_paths(runs):
    items = read_named([str(runs / "first"), str(runs / "first" / "scores.safetensors")], count=3)
    assert [item.name for item in items] == [str(runs / "first"), str(runs / "first" / "scores.safetensors")]


def test_scores_give_sets_of_any_size(runs):
    (item,) = read_named([str(runs / "first" / "scores.safetensors")], count=4)
    assert len(item.neurons) == 4
    assert item.neurons == random_scores(TABLE, 1).count(4)
    (item,) = read_named([str(runs / "first")], top=0.1)
    assert len(item.neurons) == round(0.1 * TABLE.n_neurons)
    with pytest.raises(UsageError, match="top or count"):
        read_named([str(runs / "first" / "scores.safetensors")])


def test_what_does_not_belong_together_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="called 'a'"):
        name_sets([("a", random_set(TABLE, 0.1, 1)), ("a", random_set(TABLE, 0.1, 2))])
    with pytest.raises(ForeignModelError, match="one architecture"):
        name_sets([("a", random_set(TABLE, 0.1, 1)), ("b", random_set(small_table(2), 0.1, 2))])
    with pytest.raises(NeuronError, match="no file or folder"):
        read_named([str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="both|together"):
        read_named([str(runs / "first")], top=0.1, count=3)
    with pytest.raises(UsageError, match="at least one"):
        read_named([])
    (tmp_path / "text.safetensors").write_text("not a file of neurons")
    with pytest.raises(NeuronError, match="cannot read"):
        read_named([str(tmp_path / "text.safetensors")])


def test_sets_that_are_looked_at_one_by_one_may_be_of_any_architecture(runs):
    random_set(small_table(2), 0.1, 2).save(runs / "shallow.safetensors")
    specs = [str(runs / "first"), str(runs / "shallow.safetensors")]
    with pytest.raises(ForeignModelError):
        read_named(specs)
    assert [item.table.n_layers for item in read_named(specs, together=False)] == [3, 2]


def test_a_set_made_by_hand_is_put_on_the_table_of_the_others():
    by_hand = NeuronSet({"layers.0.down": [1]})
    items = name_sets([("hand", by_hand), ("found", random_set(TABLE, 0.1, 1))])
    assert items[0].table.fingerprint == TABLE.fingerprint
    with pytest.raises(NeuronError, match="no set knows"):
        name_sets([("hand", by_hand)])
    with pytest.raises(NeuronError, match="out of range"):
        name_sets([("hand", NeuronSet({"layers.0.down": [99]})), ("found", random_set(TABLE, 0.1, 1))])
