"""The typed tree of settings. ``presets/*.yaml`` fills it in; every leaf has a name and a default.

Defaults are the paper's model at full size (MM-Interleaved, section 4.1 and table 11). The tree
is loaded by OmegaConf as a structured configuration, so an unknown key or a wrong type is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.settings import DataSettings


@dataclass
class DeformableConfig:
    """Deformable attention of the ViT-Adapter.

    ``heads`` and ``points`` a head and level; ``value_ratio`` is the value width over the model
    width; ``ffn_ratio`` the hidden width of the convolutional FFN over the model width.
    """

    heads: int = 16
    points: int = 4
    value_ratio: float = 0.5
    ffn_ratio: float = 0.25


@dataclass
class AdapterConfig(DeformableConfig):
    """ViT-Adapter: ``stem`` is the width of the convolutional stem, ``interactions`` the number of
    injector/extractor rounds spread evenly over the ViT, ``extra_extractors`` those after the last.
    ``zero_offset_bias`` starts all points of a head in one place, as the release does."""

    stem: int = 64
    interactions: int = 4
    extra_extractors: int = 2
    zero_offset_bias: bool = False


@dataclass
class ResamplerConfig:
    """Perceiver resampler: ``queries`` tokens out, ``width`` inside, cross-attention in every
    ``cross_every``-th layer, LayerNorm on q and k per head with ``qk_norm``."""

    queries: int = 64
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    cross_every: int = 2
    qk_norm: bool = True


@dataclass
class VisionConfig:
    """Visual tokenizer. ``image_size`` pixels a side; ``patch_size`` divides it. ``resampler`` off
    (``use_resampler=false``) feeds learned embeddings in place of visual tokens (table 8).
    ``tower`` is the kind of ViT: ``clip``, ``eva`` (EVA-02-CLIP) or ``siglip``, as timm builds them;
    ``quick_gelu`` is CLIP's alone."""

    tower: str = "clip"
    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    ffn: int = 4096
    quick_gelu: bool = True
    frozen: bool = True
    use_resampler: bool = True
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)


@dataclass
class MMFSConfig:
    """Multi-image multi-scale feature synchronizer (equation 4).

    Attributes:
        kind: ``deformable``; ``dense``: plain cross-attention to the same maps in its place
            (table 6); ``none``: off.
        heads, points: attention heads and sampling points a head, level and image.
        value_width: width of the value projection, all heads together.
        table_rows: rows of the relative image table; row 0 is unused, so ``table_rows - 1``
            images are within reach.
        max_images: images within reach, None for all the table holds; 1 is the single-image setting.
        levels: which levels of the pyramid are sampled, 0 the finest; one entry is single-scale.
        base: pixels a side of the grid that offsets are measured in; 0 takes the query grid's own.
        sink: softmax with an extra entry of logit 0, as the public weights were trained.
        offset_init: bound of the uniform start of the offsets' bias, in pixels of the base grid.
    """

    kind: str = "deformable"
    heads: int = 16
    points: int = 8
    value_width: int = 1024
    table_rows: int = 50
    max_images: int | None = None
    levels: list[int] = field(default_factory=lambda: [1, 2, 3])
    base: int = 16
    sink: bool = True
    offset_init: float = 3.0


@dataclass
class LanguageConfig:
    """LLaMA-type language model.

    Attributes:
        qkv_bias: queries, keys and values have a bias (Qwen2).
        vocabulary: tokens of the tokenizer, image tokens included.
        vocabulary_multiple: the tables are padded to a multiple of this, the same at any layout.
        mmfs_every: MMFS sits in layers 0, n, 2n, ...
        document_attention: documents of a row do not see each other and their positions restart;
            false is the release's way (attention over the whole row, positions run on).
        frozen: layers, embeddings and head are not trained.
        train_image_tokens: with ``frozen``, what the release trains besides: the vector added to
            BoI's embedding and output rows of the two image tokens.
    """

    width: int = 5120
    layers: int = 40
    heads: int = 40
    kv_heads: int = 40
    ffn: int = 13824
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    vocabulary: int = 32002
    vocabulary_multiple: int = 128
    mmfs_every: int = 4
    mmfs: MMFSConfig = field(default_factory=MMFSConfig)
    document_attention: bool = True
    frozen: bool = True
    train_image_tokens: bool = True


