"""Says what ``make gpu`` needs and does not find: ``python tests/gpu/ready.py``; exits 1 then."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys

# What the GPU tests import besides torch, with what these need in turn.
PACKAGES = ("pytest", "pluggy", "iniconfig", "packaging", "pygments", "hypothesis", "sortedcontainers")
PACKAGES += ("safetensors", "numpy")


def missing() -> list[str]:
    """Names of the packages that are not installed."""

    def there(name: str) -> bool:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    return [name for name in PACKAGES if not there(name)]


def problems() -> list[str]:
    """What stands in the way, one sentence each."""
    found = []
    try:
        import torch
    except ImportError as error:
        return [f"torch cannot be imported: {error}"]
    if not torch.cuda.is_available():
        found.append(f"torch {torch.__version__} sees no GPU")
    if names := missing():
        python, wanted = f"{sys.version_info.major}.{sys.version_info.minor}", " ".join(names)
        found.append(
            f"{sys.executable} lacks {wanted}. Install them, or carry wheels: elsewhere `python -m pip "
            f"download --no-deps --only-binary=:all: --python-version {python} -d wheels {wanted}`, here "
            "`python -m pip install --no-index --no-deps wheels/*.whl`"
        )
    return found


def main() -> None:
    found = problems()
    for problem in found:
        print(f"make gpu: {problem}", file=sys.stderr)
    if found:
        sys.exit(1)
    import torch

    for tool, without in (
        ("nvcc", "only a library built before can run"),
        ("compute-sanitizer", "it is left out"),
    ):
        if shutil.which(tool) is None:
            print(f"make gpu: no {tool} on the PATH: {without}")
    print(f"make gpu: torch {torch.__version__}, {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
