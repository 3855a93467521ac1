"""Writing models as ordinary Hugging Face folders, without a word on the terminal."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaForCausalLM
from transformers.utils import logging

from safety_neurons.organism.tokenizer import make_tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The library without progress bars for a block, as it was afterwards."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def save_model(model: LlamaForCausalLM, folder: Path, *, chat: bool = True) -> None:
    """Write config, generation config, safetensors and tokenizer."""
    with quiet():
        model.save_pretrained(str(folder))
        make_tokenizer(chat=chat).save_pretrained(str(folder))