@dataclass
class UNetConfig:
    """Arguments of diffusers' UNet2DConditionModel; ``head_width`` is the width of an attention head.
    ``heads`` gives every block so many heads instead, whatever its width (Stable Diffusion 1: 8).
    ``pooled_tokens`` adds the tokens, pooled by attention, to the embedding of the timestep, as
    DeepFloyd IF does: a U-Net that starts from nothing is tied to its context much sooner."""

    channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    attention: list[bool] = field(default_factory=lambda: [True, True, True, False])
    layers_per_block: int = 2
    head_width: int = 64
    heads: int | None = None
    norm_groups: int = 32
    linear_projection: bool = True
    pooled_tokens: bool = False


@dataclass
class VAEConfig:
    """Arguments of diffusers' AutoencoderKL; latents are 8 times smaller at four blocks."""

    channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.18215


@dataclass
class DecoderConfig:
    """Image decoder.

    Attributes:
        image_size: pixels a side of a drawn image.
        vae: None draws in pixel space.
        resampler: hidden states of the context to the U-Net's cross-attention tokens.
        mmfs_placement: ``skip``: on the skip tensors and the mid block (the release); ``up``: after
            each up-sampling block (the paper); ``down``: after each down-sampling block.
        references: ``all`` earlier images of the document (the paper) or the ``nearest`` one (the
            release).
        target: ``epsilon`` or ``v``.
        timesteps, beta_schedule, beta_start, beta_end: the DDPM schedule.
        guidance_drop: probability that an image's context is replaced by the learned negatives.
        ema: decay of the exponential average of the decoder's weights, 0 for none.
    """

    image_size: int = 512
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig | None = field(default_factory=VAEConfig)
    resampler: ResamplerConfig = field(
        default_factory=lambda: ResamplerConfig(
            queries=77, width=1024, layers=1, heads=16, ffn=3072, cross_every=1, qk_norm=False
        )
    )
    mmfs: MMFSConfig = field(
        default_factory=lambda: MMFSConfig(table_rows=10, levels=[0, 1, 2, 3], base=0, offset_init=1.0)
    )
    mmfs_placement: str = "skip"
    references: str = "all"
    target: str = "epsilon"
    timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    guidance_drop: float = 0.1
    frozen: bool = False
    ema: float = 0.0


@dataclass
class LossConfig:
    """L = next_token * NTP + next_image * NIP (equation 5); 0 turns one off (table 7)."""

    next_token: float = 1.0
    next_image: float = 10.0


@dataclass
class ModelConfig:
    """The whole model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass
class ParallelConfig:
    """Layout. Data parallelism takes what ranks are left.

    Attributes:
        tensor: ranks that share one copy of a stage's layers.
        pipeline: ranks in a row that share the layers; the first holds the visual tokenizer and the
            embeddings, the last the head and the image decoder.
        virtual: stages that each of these ranks holds, taken in turns (interleaved schedule).
        stages: layers of each of the ``pipeline * virtual`` stages in their order; the last may be 0.
            Empty divides them evenly.
        context: ranks that divide a row's tokens among themselves, and in attention its heads: for rows
            whose activations are too large for one rank. With ``tensor`` it must divide the heads.
        sequence: divide norms and residuals over the tensor-parallel group too.
        mmfs: what the tensor-parallel ranks divide among themselves of the language model's MMFS:
            ``heads``, which costs no memory; or, with ``sequence``, ``queries``, which sends the images'
            values instead of queries and outputs, but holds most of MMFS on every rank.
        shard_images: divide the images of a micro-batch over the ranks that share its rows (``tensor``
            times ``context``) for the visual tokenizer and the image decoder. Any number divides: the
            last shares are filled up with images that count for nothing.
        vision_ahead: with a pipeline, run the visual tokenizer on the images of the next micro-batch
            while the first stage would wait for the second; takes the memory of one more micro-batch
            in the tokenizer.
        overlap: reduce gradients while the backward pass still runs, and gather parameters while the
            forward pass already does.
        bucket: parameters of one such exchange, 0 for Megatron's choice.
        optimizer_copies: copies of the optimizer's state and main parameters, each divided over the
            replicas that share it (on one machine, say). As many as there are replicas is data
            parallelism without a distributed optimizer.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    stages: list[int] = field(default_factory=list)
    context: int = 1
    sequence: bool = False
    mmfs: str = "heads"
    shard_images: bool = True
    vision_ahead: bool = False
    overlap: bool = True
    bucket: int = 0
    optimizer_copies: int = 1


