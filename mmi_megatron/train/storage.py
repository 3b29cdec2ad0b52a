"""A folder on a file system: this machine's, or any that fsspec knows (``s3://bucket/run``).

What is written to a local folder is on its disk when a call returns; an object store takes a file
whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from mmi_megatron.errors import ConfigError


class Folder:
    """A folder by its address.

    Args:
        address: a path, or a URL of a protocol that fsspec knows.

    Attributes:
        address: as given; of a local folder, its path.
        local: its path where it is on this machine's file system, else None.

    Raises:
        ConfigError: for a protocol that is unknown or whose package is missing.
    """

    def __init__(self, address: str | Path | Folder):
        self.address = str(address).rstrip("/")
        self.local = None if "://" in self.address else Path(self.address)
        self.fs: Any = None
        if self.local is None:
            # A checkpoint changes while it is looked at: nothing of a listing is kept.
            options = {"use_listings_cache": False} if self.address.startswith("s3") else {}
            try:
                self.fs, self.root = url_to_fs(self.address, **options)
            except (ImportError, ValueError) as error:
                raise ConfigError(f"{self.address}: {error}") from error

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"Folder({self.address!r})"

    def __fspath__(self) -> str:
        if self.local is None:
            raise TypeError(f"{self.address} is no local folder")
        return str(self.local)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.address}/{name}")

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        """The folder that this one is in."""
        return Folder(self.address.rpartition("/")[0] or ".")

    def files(self) -> dict[str, int]:
        """Bytes of every file in it and below, by its name from here; empty if there is no such folder."""
        if self.local is not None:
            found = (path for path in self.local.rglob("*") if path.is_file())
            return {path.relative_to(self.local).as_posix(): path.stat().st_size for path in found}
        self.fs.invalidate_cache()
        entries = self.fs.find(self.root, detail=True)
        return {name[len(self.root) + 1 :]: entry["size"] for name, entry in entries.items()}

    def folders(self) -> list[str]:
        """Names of the folders directly in it."""
        if self.local is not None:
            return (
                [path.name for path in self.local.iterdir() if path.is_dir()] if self.local.is_dir() else []
            )
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "directory"]

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file's bytes, or those from ``start`` up to ``end``; nothing else of it is fetched.

        Raises:
            FileNotFoundError: naming it.
        """
        if self.local is None:
            return self.fs.cat_file(f"{self.root}/{name}", start=start, end=end)
        with (self.local / name).open("rb") as file:
            file.seek(start or 0)
            return file.read(-1 if end is None else end - (start or 0))

    def write(self, name: str, data: bytes) -> None:
        """Write a file."""
        if self.local is None:
            self.fs.pipe_file(f"{self.root}/{name}", data)
            return
        self.local.mkdir(parents=True, exist_ok=True)
        draft = self.local / f"{name}.writing"
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self.local / name)

    def put(self, path: Path, name: str) -> None:
        """Copy a file of this machine to here."""
        if self.local is None:
            self.fs.put_file(str(path), f"{self.root}/{name}")
        elif path != self.local / name:
            shutil.copyfile(path, self.local / name)

    def remove(self, name: str) -> None:
        """Delete one file, if it is there."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
        elif self.fs.exists(f"{self.root}/{name}"):
            self.fs.rm_file(f"{self.root}/{name}")

    def delete(self) -> None:
        """Delete it with all that is in it, if it is there."""
        if self.local is not None:
            shutil.rmtree(self.local, ignore_errors=True)
        elif names := self.files():
            self.fs.rm([f"{self.root}/{name}" for name in names])

    @contextmanager
    def small_files_here(self, *names: str) -> Iterator[Path]:
        """A local folder with these files: itself, or for the time being a copy."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory(prefix="mmi_") as copy:
            for name in names:
                (Path(copy) / name).write_bytes(self.read(name))
            yield Path(copy)
