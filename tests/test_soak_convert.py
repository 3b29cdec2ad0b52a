"""Weights converted for TP 2 x PP 2: four ranks start from them, read their own slices, train and resume."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mmi_megatron.convert.start import RECORD
from tests import convert_models as models
from tests.test_convert import files_of, weights_of_ours
from tests.test_convert_run import prepare, steps

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("run"), "tp=2,pp=2")


def test_a_rank_of_four_reads_its_own_slices(ranks, prepared, tmp_path):
    config, folder = prepared
    wanted = models.llama(vocab_size=config.model.language.vocabulary - 2).state_dict()
    results = ranks.run(4, weights_of_ours, 2, 2, config.train.init_from, str(tmp_path), config)
    sizes = [(folder / "llama_checkpoint" / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    seen = set()
    for rank, (held, read) in enumerate(results):
        language = {name: t for name, t in held.items() if name.startswith("language.")}
        for name, tensor in wanted.items():
            ours = f"language.{name.removeprefix('model.')}"
            if ours in language:
                assert torch.equal(language[ours][: len(tensor)], tensor), name
                seen.add(name)
        mine = files_of(read, "llama_checkpoint")
        assert 0.7 * sizes[rank] < mine[rank] <= sizes[rank]
        for other in {0, 1, 2, 3} - {rank}:
            # The norms, which all ranks of a stage hold, are in its first rank's file.
            same_stage = other // 2 == rank // 2
            assert mine.get(other, 0) < 0.25 * sizes[other] if same_stage else other not in mine
    assert seen == wanted.keys()


def test_four_ranks_train_from_them_and_resume(ranks, prepared, tmp_path):
    config, _ = prepared
    config = replace(config, parallel=replace(config.parallel, tensor=2, pipeline=2))
    out = tmp_path / "out"
    ranks.run(4, steps, config, str(out), 1, False)
    record = json.loads((out / RECORD).read_text())
    assert set(record["from"].values()) == set(config.train.init_from) and not any(record["unused"].values())
    ranks.run(4, steps, config, str(out), 2, True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
