"""A rank that notes the samples of every step it reads, for the tests of kills."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mmi_megatron.train import worker


def note(config, out: Path, resume: bool, stop_after: int | None) -> int:
    """Train, with one line for every step: ``{"step": 3, "batches": [...]}``."""
    from mmi_megatron.train.watch import Watch, identity

    reading = Watch.reading

    def noting(watch, batches, inputs):
        line = json.dumps({"step": watch.step, "batches": [identity(batch) for batch in batches]})
        with Path(sys.argv[2], f"read_by_{os.environ['RANK']}.jsonl").open("a") as file:
            file.write(line + "\n")
        return reading(watch, batches, inputs)

    Watch.reading = noting
    return worker.run(config, out, resume, stop_after)


if __name__ == "__main__":
    worker.main(work=note)
