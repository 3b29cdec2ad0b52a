"""A small configuration of the whole model and random micro-batches that fit it."""

from __future__ import annotations

import numpy as np

from data_pipeline.batch import PADDING, Batch
from data_pipeline.rows import SpecialTokens, describe_stream
from data_pipeline.settings import DataSettings
from mmi_megatron.config import (
    AdapterConfig,
    Config,
    DecoderConfig,
    LanguageConfig,
    LossConfig,
    MMFSConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ResamplerConfig,
    TrainConfig,
    UNetConfig,
    VisionConfig,
)

SPECIAL = SpecialTokens(bos=1, eos=2, pad=3, boi=4, image=5)
IMAGE_TOKENS = 3


def small_config(tensor: int = 1, frozen: bool = False, **train) -> Config:
    """Every part of the model at a width where a step takes a fraction of a second."""
    vision = VisionConfig(
        image_size=16,
        patch_size=4,
        width=32,
        layers=4,
        heads=4,
        ffn=64,
        frozen=frozen,
        adapter=AdapterConfig(heads=4, points=2, stem=8, interactions=2, extra_extractors=1),
        resampler=ResamplerConfig(queries=IMAGE_TOKENS, width=32, layers=2, heads=4, ffn=64),
    )
    language = LanguageConfig(
        width=48,
        layers=4,
        heads=4,
        kv_heads=2,
        ffn=96,
        vocabulary=61,
        vocabulary_multiple=32,
        mmfs_every=2,
        mmfs=MMFSConfig(heads=4, points=2, value_width=32, table_rows=4, base=4),
        frozen=frozen,
        train_image_tokens=frozen,
    )
    decoder = DecoderConfig(
        image_size=16,
        unet=UNetConfig(
            channels=[16, 32], attention=[False, True], layers_per_block=1, head_width=8, norm_groups=4
        ),
        vae=None,
        resampler=ResamplerConfig(
            queries=4, width=32, layers=1, heads=4, ffn=64, cross_every=1, qk_norm=False
        ),
        mmfs=MMFSConfig(
            heads=4, points=2, value_width=32, table_rows=3, levels=[0, 1, 2, 3], base=0, offset_init=1.0
        ),
        target="v",
        guidance_drop=0.3,
    )
    return Config(
        model=ModelConfig(vision=vision, language=language, decoder=decoder, loss=LossConfig()),
        data=DataSettings(context_length=64, image_tokens=IMAGE_TOKENS, image_size=16, drawn_size=16),
        parallel=ParallelConfig(tensor=tensor),
        optimizer=OptimizerConfig(lr=1e-3, decoder_lr=1e-3, offsets_lr=1e-4, warmup_steps=4),
        train=TrainConfig(steps=20, rows=2, micro_rows=2, precision="fp32", threads=1, **train),
    )


def random_batch(seed: int, rows: int = 2, length: int = 64, image: int = 16, documents: int = 3) -> Batch:
    """Rows of random documents with zero to three images each, the last row padded."""
    random = np.random.default_rng(seed)
    tokens, row_starts, bounds, source = [], [0], [0], []
    for _ in range(rows):
        row: list[int] = []
        for _ in range(documents):
            document = [SPECIAL.bos]
            for _ in range(int(random.integers(0, 4))):
                document += random.integers(6, 61, int(random.integers(0, 5))).tolist()
                document += [SPECIAL.boi] + [SPECIAL.image] * IMAGE_TOKENS
            document += random.integers(6, 61, 3).tolist() + [SPECIAL.eos]
            if len(row) + len(document) > length:
                break
            row += document
            bounds.append(len(tokens) + len(row))
            source.append(0)
        if len(row) < length:
            row += [SPECIAL.pad] * (length - len(row))
            bounds.append(len(tokens) + length)
            source.append(PADDING)
        tokens += row
        row_starts.append(len(tokens))
    stream = np.array(tokens, np.int32)
    described = describe_stream(stream, np.array(row_starts), SPECIAL)
    images = random.integers(0, 256, (len(described.image_boi), image, image, 3), dtype=np.uint8)
    drawn = np.flatnonzero(described.image_loss).astype(np.int32)
    batch = Batch(
        tokens=stream,
        labels=described.labels,
        row_starts=np.array(row_starts, np.int32),
        cu_seqlens=np.array(bounds, np.int32),
        source=np.array(source, np.int32),
        sample_ids=np.arange(len(source), dtype=np.int64),
        images=images,
        image_ids=random.integers(0, 2**40, len(images)),
        drawn=random.integers(0, 256, (len(drawn), image, image, 3), dtype=np.uint8),
        drawn_index=drawn,
    )
    batch.validate()
    return batch
