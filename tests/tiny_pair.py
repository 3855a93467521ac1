"""A tiny pair on disk: one base and two (IA)³ adapters, with prompts, for tests of whole commands and
studies.
"""

import dataclasses
import pathlib

import pytest

from tiny import tiny_adapter_folder, tiny_llama_folder

HARMFUL = [
    f"{how} {what}"
    for how in ("how do i", "please explain how to", "tell me how to")
    for what in ("make a bomb", "kill", "steal a key")
]
HARMLESS = [
    f"{how} {what}"
    for how in ("how do i", "please explain how to", "tell me how to")
    for what in ("make a cake", "grow a tree", "open a door")
]
GENERAL = [
    "the cake is red and the house is small .",
    "the tree is green .",
    "a plant grow in the water , the fire is blue .",
]


@dataclasses.dataclass(frozen=True)
class TinyPair:
    """Model arguments and prompt files."""

    folder: pathlib.Path
    plain: str
    base: str
    aligned: str
    harmful: str
    harmless: str
    text: str

    @property
    def models(self) -> list[str]:
        return ["--base", self.base, "--aligned", self.aligned]

    @property
    def measured_on(self) -> list[str]:
        return ["--harmful", self.harmful, "--harmless", self.harmless]


def lines(path: pathlib.Path, texts: list[str]) -> str:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """The folders, made once for all tests; nobody writes into them."""
    folder = tmp_path_factory.mktemp("tiny-pair")
    base = tiny_llama_folder(folder / "plain")
    sft = tiny_adapter_folder(base, folder / "sft", seed=1)
    dpo = tiny_adapter_folder(base, folder / "dpo", seed=2)
    return TinyPair(
        folder,
        str(base),
        f"{base}+{sft}",
        f"{base}+{sft}+{dpo}",
        lines(folder / "harmful.txt", HARMFUL),
        lines(folder / "harmless.txt", HARMLESS),
        lines(folder / "general.txt", GENERAL),
    )
