"""Presets, overrides, and the errors that a wrong setting gets."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from mmi_megatron import settings
from mmi_megatron.checks import value_at
from mmi_megatron.config import Config, VAEConfig
from mmi_megatron.errors import ConfigError
from mmi_megatron.settings import PRESETS, build, dump, keys, load_config, presets, save_config

SIZES = [
    "model.language.width=192",
    "model.language.heads=6",
    "model.language.kv_heads=6",
    "model.decoder.unet.channels=[32, 64, 96]",
    "train.rows=8",
    "train.micro_rows=4",
]
"""Sizes that the tests reckon with, whatever the quickstart is tuned to."""
NAMES = ["ablation-3b", "full-13b", "manual", "paper-13b", "quickstart", "released-13b"]


def differences(one: Config, other: Config) -> dict[str, tuple]:
    left, right = (dict(flat(dataclasses.asdict(config))) for config in (one, other))
    return {key: (left.get(key), right.get(key)) for key in left | right if left.get(key) != right.get(key)}


def flat(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


# Presets


def test_presets_are_the_promised_ones():
    assert presets() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_preset_is_explained_where_it_stands(name):
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("#"), "a preset begins by saying what it is for"
    plain = [
        line
        for line in lines
        if re.match(r"\s+(- \{|[\w.]+:)|defaults:", line) and not re.match(r".*\s#\s\S", line)
    ]
    structure = re.compile(r"\s+(vision|language|decoder|adapter|resampler|mmfs|unet):$")
    unexplained = [line for line in plain if not structure.match(line)]
    assert not unexplained


@pytest.mark.parametrize("name", ["paper-13b", "quickstart"])
def test_complete_presets_name_every_setting(name):
    tree = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    named = set(leaves(tree))
    config = load_config(name)
    off = [key for key in named if ".0" not in key and value_at(config, key) is None]
    missing = {key for key, hint in keys() if not dataclasses.is_dataclass(hint)} - named
    assert {key for key in missing if not key.startswith(tuple(off))} <= {"model.decoder.vae"}


def leaves(tree, prefix: str = ""):
    """Dotted keys of a plain tree's values, those in the first entry of a list included."""
    for key, value in tree.items():
        yield from [prefix + key] if not isinstance(value, dict) else leaves(value, f"{prefix}{key}.")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from leaves(value[0], f"{prefix}{key}.0.")


def test_the_tree_s_defaults_are_the_paper_s():
    found = differences(Config(), load_config("paper-13b"))
    assert set(found) == {
        "model.decoder.mmfs_placement",
        "data.sources",
        "data.executor",
        "data.workers",
        "parallel.tensor",
        "train.rows",
        "train.recompute.language",
    }


def test_released_differs_from_the_paper_as_listed_at_its_top():
    found = differences(load_config("paper-13b"), load_config("released-13b"))
    assert found == {
        "model.vision.adapter.zero_offset_bias": (False, True),
        "model.language.document_attention": (True, False),
        "model.decoder.mmfs_placement": ("up", "skip"),
        "model.decoder.references": ("all", "nearest"),
    }
    top = (PRESETS / "released-13b.yaml").read_text().partition("defaults:")[0]
    assert all(key in top for key in found)


def test_full_trains_everything():
    model = load_config("full-13b").model
    assert not (model.vision.frozen or model.language.frozen or model.decoder.frozen)


def test_quickstart_runs_on_two_ranks_in_pixel_space():
    config = load_config("quickstart")
    assert config.parallel.tensor == 2
    assert config.model.decoder.vae is None
    assert (config.data.image_tokens, config.data.image_size, config.data.drawn_size) == (4, 32, 32)


# Overrides


def test_overrides_of_every_kind():
    config = load_config(
        "quickstart",
        [
            *SIZES,
            "optimizer.lr=2e-4",
            "train.steps=7",
            "model.language.mmfs.max_images=1",
            "model.language.mmfs.levels=[1]",
            "model.decoder.unet.channels.0=64",
            "data.sources.0.path=/some/where=else",
            "model.decoder.mmfs={kind: none, points: 2}",
            "parallel.shard_images=false",
            "optimizer.clip=2",
        ],
    )
    assert config.optimizer.lr == 2e-4
    assert config.train.steps == 7
    assert (config.model.language.mmfs.max_images, config.model.language.mmfs.levels) == (1, [1])
    assert config.model.decoder.unet.channels == [64, 64, 96]
    assert config.data.sources[0].path == "/some/where=else"
    assert config.data.sources[0].name == "storybook"
    assert (config.model.decoder.mmfs.kind, config.model.decoder.mmfs.points) == ("none", 2)
    assert config.model.decoder.mmfs.table_rows == 6
    assert config.parallel.shard_images is False
    assert config.optimizer.clip == 2.0 and isinstance(config.optimizer.clip, float)


def test_references_follow_what_they_refer_to():
    config = load_config("quickstart", ["model.vision.image_size=64", "model.vision.resampler.queries=9"])
    assert (config.data.image_size, config.data.image_tokens) == (64, 9)


