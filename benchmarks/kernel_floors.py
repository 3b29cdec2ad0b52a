"""What an H200 should need for the kernels, from what limits them: ``python -m benchmarks.kernel_floors``.

Nothing is measured. The table says what to expect of ``make gpu`` before it has run on such a card.
Rates: data sheet for HBM; L1 hands out 128 bytes a clock and multiprocessor; L2 takes 4.9 TB/s of
atomic adds (assumed: to be measured first); a multiprocessor issues 128 lane instructions a clock.
"""

from __future__ import annotations

from benchmarks.kernel_shapes import Site, load
from benchmarks.kernels import GPU_IMAGES, GPU_ROWS, RESULTS, VISIBLE

HBM, CLOCK, MULTIPROCESSORS = 4.8e12, 1.755e9, 132
L1 = MULTIPROCESSORS * 128 * CLOCK
LANES = MULTIPROCESSORS * 128 * CLOCK
ATOMICS = 4.9e12
CLASSIC_FORWARD, CLASSIC_BACKWARD = 60, 160  # instructions a channel and sample, counted in the source
# Clocks of a multiprocessor, counted in the source, for 64 queries and one (image, head): 64 pixels of a
# matrix level in one of its passes, and a window without its atomics.
MATRIX_CLOCKS, WINDOW_CLOCKS = 2000, 5000
# Of a window level's atomics, those that still reach L2: the window's own and the corners outside it.
WINDOW_ATOMICS = {"language": 0.5, "unet": 0.1}
REACHED = 0.4  # of the L1's rate by a kernel that gathers 16 bytes a lane and is bound by issue too


def floors(site: Site) -> dict[str, float]:
    """Milliseconds at bf16, ``GPU_ROWS`` rows and up to ``GPU_IMAGES`` images."""
    pairs = GPU_ROWS * site.queries * min(GPU_IMAGES, site.reach or GPU_IMAGES)
    seen = pairs * (VISIBLE if site.place == "language" else 1.0)
    samples = site.heads * len(site.shapes) * site.points
    positions = sum(height * width for height, width in site.shapes)
    width = site.heads * site.channels
    images = GPU_ROWS * GPU_IMAGES
    queries = GPU_ROWS * site.queries if site.rows else pairs
    a_query = 4 * (site.heads * site.points * 2 + samples) if site.rows else 4 * 3 * samples
    moved = 2 * width * (images * positions + queries) + queries * a_query
    return {
        "samples": seen * samples,
        "hbm": moved / HBM * 1e3,
        "l1": seen * samples * 4 * site.channels * 2 / L1 * 1e3,
        "atomics": seen * samples * 4 * site.channels * 4 / ATOMICS * 1e3,
        # Its threads go through images that are not visible too.
        "classic": pairs * samples * site.channels * CLASSIC_FORWARD / LANES * 1e3,
        "classic_backward": pairs * samples * site.channels * CLASSIC_BACKWARD / LANES * 1e3,
    }


def ruled(site: Site, found: dict[str, float]) -> tuple[float, float]:
    """Milliseconds of forward and backward with the second tier where csrc/cuda/plan.h chooses it."""
    sizes = [height * width for height, width in site.shapes]
    coarse = [size for size in sizes if size <= min(256, 32 * site.points)]
    neighbours = {"language": GPU_ROWS * site.queries, "unet": site.queries}.get(site.place, 0)
    fine = [size for size in sizes if size >= 1024 and neighbours >= 1024]
    level = 1 / len(sizes)
    tiles = found["samples"] * level / site.points / 64  # of 64 queries, an image and head each
    clock = MULTIPROCESSORS * CLOCK / 1e3
    matrices = tiles * sum(-(-size // 64) for size in coarse) * MATRIX_CLOCKS / clock
    windows = tiles * len(fine) * WINDOW_CLOCKS / clock
    gathered = found["l1"] / REACHED * (1 - level * len(coarse))
    reaching = 1 - level * (len(coarse) + len(fine) * (1 - WINDOW_ATOMICS.get(site.place, 1)))
    forward = max(gathered + matrices, found["hbm"])
    return forward, max(gathered + found["atomics"] * reaching + 2 * matrices + windows, found["hbm"])


def row(site: Site) -> str:
    found = floors(site)
    forward = max(found["l1"] / REACHED, found["hbm"])
    backward = found["atomics"] + forward
    second, second_backward = ruled(site, found)
    classic = max(found["classic"], found["l1"], found["hbm"])
    classic_backward = max(found["classic_backward"], found["atomics"] + classic)
    cells = [
        f"{', '.join(site.presets)}: {site.title}",
        f"{found['samples'] / 1e6:.1f} M",
        *(f"{found[name] * 1e3:.0f}" for name in ("hbm", "l1", "atomics")),
        *(f"{time * 1e3:.0f}" for time in (forward, backward, second, second_backward)),
        *(f"{time * 1e3:.0f}" for time in (classic, classic_backward)),
        f"{classic / forward:.1f}, {classic_backward / backward:.1f}",
        f"{classic / second:.1f}, {classic_backward / second_backward:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    columns = ["case (bf16)", "samples", "HBM floor us", "L1 floor us", "atomics floor us"]
    columns += ["first tier: forward us", "backward us", "as the rule says: forward us", "backward us"]
    columns += ["classic forward us", "classic backward us"]
    columns += ["first tier: times faster than classic (forward, backward)", "as the rule says"]
    tokens, pixels = WINDOW_ATOMICS.values()
    about = f"""\
# Deformable attention on an H200: expected, NOT YET RUN

No line of this table was measured. `make gpu PYTHON=python3`, on a machine with a GPU and a torch with
CUDA, tests the kernels and writes the measured table, kernels_cuda_<date>.md, by
`python -m benchmarks.kernels`.

The figures follow from floors (benchmarks/kernel_floors.py): bytes that must cross HBM, at
{HBM / 1e12} TB/s; bytes that samples read from L1, at {L1 / 1e12:.1f} TB/s; the value's gradient,
added in L2 at an assumed {ATOMICS / 1e12} TB/s. Forward: {REACHED:.0%} of the L1's rate. Backward,
first tier: the atomics of every sample reach L2, and the forward's reads happen once more. As the rule
of plan.h says: levels of at most 256 pixels by tensor cores at {MATRIX_CLOCKS} clocks a piece, levels of at
least 1024 with windows at {WINDOW_CLOCKS}, after which {tokens:.0%} (tokens) or {pixels:.0%} (U-Net) of
their atomics reach L2: counts of instructions and of pixels touched, the least sure of these figures.
Classic kernel: {CLASSIC_FORWARD} and {CLASSIC_BACKWARD} instructions a channel and sample,
images that are not visible included, with locations and softmax given.

{GPU_ROWS} rows of {GPU_IMAGES} images (fewer where fewer are within reach), {VISIBLE:.0%} of a row's
(token, image) pairs visible. Shapes of fewer than a million samples are left out: launches outlast
them.
"""
    lines = [about, f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [row(site) for site in load() if floors(site)["samples"] >= 1e6]
    path = RESULTS / "kernels_gpu_expected.md"
    path.write_text("\n".join(lines) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
