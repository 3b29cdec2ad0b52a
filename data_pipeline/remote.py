"""Object stores behind one narrow interface: S3 through s3fs, everything else through fsspec.

Nothing is tried again here; an answer is sorted into what is final and what may pass.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Protocol

from data_pipeline.errors import DataError

PASSING = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "RequestTimeTooSkewed"}
"""S3's codes of errors that may pass, beside every status of 500 and above, 408 and 429."""


class Transient(Exception):
    """May work when it is tried again."""


class Gone(Exception):
    """There is no such file."""


class Changed(Exception):
    """The file is not the one that was asked for."""


class Remote(Protocol):
    """Files by URL. Every method may raise ``Transient``, ``Gone`` or ``PermissionError``."""

    async def read(self, url: str, offset: int, size: int, etag: str) -> bytes:
        """Bytes at a place, fewer only where the file ends; ``Changed`` unless the ETag fits or is empty."""

    async def stat(self, url: str) -> tuple[int, str]:
        """Size and ETag."""

    async def list(self, folder: str) -> list[tuple[str, int, str]]:
        """URL, size and ETag of the files right in a folder."""

    async def write(self, url: str, blob: bytes) -> None:
        """Write a file, whole or not at all."""


def open_remote(scheme: str, connections: int) -> Remote:
    """The store behind a URL's scheme.

    Raises:
        DataError: when the package for it is not there.
    """
    try:
        if scheme in ("s3", "s3a"):
            return S3(connections)
        import fsspec

        return Generic(fsspec.filesystem(scheme, skip_instance_cache=True))
    except ImportError as error:
        raise DataError(
            f"{scheme}:// cannot be read here ({error}); install mmi-megatron[data-service] or its package"
        ) from None
    except ValueError as error:
        raise DataError(f"{scheme}:// is no storage that fsspec knows ({error})") from None


class S3:
    """S3 and what speaks like it; endpoint, region and credentials from where AWS looks for them."""

    def __init__(self, connections: int):
        import s3fs

        config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": connections}
        self.files = s3fs.S3FileSystem(
            asynchronous=True, skip_instance_cache=True, use_listings_cache=False, config_kwargs=config
        )

    async def read(self, url: str, offset: int, size: int, etag: str) -> bytes:
        wanted = {
            "Range": f"bytes={offset}-{offset + size - 1}",
            **({"IfMatch": f'"{etag}"'} if etag else {}),
        }
        client, place = await self._client(url)
        try:
            answer = await client.get_object(**place, **wanted)
            async with answer["Body"] as body:
                blob = await body.read()
        except Exception as error:
            raise _sorted(error, etag) from error
        found = answer.get("ETag", "").strip('"')
        if etag and found != etag:
            raise Changed(f"ETag {etag} when it was indexed, now {found}")
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
        start, last, total = (int(n) for n in span.groups()) if span else (0, len(blob) - 1, len(blob))
        if start != offset or last != min(offset + size, total) - 1 or len(blob) != last - start + 1:
            raise Transient(f"{len(blob)} bytes from {start} in place of {size} from {offset}")
        return blob

    async def stat(self, url: str) -> tuple[int, str]:
        client, place = await self._client(url)
        try:
            answer = await client.head_object(**place)
        except Exception as error:
            raise _sorted(error, "") from error
        return answer["ContentLength"], answer["ETag"].strip('"')

    async def list(self, folder: str) -> list[tuple[str, int, str]]:
        client, place = await self._client(folder.rstrip("/") + "/")
        found = []
        try:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=place["Bucket"], Prefix=place["Key"], Delimiter="/"
            )
            async for page in pages:
                for item in page.get("Contents", []):
                    url = f"s3://{place['Bucket']}/{item['Key']}"
                    found.append((url, item["Size"], item["ETag"].strip('"')))
        except Exception as error:
            raise _sorted(error, "") from error
        return found

    async def write(self, url: str, blob: bytes) -> None:
        client, place = await self._client(url)
        try:
            await client.put_object(**place, Body=blob)
        except Exception as error:
            raise _sorted(error, "") from error

    async def _client(self, url: str) -> tuple[Any, dict[str, str]]:
        bucket, _, key = url.partition("://")[2].partition("/")
        if "@" in bucket:
            raise DataError("a URL of storage holds credentials; give them by environment, file or role")
        await self.files.set_session()
        return await self.files.get_s3(bucket), {"Bucket": bucket, "Key": key}


def _sorted(error: Exception, etag: str) -> Exception:
    """What an error of botocore or aiohttp means. Its text never holds credentials: only S3's code and
    the kind of a broken connection are kept."""
    from aiohttp import ClientError as Broken
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
        NoCredentialsError,
        ResponseStreamingError,
    )

    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status == 412 or code == "PreconditionFailed":
            return Changed(f"ETag {etag} when it was indexed, now another")
        if status == 416 or code == "InvalidRange":
            return Changed("shorter than when it was indexed")
        if code == "NoSuchBucket" or status == 404:
            return Gone(code)
        if status in (401, 403):
            return PermissionError(code)
        if status in (408, 429) or status >= 500 or status < 400 or code in PASSING:
            return Transient(f"{code} (status {status})")
        return DataError(f"storage refuses the request: {code} (status {status})")
    if isinstance(error, NoCredentialsError):
        return PermissionError("no AWS credentials found")
    passing = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError, Broken, OSError)
    if isinstance(error, passing):
        return Transient(f"connection: {type(error).__name__}")
    if isinstance(error, BotoCoreError):
        # An answer cut short in its XML, as it cannot be parsed, is one of these.
        return Transient(f"answer: {type(error).__name__}")
    return error


class Generic:
    """Any file system of fsspec, called in threads."""

    def __init__(self, files: Any):
        self.files = files

    async def read(self, url: str, offset: int, size: int, etag: str) -> bytes:
        def work() -> bytes:
            blob = self.files.cat_file(url, start=offset, end=offset + size)
            total, found = self._stat(url)
            if etag and found != etag:
                raise Changed(f"ETag {etag} when it was indexed, now {found}")
            if len(blob) != max(min(size, total - offset), 0):
                raise Transient(f"{len(blob)} bytes in place of {size} from {offset}")
            return blob

        return await self._call(work)

    async def stat(self, url: str) -> tuple[int, str]:
        return await self._call(self._stat, url)

    async def list(self, folder: str) -> list[tuple[str, int, str]]:
        def work() -> list[tuple[str, int, str]]:
            self.files.invalidate_cache()
            names = [i["name"] for i in self.files.ls(folder, detail=True) if i["type"] == "file"]
            urls = [self.files.unstrip_protocol(name) for name in names]
            return [(url, *self._stat(url)) for url in urls]

        return await self._call(work)

    async def write(self, url: str, blob: bytes) -> None:
        def work() -> None:
            self.files.makedirs(url.rpartition("/")[0], exist_ok=True)
            self.files.pipe_file(url, blob)

        await self._call(work)

    def _stat(self, url: str) -> tuple[int, str]:
        self.files.invalidate_cache()
        info = self.files.info(url)
        etag = info.get("ETag") or info.get("etag") or self.files.ukey(url)
        return int(info["size"]), str(etag).strip('"')

    async def _call(self, work: Any, *args: Any) -> Any:
        try:
            return await asyncio.to_thread(work, *args)
        except FileNotFoundError as error:
            raise Gone(str(error)) from error
        except PermissionError:
            raise
        except OSError as error:
            raise Transient(f"{type(error).__name__}: {error}") from error
