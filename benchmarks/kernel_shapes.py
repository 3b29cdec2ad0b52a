"""Where the presets sample maps, and how much: the shapes that benchmarks/kernels.py measures.

They are kept in kernel_shapes.json, so that the benchmark runs on a machine with nothing but torch.
``python -m benchmarks.kernel_shapes`` writes the file from the presets; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FILE = Path(__file__).with_name("kernel_shapes.json")


@dataclass(frozen=True)
class Site:
    """One place that samples maps.

    Attributes:
        place: "language" (every token asks), "unet" (every pixel of a drawn image asks) or "adapter".
        presets: that have it.
        queries: of a row of tokens, a drawn image, or an image.
        shapes: (height, width) of the levels sampled.
        heads, channels, points: heads, channels a head, points a head and level.
        rows: of the relative table, 0 without one.
        base: pixels a side of the grid that offsets are measured in.
        reach: images within reach; None: all that the table holds.
    """

    place: str
    presets: tuple[str, ...]
    queries: int
    shapes: tuple[tuple[int, int], ...]
    heads: int
    channels: int
    points: int
    rows: int = 0
    base: int = 0
    reach: int | None = None

    @property
    def title(self) -> str:
        sides = "/".join(str(height) for height, _ in self.shapes)
        size = f"{self.heads} x {self.channels}, {self.points} points"
        return f"{self.place}, {self.queries} queries, {sides}, {size}"


def load() -> list[Site]:
    """What kernel_shapes.json holds."""
    return [
        Site(**{**entry, "presets": tuple(entry["presets"]), "shapes": tuple(map(tuple, entry["shapes"]))})
        for entry in json.loads(FILE.read_text())
    ]


def of_presets() -> list[Site]:
    """The sites of every preset, equal ones together."""
    from mmi_megatron.settings import presets

    found: dict[Site, tuple[str, ...]] = {}
    for preset in presets():
        for site in of_preset(preset):
            names = found.get(site, ())
            found[site] = names if preset in names else (*names, preset)
    return [replace(site, presets=names) for site, names in found.items()]


def of_preset(name: str) -> Iterator[Site]:
    """The sites of one preset, with no name in them."""
    from mmi_megatron.model.unet_mmfs import mmfs_sites
    from mmi_megatron.model.vit_adapter import pyramid_shapes
    from mmi_megatron.settings import load_config

    config = load_config(name)
    model, vision = config.model, config.model.vision
    grid = vision.image_size // vision.patch_size
    shapes = pyramid_shapes(grid)

    def mmfs(place: str, queries: int, mmfs_config, base: int, reach: int | None) -> Site:
        levels = tuple(shapes[level] for level in mmfs_config.levels)
        channels = mmfs_config.value_width // mmfs_config.heads
        return Site(
            place, (), queries, levels, mmfs_config.heads, channels, mmfs_config.points,
            mmfs_config.table_rows, base, reach,
        )  # fmt: skip

    asked = model.language.mmfs
    if asked.kind == "deformable":
        base = asked.base or shapes[asked.levels[0]][0]
        yield mmfs("language", config.data.context_length, asked, base, asked.max_images)
    asked, decoder = model.decoder.mmfs, model.decoder
    if asked.kind == "deformable":
        side = decoder.image_size // (1 if decoder.vae is None else 2 ** (len(decoder.vae.channels) - 1))
        for _, here in mmfs_sites(decoder.unet, side, decoder.mmfs_placement):
            reach = 1 if decoder.references == "nearest" else asked.max_images
            yield mmfs("unet", here * here, asked, asked.base or here, reach)
    adapter = vision.adapter
    channels = int(vision.width * adapter.value_ratio) // adapter.heads
    coarse = shapes[1:]
    positions = sum(height * width for height, width in coarse)
    yield Site("adapter", (), grid * grid, coarse, adapter.heads, channels, adapter.points)
    yield Site("adapter", (), positions, ((grid, grid),), adapter.heads, channels, adapter.points)


def main() -> None:
    lines = ",\n ".join(json.dumps(asdict(site)) for site in of_presets())
    FILE.write_text(f"[{lines}]\n")
    print(f"written to {FILE}")


if __name__ == "__main__":
    main()