def test_sections_can_be_set_to_null_and_back():
    without = load_config("paper-13b", ["model.decoder.vae=null"])
    assert without.model.decoder.vae is None
    again = load_config("quickstart", ["model.decoder.vae={norm_groups: 16}", "model.decoder.image_size=64"])
    assert again.model.decoder.vae == VAEConfig(norm_groups=16)
    nested = load_config("quickstart", ["model.decoder.vae.norm_groups=16", "model.decoder.image_size=64"])
    assert nested == again


def test_written_and_read_back(tmp_path):
    config = load_config("ablation-3b", ["optimizer.lr=3e-5", "data.max_images_per_row=4"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert load_config(str(tmp_path / "run" / "config.yaml"), ["train.steps=3"]).train.steps == 3


def test_own_file_on_top_of_a_preset_and_of_another_file(tmp_path):
    (tmp_path / "base.yaml").write_text("defaults: quickstart\ntrain: {steps: 11, seed: 3}\n")
    (tmp_path / "mine.yaml").write_text("defaults: base.yaml\ntrain: {steps: 12}\n")
    config = load_config(tmp_path / "mine.yaml")
    rows = load_config("quickstart").train.rows
    assert (config.train.steps, config.train.seed, config.train.rows) == (12, 3, rows)


# Errors: one line, naming the key, where it stands and what to do


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.vision.widht=3", ["'model.vision.widht'", "'model.vision.width'", "a whole number"]),
        ("train.lr=1e-4", ["'train.lr'", "'optimizer.lr'", "a number"]),
        ("lr=1e-4", ["'lr'", "'optimizer.lr'"]),
        ("tensor=2", ["'tensor'", "'parallel.tensor'"]),
        ("vision.width=4", ["'vision'", "'model.vision'"]),
        ("data.sources.0.pth=x", ["'data.sources.0.pth'", "'data.sources.0.path'", "text"]),
        ("data.sources=[{nam: a}]", ["'data.sources.0.nam'", "'data.sources.0.name'"]),
        ("model.vision.width=wide", ["model.vision.width", "expected a whole number", "'wide' (text)"]),
        ("model.vision.width=3.5", ["model.vision.width", "expected a whole number", "3.5 (a number)"]),
        ("model.vision.width=true", ["model.vision.width", "expected a whole number"]),
        ("model.vision.frozen=3", ["model.vision.frozen", "expected true or false", "3 (a whole number)"]),
        ("optimizer.lr=fast", ["optimizer.lr", "expected a number"]),
        ("model.language.mmfs.max_images=x", ["max_images", "a whole number or null"]),
        ("model.vision.width=null", ["model.vision.width", "expected a whole number", "null"]),
        ("model.decoder.unet.channels=[32,a]", ["model.decoder.unet.channels.1", "expected a whole number"]),
        ("model.decoder.unet.channels=32", ["channels", "a list, each entry a whole number"]),
        ("model.vision=3", ["model.vision", "a section with tower, image_size"]),
        ("model.vision.width.x=3", ["model.vision.width is a value", "'x'"]),
        ("data.sources.4.path=x", ["data.sources has 1 entries", "'4'"]),
        ("train.steps", ["'train.steps'", "key=value"]),
        ("=3", ["key=value"]),
        ("train.steps=[1", ["train.steps", "cannot be read as YAML"]),
        ("train.steps=${train.stepz}", ["train.steps", "train.stepz"]),
    ],
)
def test_wrong_names_and_types(override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    message = str(caught.value)
    assert all(text in message for text in expected), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.vision.image_size=30"], ["model.vision.image_size", "30", "patch_size, 8"]),
        (["model.vision.image_size=40"], ["model.vision.image_size", "5 patches", "even"]),
        (["model.vision.heads=5"], ["model.vision.width", "model.vision.heads, 5"]),
        (["model.vision.adapter.interactions=3"], ["model.vision.layers", "interactions, 3"]),
        (["model.vision.resampler.heads=5"], ["model.vision.resampler.width"]),
        (["model.language.heads=7"], ["model.language.width", "model.language.heads, 7"]),
        (["model.language.kv_heads=4"], ["model.language.heads", "kv_heads, 4"]),
        (["parallel.tensor=4"], ["model.language.heads", "6", "parallel.tensor, 4"]),
        (["model.language.kv_heads=3"], ["model.language.kv_heads", "parallel.tensor, 2"]),
        (["parallel.tensor=3", "model.language.ffn=513"], ["vocabulary_multiple", "parallel.tensor, 3"]),
        (["model.language.ffn=511"], ["model.language.ffn", "parallel.tensor, 2"]),
        (["model.language.mmfs.heads=1"], ["model.language.mmfs.heads", "parallel.tensor, 2"]),
        (["parallel.pipeline=4", "model.language.layers=6"], ["parallel.stages", "6 layers", "4 stages"]),
        (["parallel.pipeline=2", "parallel.stages=[3,2]"], ["parallel.stages", "5", "model.language.layers"]),
        (["parallel.pipeline=2", "parallel.stages=[1,1,1]"], ["parallel.stages", "parallel.pipeline"]),
        (["parallel.pipeline=2", "parallel.stages=[5,-1]"], ["parallel.stages", "at least 0"]),
        (["parallel.virtual=2"], ["parallel.virtual", "parallel.pipeline=1"]),
        (["parallel.context=2"], ["model.language.heads", "6", "parallel.context, 4"]),
        (["parallel.context=3"], ["data.context_length", "256", "parallel.context, 3"]),
        (
            [
                "parallel.tensor=1",
                "parallel.context=3",
                "data.context_length=258",
                "model.language.kv_heads=2",
            ],
            ["model.language.kv_heads", "2", "parallel.context, 3"],
        ),
        (
            ["parallel.tensor=1", "parallel.context=2", "parallel.shard_images=false"],
            ["parallel.shard_images", "parallel.context=2"],
        ),
        (
            ["parallel.context=2", "parallel.sequence=true", "data.context_length=258"],
            ["data.context_length", "258", "parallel.tensor times parallel.context, 4"],
        ),
        (["parallel.tensor=1", "parallel.sequence=true"], ["parallel.sequence", "parallel.tensor=1"]),
        (["parallel.mmfs=images"], ["parallel.mmfs", "heads, queries", "'images'"]),
        (["parallel.mmfs=queries"], ["parallel.mmfs", "parallel.sequence=true"]),
        (["parallel.vision_ahead=true"], ["parallel.vision_ahead", "parallel.pipeline=1"]),
        (
            ["parallel.vision_ahead=true", "parallel.pipeline=2", "parallel.virtual=2"],
            ["parallel.vision_ahead", "parallel.virtual=2"],
        ),
        (
            ["parallel.sequence=true", "data.context_length=161"],
            ["data.context_length", "parallel.tensor, 2"],
        ),
        (["train.recompute.vision=some"], ["train.recompute.vision", "selective"]),
        (["model.decoder.image_size=30"], ["model.decoder.image_size", "U-Net", "4"]),
        (["model.decoder.vae={norm_groups: 16}", "model.decoder.image_size=48"], ["VAE", "32"]),
        (["model.decoder.unet.attention=[true]"], ["unet.attention", "1 for 3"]),
        (["model.decoder.unet.channels=[32,64,100]"], ["channels.2", "norm_groups, 8"]),
        (["model.decoder.unet.head_width=20"], ["channels.2", "head_width, 20"]),
        (["model.decoder.unet.heads=5"], ["channels.2", "unet.heads, 5"]),
        (["model.decoder.mmfs_placement=everywhere"], ["mmfs_placement", "skip, up, down", "'everywhere'"]),
        (["model.language.mmfs.levels=[4]"], ["model.language.mmfs.levels", "0 to 3"]),
        (["model.language.mmfs.max_images=8"], ["max_images", "1 to 7", "8"]),
        (["data.image_tokens=5"], ["data.image_tokens", "model.vision.resampler.queries, 4"]),
        (["data.drawn_size=64"], ["data.drawn_size", "model.decoder.image_size, 32"]),
        (["data.context_length=6"], ["data.context_length", "at least 7"]),
        (["train.rows=6"], ["train.rows", "train.micro_rows, 4"]),
        (["train.precision=fp16"], ["train.precision", "fp32, bf16"]),
        (["train.steps=0"], ["train.steps", "at least 1"]),
        (["model.decoder.guidance_drop=1"], ["guidance_drop", "below 1"]),
        (["model.loss.next_token=0", "model.loss.next_image=0"], ["model.loss", "nothing to train"]),
    ],
)
def test_settings_that_do_not_fit_each_other(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [*SIZES, *overrides])
    message = str(caught.value)
    assert all(text in message for text in expected), message
    assert "\n" not in message


def test_heads_need_not_divide_where_mmfs_is_off():
    off = ["model.language.mmfs.kind=none", "model.language.mmfs.heads=1"]
    assert load_config("quickstart", off).model.language.mmfs.kind == "none"


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no preset or file 'paper-31b'; did you mean 'paper-13b'\?"):
        load_config("paper-31b")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {stepz: 3}", "unknown setting 'train.stepz'; did you mean 'train.steps'"),
        ("train: [", "cannot be read as YAML"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "cannot be read as YAML"),
        ("- 1\n- 2", "expected settings"),
        ("defaults: [quickstart]", "expected the name of one preset"),
        ("defaults: mine.yaml", "starts from itself"),
    ],
)
def test_errors_in_a_file_name_the_file(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "mine.yaml" in str(caught.value) and expected in str(caught.value)


def test_build_works_on_any_dataclass():
    assert build(VAEConfig, {"channels": [4]}) == VAEConfig(channels=[4])
    with pytest.raises(ConfigError, match="'channel'; did you mean 'channels'"):
        build(VAEConfig, {"channel": [4]})


def test_dump_holds_every_key():
    tree = yaml.safe_load(dump(load_config("quickstart")))
    assert settings.build(Config, tree) == load_config("quickstart")
