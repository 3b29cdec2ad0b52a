"""The ``mmi`` command: parses, loads the settings and calls; everything is imported when it is needed,
so that ``mmi data`` works where there is no torch."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from data_pipeline.errors import DataError
from mmi_megatron.errors import ConfigError

OPTIONAL = ("torch", "megatron", "timm", "diffusers", "transformers")
"""What a machine that only prepares data does without."""

P = ParamSpec("P")
R = TypeVar("R")


app = typer.Typer(
    help="MM-Interleaved on Megatron-Core: documents of images and text, read and written.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Preset = Annotated[str, typer.Argument(help="Name of a preset, or a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings to change, as in train.steps=100; use=llm/mistral-7b lays a fragment over the preset.",
        show_default=False,
    ),
]


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """An error the user can mend is one line and exit code 1; any other keeps its traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except mendable() as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            typer.echo(f"error: this command needs {error.name}, which is not installed here", err=True)
        raise typer.Exit(1)

    return run


def mendable() -> tuple[type[Exception], ...]:
    """The errors that a user can mend, of those that can have occurred yet."""
    checkpoint: Any = sys.modules.get("mmi_megatron.train.checkpoint_reader")
    return (
        (ConfigError, DataError)
        if checkpoint is None
        else (ConfigError, DataError, checkpoint.CheckpointError)
    )


@app.command()
@reported
def train(
    preset: Preset,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/ and the preset's name")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes to start.", show_default="one a GPU, or one replica")
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop, with a checkpoint, after this many steps of the run.")
    ] = None,
) -> None:
    """Train. Starts its own ranks on one machine; under torchrun it is one of them.

    The folder gets metrics.jsonl, checkpoints, samples and, in reports/, what went wrong: skipped steps,
    loss spikes, slow ranks, memory that ran out; and every train.watch.measure_every steps the time and
    memory of each part. train.watch.trace_steps=3 records a trace of three steps for Perfetto, from step
    train.watch.trace_from on, in traces/.
    """
    from mmi_megatron.settings import load_config

    config = load_config(preset, overrides or [])
    from mmi_megatron.train.launch import launch

    folder = out or Path("runs") / Path(preset).stem
    raise typer.Exit(launch(config, folder, resume=resume, ranks=ranks, stop_after=stop_after))


@app.command()
@reported
def generate(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run, or the converted release.", show_default=False)
    ],
    prompt: Annotated[Path, typer.Option(help="Document to go on from, JSON.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="HTML page to write; its JSON is put beside it.", show_default=False)
    ],
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    min_tokens: Annotated[int, typer.Option(help="Tokens before a stretch of text may end.")] = 0,
    max_images: Annotated[int, typer.Option(help="Pictures drawn at most.")] = 4,
    picture_first: Annotated[
        bool, typer.Option("--picture-first", help="Draw right after the prompt.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among this share of the probability.")] = 1.0,
    beams: Annotated[int, typer.Option(help="Above 1: beam search, no sampling.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Power of the length that divides a beam's score.")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Denoising steps of a picture.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1: none.")] = 3.5,
    scheduler: Annotated[str, typer.Option(help="ddim or ddpm.")] = "ddim",
    seed: Annotated[int, typer.Option(help="Of text and pictures.")] = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json; converted weights need it.", show_default="the run's"),
    ] = None,
) -> None:
    """Write a document on, text and pictures, as one HTML page."""
    from data_pipeline.formats import read_document
    from mmi_megatron.generate.interleaved import Options
    from mmi_megatron.generate.interleaved import generate as write
    from mmi_megatron.generate.load import load_run
    from mmi_megatron.generate.page import write_page
    from mmi_megatron.generate.text import TextOptions
    from mmi_megatron.platform import device

    try:
        text = TextOptions(temperature, top_k, top_p, beams, length_penalty, min_tokens, max_tokens)
        options = Options(text, max_images, picture_first, steps, guidance, scheduler, seed)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from None
    given = read_document(prompt)
    document = write(load_run(run, device(), tokenizer), given, options)
    record = write_page(document, out, {"seed": seed, "steps": steps, "guidance": guidance})
    typer.echo(f"{out} and {record}")


@app.command()
@reported
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
) -> None:
    """Make stories, train on them, stop and resume, judge the result and write an illustrated page."""
    from mmi_megatron import quickstart as tour

    raise typer.Exit(tour.main(out, overrides or []))