@dataclass
class OptimizerConfig:
    """AdamW with the paper's parameter groups (table 11).

    Attributes:
        lr, decoder_lr, offsets_lr: peak learning rates: everything else, the image decoder, the
            deformable sampling offsets (which have no weight decay).
        min_lr_ratio: final learning rate over the peak.
        schedule: ``cosine``, ``linear`` or ``constant``, after ``warmup_steps``.
    """

    lr: float = 1e-4
    decoder_lr: float = 1e-5
    offsets_lr: float = 1e-5
    min_lr_ratio: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 1000
    beta1: float = 0.9
    beta2: float = 0.995
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 1.0


@dataclass
class RecomputeConfig:
    """Activations that are forgotten after the forward pass and computed again in the backward pass.

    Each part has its own way: ``none``; ``selective``: only what is large and quick to compute
    (language: the core attention; vision: within each layer of the ViT; decoder: within each block of
    the U-Net); ``full``: everything (language: layer by layer; vision and decoder: the part as a
    whole, which pays where pipeline stages keep many micro-batches waiting).
    """

    language: str = "none"
    vision: str = "none"
    decoder: str = "none"


@dataclass
class WatchConfig:
    """What is looked at while a run goes on.

    Attributes:
        skip_limit: steps in a row that may be skipped because loss or gradient were not finite; one
            more ends the run. 0: no limit.
        spike: a loss is reported that lies so many times the usual spread (the median distance from
            the median of the last 64 steps) above the median; 0: never.
        measure_every: steps between two whose time and memory are taken apart, part by part and rank
            by rank; 0: never. Where there is a GPU such a step waits for it at every part.
        straggler: a rank is reported that took so many times the ranks' median of its own time in such
            a step; 0: never.
        trace_from, trace_steps: first step that torch's profiler records, and how many; 0 steps: none.
    """

    skip_limit: int = 10
    spike: float = 10.0
    measure_every: int = 100
    straggler: float = 1.5
    trace_from: int = 10
    trace_steps: int = 0


@dataclass
class TrainConfig:
    """The run.

    Attributes:
        steps: optimizer steps in all.
        rows: rows of a global batch; ``micro_rows`` rows of one forward pass on one rank.
        precision: ``fp32`` or ``bf16`` (fp32 main gradients and states).
        threads: CPU threads a rank when no GPU is there; 0 divides the cores among the ranks.
        timeout: seconds without progress of a rank, or in a collective, after which the job ends.
        setup_timeout: seconds that a phase of set-up may take on any rank (starting and importing,
            opening the corpus, reading weights, ...), after which the job ends.
        save_every: steps between checkpoints, 0 for one at the end.
        keep: checkpoints that stay, the newest; and, with ``keep_every``, those of steps that divide
            by it.
        checkpoints: where they are: a path, or a URL such as ``s3://bucket/run``; empty for the
            folder ``checkpoints`` of the run.
        init_from: checkpoints that the weights start from: those that `mmi convert` wrote, or folders
            of other runs; each may hold a part of the model. A resumed run does not look at them.
    """

    steps: int = 15000
    rows: int = 512
    micro_rows: int = 2
    seed: int = 0
    precision: str = "bf16"
    threads: int = 0
    timeout: int = 600
    setup_timeout: int = 1800
    log_every: int = 1
    validate_every: int = 500
    validate_documents: int = 64
    sample_every: int = 500
    sample_documents: int = 2
    sample_steps: int = 50
    guidance: float = 3.5
    save_every: int = 500
    keep: int = 3
    keep_every: int = 0
    checkpoints: str = ""
    init_from: list[str] = field(default_factory=list)
    watch: WatchConfig = field(default_factory=WatchConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)


@dataclass
class Config:
    """Everything a run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSettings = field(default_factory=DataSettings)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
