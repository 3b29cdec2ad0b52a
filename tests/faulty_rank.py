"""A rank of a real run on which rank 1 has the fault that ``FAULT`` in the environment names."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import torch

from mmi_megatron.train import worker

AT = 2
"""The step of the fault; a slow rank is slow in all of them."""


def fault(config, out: Path, resume: bool, stop_after: int | None) -> int:
    """Train with the fault."""
    from mmi_megatron.parallel.language_model import ShardedLanguageModel
    from mmi_megatron.train import loop
    from mmi_megatron.train.loop import Trainer

    what, first, plain = os.environ["FAULT"], Trainer.__init__, ShardedLanguageModel.run
    trainers: list[Trainer] = []

    def now() -> bool:
        return trainers[0].step == AT

    def init(trainer, *arguments, **options):
        first(trainer, *arguments, **options)
        trainers.append(trainer)
        weight = trainer.decoder.unet.conv_in.weight
        if what == "nan":
            weight.register_hook(lambda grad: grad * (math.nan if now() else 1.0))
        elif what == "memory":
            weight.register_hook(lambda grad: torch.empty(1 << 55) if now() else grad)

    def late(model, *arguments):
        if what == "slow" or (what == "hung" and now()):
            time.sleep(2.0 if what == "slow" else 3600.0)
        return plain(model, *arguments)

    def behind(*_arguments, **_options):
        if what == "failed in set-up":
            raise ValueError("no corpus on this node")
        if what == "frozen in set-up":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3600.0)

    if os.environ["RANK"] == "1":
        Trainer.__init__, ShardedLanguageModel.run = init, late
        if what.endswith("in set-up"):
            loop.Delivery = behind
    return worker.run(config, out, resume, stop_after)


if __name__ == "__main__":
    worker.main(work=fault)