@app.command()
@reported
def config(preset: Preset, overrides: Overrides = None) -> None:
    """Print all settings of a preset, as YAML."""
    from mmi_megatron.settings import dump, load_config

    typer.echo(dump(load_config(preset, overrides or [])), nl=False)


@app.command()
@reported
def params(
    preset: Preset,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the parameters of a preset's model, part by part, trainable and frozen."""
    from mmi_megatron.settings import load_config

    model = load_config(preset, overrides or []).model
    from mmi_megatron import params as counting

    parts = counting.count(model)
    if as_json:
        typer.echo(json.dumps(counting.as_json(parts), indent=1))
    else:
        Console().print(counting.as_table(parts, preset))


@app.command()
@reported
def convert(
    kind: Annotated[
        str, typer.Argument(help="hf-llama, hf-clip, timm-clip, sd or released.", show_default=False)
    ],
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Folder (or file) of weights.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint to write, a folder.", show_default=False)],
    overrides: Overrides = None,
    layout: Annotated[str, typer.Option(help="Files and slices are those of tp=N,pp=N.")] = "tp=1,pp=1",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16.", show_default="as it is")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Resize position embeddings to it.", show_default="as it is")
    ] = None,
    vocabulary_multiple: Annotated[int, typer.Option(help="As model.language.vocabulary_multiple.")] = 128,
    preset: Annotated[str, typer.Option(help="Of `released`: settings of its model.")] = "released-13b",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Weights of other programs to a checkpoint that `mmi train ... train.init_from=[CKPT]` starts from."""
    from mmi_megatron.convert.conversion import write
    from mmi_megatron.convert.families import Options, conversion
    from mmi_megatron.convert.rules import dtype_of
    from mmi_megatron.convert.sharded import Layout

    options = Options(image_size, vocabulary_multiple, preset, overrides or [])
    plan = conversion(kind, source, options)
    show(write(plan, out, Layout.parse(layout), dtype_of(dtype)), as_json)


@app.command()
@reported
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint, or the folder of a run.", show_default=False)
    ],
    llm: Annotated[Path | None, typer.Option(help="Folder for transformers.", show_default=False)] = None,
    vision: Annotated[
        Path | None, typer.Option(help="Folder for transformers or timm.", show_default=False)
    ] = None,
    decoder: Annotated[Path | None, typer.Option(help="Folder for diffusers.", show_default=False)] = None,
    released: Annotated[
        Path | None, typer.Option(help="File in the release's naming, .bin or .safetensors.")
    ] = None,
    vision_format: Annotated[str, typer.Option(help="hf or timm.")] = "hf",
    settings: Annotated[
        Path | None, typer.Option("--config", help="Settings of the run, where they do not lie by it.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16.", show_default="as it is")] = None,
    average: Annotated[bool, typer.Option(help="Averaged weights of the decoder, if there are.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """A checkpoint's weights to folders and files that other programs load."""
    from mmi_megatron.convert import export as to
    from mmi_megatron.convert.rules import dtype_of

    if not (llm or vision or decoder or released):
        raise ConfigError("nothing to export: name one of --llm, --vision, --decoder, --released")
    opened = to.open_checkpoint(checkpoint, settings, dtype_of(dtype), average)
    if llm:
        show(to.export_llm(opened, llm), as_json)
    if vision:
        show(to.export_vision(opened, vision, vision_format), as_json)
    if decoder:
        show(to.export_decoder(opened, decoder), as_json)
    if released:
        show(to.export_released(opened, released), as_json)


def show(report: Any, as_json: bool) -> None:
    """Print a report of `convert` or `export`."""
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        Console().print(report.as_table())


@app.command()
@reported
def doctor() -> None:
    """Print device, versions, and which fast paths are in use and which fall back."""
    from mmi_megatron import doctor as examination

    Console().print(examination.as_table(examination.examine()))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def checkpoint(context: typer.Context) -> None:
    """Checkpoints of a run, listed, checked, rewritten: `mmi checkpoint --help`."""
    from mmi_megatron.checkpoint_cli import app as commands

    commands(args=context.args or ["--help"], prog_name="mmi checkpoint")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def data(context: typer.Context) -> None:
    """Documents to training data: `mmi data --help`."""
    from data_pipeline.cli import app as commands

    commands(args=context.args or ["--help"], prog_name="mmi data")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
