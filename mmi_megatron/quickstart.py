"""From nothing to an illustrated page: makes stories, trains on them at two tensor-parallel ranks,
stops half-way and resumes, judges the result on held-out stories, and writes a page.

Phases that are finished are used again when it is started a second time with the same settings; with
others it starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.cli import fit_tokenizer
from data_pipeline.formats import Document, members_of
from data_pipeline.storybook import story, write_stories
from data_pipeline.stream import Stream
from data_pipeline.tokens import load_tokenizer
from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError
from mmi_megatron.settings import dump, load_config
from mmi_megatron.train import checkpoint_folder
from mmi_megatron.train.launch import launch

PRESET = "quickstart"
STORIES, HELDOUT, SEED = 3000, 50, 0
MARK = "quickstart.txt"
"""Written first: the digest of what a folder was started with."""


def main(
    out: Path = Path("runs/quickstart"),
    overrides: Sequence[str] = (),
    stories: int = STORIES,
    documents: int = HELDOUT,
) -> int:
    """Run the whole tour.

    Args:
        out: folder of the run; ``mmi generate`` can go on with it.
        overrides: changes to the preset, ``key=value``.
        stories: how many are made, held-out ones included.
        documents: held-out stories that the result is judged on.

    Returns:
        The exit code: 0, or that of a training job that failed.

    Raises:
        ConfigError: when ``out`` holds something else, or a setting makes no sense.
    """
    tour = _Tour(out.absolute(), overrides, Console())
    tour.prepare(stories)
    with tour.phase("Stories and tokenizer"):
        config = tour.data(stories)
    half = max(1, config.train.steps // 2)
    for title, last in ((f"Training to step {half}", half), (f"Resuming to step {config.train.steps}", None)):
        with tour.phase(title):
            code = tour.train(config, last)
        if code:
            return code
    tour.use(documents)
    return 0


class _Tour:
    """The folder, the terminal and the wall time of each phase."""

    def __init__(self, out: Path, overrides: Sequence[str], console: Console):
        self.out, self.overrides, self.console = out, overrides, console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """A titled stretch of work whose wall time is kept."""
        self.console.rule(f"[bold]{title}", align="left")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started

    def say(self, words: str) -> None:
        """Print a line; paths stay whole, to be copied."""
        self.console.print(words, soft_wrap=True, highlight=False)

    def prepare(self, stories: int) -> None:
        """Decide whether what lies in the folder can be used again."""
        files = b"".join(blob for _, blob in members_of(story(SEED, 0)))
        settings = dump(load_config(PRESET, self.overrides)).encode()
        digest = hashlib.blake2b(settings + files + str(stories).encode(), digest_size=16).hexdigest()
        mark = self.out / MARK
        if mark.is_file() and mark.read_text() != digest:
            self.say(f"{self.out} was made with other settings: removed, starting anew")
            shutil.rmtree(self.out)
        elif mark.is_file():
            self.say(f"{self.out} is used again where it is finished; remove it to start anew")
        elif self.out.exists() and any(self.out.iterdir()):
            raise ConfigError(f"{self.out} holds something else; name another folder with --out")
        self.out.mkdir(parents=True, exist_ok=True)
        mark.write_text(digest)

    def data(self, stories: int) -> Config:
        """Shards, tokenizer and the settings that name them."""
        shards, tokenizer = self.out / "stories", self.out / "tokenizer.json"
        wanted = load_config(PRESET, self.overrides)
        # The tokenizer is written last: where it is, the shards are whole.
        if not tokenizer.is_file():
            shutil.rmtree(shards, ignore_errors=True)
            summary = write_stories(shards, stories, SEED, wanted.model.decoder.image_size)
            draft = tokenizer.with_name("tokenizer.draft.json")
            fit_tokenizer([shards], draft, wanted.model.language.vocabulary)
            draft.rename(tokenizer)
            self.say(f"{summary.documents:,} stories with {summary.images:,} pictures in {shards}")
        # So small a corpus may not fill the vocabulary.
        size = load_tokenizer(tokenizer).size
        self.say(f"tokenizer of {size} ids: {tokenizer}")
        return load_config(
            PRESET,
            [
                *self.overrides,
                f"data.sources.0.path={json.dumps(str(shards))}",
                f"data.tokenizer={json.dumps(str(tokenizer))}",
                f"model.language.vocabulary={size}",
            ],
        )

    def train(self, config: Config, last: int | None) -> int:
        """Train to a step, or to the end, from the newest checkpoint if there is one; the exit code."""
        newest = checkpoint_folder.newest(self.out / "checkpoints")
        step = int(newest.name.removeprefix("step_")) if newest else 0
        if step >= (last or config.train.steps):
            self.say(f"already trained to step {step}")
            return 0
        if newest:
            self.say(f"resuming from {newest}")
        return launch(
            config,
            self.out,
            resume=newest is not None,
            stop_after=last,
            again=shlex.join(["mmi", "quickstart", *self.overrides, "--out", str(self.out)]),
        )

    def use(self, documents: int) -> None:
        """Judge the trained model and let it write a page."""
        from mmi_megatron.evaluate import stories
        from mmi_megatron.generate.interleaved import Options, generate
        from mmi_megatron.generate.load import load_run
        from mmi_megatron.generate.page import write_page
        from mmi_megatron.generate.text import TextOptions
        from mmi_megatron.platform import device

        with self.phase(f"Judging {documents} held-out stories"):
            run = load_run(self.out, device())
            heldout, train = Stream(run.config.data, "heldout"), run.config.train
            options = stories.Options(documents, train.sample_steps, train.guidance, SEED)
            result = stories.judge_stories(run.model, heldout, options)
            (self.out / "stories.json").write_text(json.dumps({"step": run.step} | result, indent=1))
            stories.show(result, self.console)
        with self.phase("Writing a page"):
            (told,) = heldout.heldout_documents(1)
            opening = Document(told.key, told.content[:1])
            write_page(opening, self.out / "prompt.html")
            ways = Options(
                TextOptions(temperature=0.7),
                picture_first=True,
                steps=train.sample_steps,
                guidance=train.guidance,
                seed=SEED,
            )
            page = self.out / "page.html"
            facts = {"model": self.out.name, "step": run.step, "guidance": train.guidance, "seed": SEED}
            document = generate(run, opening, ways)
            write_page(document, page, facts | {"end": document.metadata["ended"]})
        times = Table("phase", "wall time", title="Quickstart")
        for title, taken in self.seconds.items():
            minutes, seconds = divmod(round(taken), 60)
            times.add_row(title, f"{minutes} min {seconds:02d} s")
        self.console.print(times)
        prompt = self.out / "prompt.json"
        again = ["mmi", "generate", str(self.out), "--prompt", str(prompt), "--out", "my_page.html"]
        self.say(f"Try your own: {shlex.join(again)}")
        self.say(f"An illustrated page: [bold]{page}")
