r"""The public code of paper 2 as an arm of peers.py, in a process of its own.

It needs transformers 4.39 and TransformerLens 1, which no environment has beside what this package needs:

    pip install torch==2.13.0
    pip install transformers==4.39.3 "numpy<2" "pandas<2.3" "pyarrow<18" "datasets<3" "typeguard<3" \
        accelerate==0.29.1 jaxtyping einops fancy_einsum better_abc rich matplotlib ipython wandb
    pip install --no-deps transformer-lens==1.11.0
    git clone https://github.com/THU-KEG/SafetyNeuron CHECKOUT         # measured at 46a5311

Both ends are in this file: `Paper2` starts the process and asks it for a turn, `serve` answers. Weights
travel as checkpoints, everything else as tensors in a file.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Clock = Callable[[], float]


class Paper2:
    """The process, from this end."""

    def __init__(self, process: subprocess.Popen[str], folder: pathlib.Path) -> None:
        self.process, self.folder = process, folder

    @classmethod
    @contextlib.contextmanager
    def started(
        cls,
        where: Sequence[str],
        folder: pathlib.Path,
        pair: Sequence[Any],
        chosen: Sequence[torch.Tensor],
        ids: torch.Tensor,
        new: int,
    ) -> Iterator["Paper2"]:
        """The process while a block lasts.

        Args:
            where: its interpreter, and the checkout.
            folder: for the checkpoints.
            pair: the base and the aligned model.
            chosen: down neurons of every layer.
            ids: of the prompts.
            new: tokens to write.
        """
        for name, one in zip(("base", "aligned"), pair, strict=True):
            one.model.save_pretrained(folder / name)
            # transformers 4.39 looks for the rotary embedding's base where version 5 no longer writes it.
            config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
            config.update(config.pop("rope_parameters"))
            (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        index = torch.cat(
            [torch.stack([torch.full_like(each, layer), each], 1) for layer, each in enumerate(chosen)]
        )
        save_file({"index": index, "ids": ids}, folder / "work.safetensors")
        words = [where[0], __file__, where[1], str(folder), str(new)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield cls(process, folder)
            finally:
                process.kill()

    def beside(self, clock: Clock) -> Clock:
        """A clock that counts what the process works, where the clock counts work."""
        if clock is not time.process_time:
            return clock
        # The number by which Linux and macOS know the processor time of another process.
        theirs = ~self.process.pid << 3 | 2
        return lambda: clock() + time.clock_gettime(theirs)

    def ask(self, what: str) -> torch.Tensor:
        """Token ids of plain or patched answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ids "):
                return torch.tensor(json.loads(line[4:]))
        raise RuntimeError("the public code ended before it answered, expected token ids; its error is above")


def serve(checkout: str, folder: pathlib.Path, new: int) -> None:
    """Answer what is asked on standard input."""
    sys.path.insert(0, checkout)
    from src.models.HookedLlama import HookedLlamaForCausalLM

    torch.set_num_threads(1)
    work = load_file(folder / "work.safetensors")
    models = []
    for name in ("base", "aligned"):
        model = HookedLlamaForCausalLM.from_pretrained(folder / name, torch_dtype=torch.float32).eval()
        model.setup()
        models.append(model)

    def overwrite(value: torch.Tensor, hook: Any, neurons: Any, patched_values: Any) -> torch.Tensor:  # noqa: ARG001
        value[..., neurons] = patched_values
        return value

    guided = {"guided_model": models[1], "index": work["index"], "hook_fn": overwrite}
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            written = models[0].generate(
                work["ids"],
                attention_mask=torch.ones_like(work["ids"]),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **(guided if line.strip() == "patched" else {}),
            )
        print("ids", json.dumps(written.tolist()), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]))
