"""What this machine and environment offer: devices, versions, and which fast paths are in use."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from sys import version_info

from rich.table import Table

from data_pipeline.decode import DECODERS, NEEDS, Decoder
from mmi_megatron import platform

PACKAGES = ("torch", "torchvision", "megatron-core", "timm", "diffusers", "transformers")


@dataclass(frozen=True)
class Finding:
    """One line of the table: ``state`` is a version, "in use" or "falls back"."""

    name: str
    state: str
    detail: str = ""


def examine() -> list[tuple[str, list[Finding]]]:
    """All findings, by section; a machine without torch can prepare data and has no fast paths."""
    if installed("torch") is None:
        return [("versions", versions()), ("fast paths", [image_decoder()])]
    return [
        ("machine", machine()),
        ("versions", versions()),
        ("fast paths", fast_paths()),
    ]


def machine() -> list[Finding]:
    """Device, communication and precision."""
    return [
        Finding("device", platform.device_name(), f"torch built for {platform.torch_build()}"),
        Finding("communication", platform.backend()),
    ]


def versions() -> list[Finding]:
    """Python and the packages the model rests on."""
    python = Finding("python", ".".join(map(str, version_info[:3])))
    return [python, *(Finding(name, installed(name) or "not installed") for name in PACKAGES)]


def installed(distribution: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def fast_paths() -> list[Finding]:
    """What is used where it is there, and what stands in for it."""
    return [transformer_engine(), apex(), flash_attention(), optimizer(), kernels(), image_decoder()]


def transformer_engine() -> Finding:
    """Layers on TransformerEngine's modules, and FP8."""
    name, version = "TransformerEngine", installed("transformer-engine")
    if version is None:
        return Finding(name, "falls back", "not installed; Megatron's own layers")
    return Finding(name, "falls back", f"{version} is installed; layers are Megatron's own all the same")


def apex() -> Finding:
    """NVIDIA's Apex, and not the package of that name on the index, which is another project."""
    if importlib.util.find_spec("apex") is None:
        return Finding("NVIDIA Apex", "falls back", "not installed; built from NVIDIA's source, not by pip")
    if importlib.util.find_spec("amp_C") is None:
        return Finding(
            "NVIDIA Apex", "falls back", "the apex installed here is not NVIDIA's or has no kernels"
        )
    return Finding("NVIDIA Apex", "in use", "multi-tensor kernels of Megatron's optimizer")


def flash_attention() -> Finding:
    """Attention kernels for packed documents."""
    version = installed("flash-attn")
    reason = f"{version} is installed; not used" if version else "not installed"
    return Finding("FlashAttention", "falls back", f"{reason}; torch's attention, document by document")


def optimizer() -> Finding:
    """Whose Adam Megatron chose."""
    from megatron.core.optimizer import Adam

    owner = Adam.__module__.partition(".")[0]
    state = "falls back" if owner == "torch" else "in use"
    return Finding("fused Adam", state, f"{owner}'s {Adam.__name__}")


def kernels() -> Finding:
    """The project's own compiled operators."""
    from mmi_kernels import status

    found = status()
    if found["implementation"] == "compiled":
        return Finding("compiled kernels", "in use", f"CPU, {found['instruction_set']}")
    return Finding("compiled kernels", "falls back", found["reason"] or "not built")


def image_decoder() -> Finding:
    """What decodes the images of training data."""
    chosen = Decoder("auto", 1)
    if chosen.name == DECODERS[1]:
        return Finding("image decoder", "in use", chosen.name)
    missing = DECODERS[1 : DECODERS.index(chosen.name)]
    reasons = "; ".join(f"{name} needs {NEEDS[name]}" for name in missing)
    return Finding("image decoder", "falls back", f"{chosen.name}: {reasons}")


def as_table(sections: list[tuple[str, list[Finding]]]) -> Table:
    """The findings as one table."""
    table = Table("", "", "", show_header=False)
    colours = {"in use": "green", "falls back": "yellow"}
    for section, findings in sections:
        table.add_section()
        table.add_row(f"[bold]{section}")
        for finding in findings:
            colour = colours.get(finding.state)
            state = f"[{colour}]{finding.state}" if colour else finding.state
            table.add_row(f"  {finding.name}", state, finding.detail)
    return table
