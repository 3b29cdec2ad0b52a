"""Converted weights in an object store: a run starts from them, and they are exported from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmi_megatron.convert import export
from mmi_megatron.convert.conversion import write
from mmi_megatron.convert.families import Options, conversion
from mmi_megatron.convert.sharded import Layout
from mmi_megatron.train.storage import Folder
from tests import convert_models as models
from tests.test_soak_checkpoint_s3 import bucket  # noqa: F401

pytestmark = pytest.mark.soak


def held(init_from: list[str], out: str) -> dict[str, torch.Tensor]:
    """On one of two tensor-parallel ranks: the plain language model after the start."""
    from mmi_megatron.convert.start import load_start
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.model import build_model
    from mmi_megatron.parallel.plain import gather_plain

    config = models.settings(2)
    config.train.init_from = init_from
    groups.initialize(config)
    try:
        model = build_model(config, models.SPECIAL)
        load_start([model], config, Path(out))
        return gather_plain(model.language_model)
    finally:
        groups.destroy()


def test_start_and_export_from_a_bucket(bucket, ranks, tmp_path):  # noqa: F811
    from transformers import LlamaForCausalLM

    model = models.llama()
    model.save_pretrained(tmp_path / "in")
    plan = conversion("hf-llama", tmp_path / "in", Options(vocabulary_multiple=32))
    write(plan, tmp_path / "out", Layout(2, 1))
    address = Folder(f"{bucket}/llama")
    for path in (tmp_path / "out").iterdir():
        address.put(path, path.name)
    results = ranks.run(2, held, [address.address], str(tmp_path / "run"))
    wanted = model.state_dict()
    for found in results:
        for name, tensor in wanted.items():
            assert torch.equal(found[name.removeprefix("model.")][: len(tensor)], tensor), name
    record = json.loads((tmp_path / "run" / "start_weights.json").read_text())
    assert set(record["from"].values()) == {address.address} and not any(record["unused"].values())
    export.export_llm(export.open_checkpoint(address.address), tmp_path / "back")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == wanted.keys() and all(torch.equal(back[name], t) for name, t in wanted.items())
