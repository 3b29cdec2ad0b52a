"""Delivery: one rank of a replica asks, all have the same description, pixels go where they are used."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from tests.small_run import story_config

STEPS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = story_config(tmp_path_factory.mktemp("stories"))
    config.train.rows, config.train.micro_rows = 8, 1
    return config


def deliveries(config, tensor: int, pipeline: int, context: int = 1, state: dict | None = None):
    """On one rank: where it stands, whether it asked, and what it was given in every step."""
    import torch

    from data_pipeline.rows import SpecialTokens
    from mmi_megatron.parallel import groups
    from mmi_megatron.train.delivery import PIXELS, Delivery

    config.parallel.tensor, config.parallel.pipeline, config.parallel.context = tensor, pipeline, context
    groups.initialize(config)
    try:
        from megatron.core import parallel_state

        dp = parallel_state.get_data_parallel_rank()
        delivery = Delivery(config, dp, parallel_state.get_data_parallel_world_size())
        if state is not None:
            delivery.load_state(state)
        steps = []
        for _ in range(STEPS):
            delivered = delivery.next()
            arrays = [{f.name: getattr(batch, f.name) for f in fields(batch)} for batch in delivered.batches]
            for given, pixels in zip(arrays, delivered.pixels, strict=True):
                given |= dict(zip(PIXELS, (p.numpy().copy() for p in pixels), strict=True))
            inputs = delivered.inputs(SpecialTokens(0, 1, 2, 3, 4), config.model)
            assert all(torch.is_tensor(item.images) for item in inputs)
            steps.append((arrays, delivered.note))
        validation = delivery.validation("stories")
        sample = delivery.heldout(2, pad=2)
        state = delivery.state()
        delivery.close()
        return {
            "dp": dp,
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "cp": parallel_state.get_context_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "asked": delivery.feed is not None,
            "steps": steps,
            "validation": [batch.tokens for batch in validation.batches],
            "sample": sample.batches[0].tokens,
            "state": state,
        }
    finally:
        groups.destroy()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "context"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)]
)
def test_every_rank_is_given_its_part_and_one_of_a_replica_asks(config, ranks, tensor, pipeline, context):
    (alone,) = ranks.run(1, deliveries, config, 1, 1, timeout=60)
    checksums = [dict(zip(note["rows"], note["checksums"], strict=True)) for _, note in alone["steps"]]
    results = ranks.run(4, deliveries, config, tensor, pipeline, context, timeout=60)
    replicas = 4 // (tensor * pipeline * context)
    assert sum(rank["asked"] for rank in results) == replicas
    for rank in results:
        assert rank["asked"] == (rank["tp"] == rank["pp"] == rank["cp"] == 0)
        (asking,) = [r for r in results if r["asked"] and r["dp"] == rank["dp"]]
        for (own, note), (whole, first_note) in zip(rank["steps"], asking["steps"], strict=True):
            assert note == first_note
            for batch, reference in zip(own, whole, strict=True):
                for name, array in reference.items():
                    if name not in ("images", "drawn"):
                        assert batch[name].dtype == array.dtype
                        assert np.array_equal(batch[name], array)
                full = reference["image_ids"].shape[0]
                assert len(batch["images"]) == full
                assert len(batch["drawn"]) == len(reference["drawn_index"])
                assert batch["images"].shape[1:3] == ((16, 16) if rank["pp"] == 0 else (0, 0))
                assert batch["drawn"].shape[1:3] == ((16, 16) if rank["pp"] == pipeline - 1 else (0, 0))
                if rank["pp"] == 0:
                    assert np.array_equal(batch["images"], reference["images"])
        assert all(
            np.array_equal(*both) for both in zip(rank["validation"], asking["validation"], strict=True)
        )
        sample = rank["sample"]
        assert len(sample) % context == 0 and len(sample) - len(alone["sample"]) < context
        assert np.array_equal(sample[: len(alone["sample"])], alone["sample"])
        assert rank["state"] == alone["state"]
    for step, expected in enumerate(checksums):
        found: dict[int, int] = {}
        for rank in results:
            if rank["asked"]:
                _, note = rank["steps"][step]
                found |= dict(zip(note["rows"], note["checksums"], strict=True))
        assert found == expected
    if pipeline > 1:
        drawn = [rank["steps"][0][0][0]["drawn"] for rank in results if rank["pp"] == pipeline - 1]
        assert all(pixels.any() for pixels in drawn)
    assert sum(len(rank["validation"]) for rank in results if rank["asked"]) == len(alone["validation"])


def test_another_layout_goes_on_where_one_stopped(config, ranks):
    (alone,) = ranks.run(1, deliveries, config, 1, 1, timeout=60)
    later = ranks.run(1, deliveries, config, 1, 1, 1, alone["state"])[0]["steps"]
    results = ranks.run(2, deliveries, config, 1, 1, 1, alone["state"])
    for step, (_, note) in enumerate(later):
        found: dict[int, int] = {}
        for rank in results:
            own = rank["steps"][step][1]
            found |= dict(zip(own["rows"], own["checksums"], strict=True))
        assert found == dict(zip(note["rows"], note["checksums"], strict=True))


@pytest.mark.parametrize("multiple", [1, 2, 7])
def test_padding_to_a_multiple_is_a_row_of_its_own(multiple):
    from data_pipeline.batch import IGNORED, PADDING
    from mmi_megatron.train.delivery import padded
    from tests.samples import SPECIAL, random_batch

    batch = random_batch(1, length=61)
    filled = padded(batch, multiple, SPECIAL.pad)
    filled.validate()
    length = len(batch.tokens)
    assert len(filled.tokens) % multiple == 0 and len(filled.tokens) - length < multiple
    assert (filled.tokens[:length] == batch.tokens).all() and (filled.tokens[length:] == SPECIAL.pad).all()
    assert (filled.labels[length:] == IGNORED).all()
    if len(filled.tokens) > length:
        assert filled.source[-1] == PADDING and filled.row_starts[-2] == length
