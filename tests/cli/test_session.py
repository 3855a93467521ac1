"""What a session says of the prompts that an option names."""

import pytest

from safety_neurons.cli.session import Common, Requested, Session


@pytest.mark.parametrize(
    ("harmful", "harmless", "notes"),
    [
        ("safe", "unsafe", ["1 of 2 prompts is safe", "1 of 2 prompts is unsafe"]),
        ("unsafe", "safe", []),
    ],
)
def test_an_option_says_which_of_its_prompts_their_file_calls_the_other_kind(
    tmp_path, harmful, harmless, notes
):
    paths = {}
    for name, label in (("harmful", harmful), ("harmless", harmless)):
        paths[name] = tmp_path / f"{name}.csv"
        own = {"harmful": "unsafe", "harmless": "safe"}[name]
        paths[name].write_text(f"prompt,label\n{name} a,{own}\n{name} b,{label}\n", encoding="utf-8")
    options = Requested(harmful=str(paths["harmful"]), harmless=str(paths["harmless"]))
    session = Session("verify", Common(), [options])
    for name in ("harmful", "harmless"):
        assert len(session.read(name, None)) == 2
    said = [note.partition(": ")[2].partition(" by the column 'label'")[0] for note in session.notes]
    assert said == notes
