"""Clusters of the data service: starting one, joining one, leaving it.

Whoever may talk to a Ray cluster may run anything on it. Ray (2.52 and later) therefore asks for a token,
which all machines of a cluster share: ``RAY_AUTH_TOKEN``, the file that ``RAY_AUTH_TOKEN_PATH`` names, or
``~/.ray/auth_token``. The first machine makes one if there is none; with ``RAY_AUTH_MODE=disabled`` Ray asks
for nothing.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from data_pipeline.errors import DataError
from data_pipeline.executors.ray_actors import RESOURCE
from data_pipeline.optional import ray
from data_pipeline.settings import DataSettings

NAMESPACE = "mmi-data"
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Environment variables that Ray reads."""

KNOCK = 10.0
"""Seconds that a cluster has to take a connection."""

LEAST_STORE = 256 << 20
"""Bytes of an object store at least."""

PATIENCE = 20.0
"""Seconds that Ray's processes have to end."""


def connect(settings: DataSettings) -> None:
    """Join the cluster that ``data.ray_address`` names, unless this process is in one.

    Raises:
        DataError: when there is none.
    """
    if "ray" not in sys.modules and MODE not in os.environ and has_token():
        os.environ[MODE] = "token"  # Ray itself does so for ``auto`` alone, not for host:port
    if ray.is_initialized():
        return
    common = {
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.WARNING,
        "runtime_env": {"env_vars": {"PYTHONPATH": _path(), "TOKENIZERS_PARALLELISM": "false"}},
    }
    try:
        _knock(settings.ray_address)
        if settings.ray_address == "local":
            # Metrics and the history of tasks are for a dashboard, and there is none; a worker for tasks that
            # are no actor's would never have one.
            config = {
                "enable_metrics_collection": False,
                "task_events_report_interval_ms": 0,
                "prestart_worker_first_driver": False,
            }
            common |= {"include_dashboard": False, "_system_config": config}
            store = {"object_store_memory": store_bytes(settings)}
            ray.init(address="local", num_cpus=settings.workers + 1, **store, **common)
        else:
            ray.init(address=settings.ray_address, **common)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:  # the last: another cluster's token
        raise DataError(
            f"data.ray_address={settings.ray_address}: no Ray cluster answers ({error}); start one with "
            f"`mmi data serve`, give this machine its token ({token_path()}), or set data.ray_address=local"
        ) from None


def serve(address: str | None, workers: int, port: int = 6379) -> int:
    """Make this machine part of the data service until it is interrupted (SIGINT or SIGTERM).

    Args:
        address: ``host:port`` of the cluster to join; None starts one here.
        workers: actors that may decode here at a time.
        port: of a cluster that is started here.

    Returns:
        0 once it was interrupted and Ray has ended; else Ray's exit code.

    Raises:
        DataError: when Ray is not installed, or the token of the cluster to join is not here.
    """
    ray.__version__  # noqa: B018 says what to install when it is missing
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += (
        ["--address", address] if address else ["--head", f"--port={port}", "--include-dashboard=false"]
    )
    command += [f"--num-cpus={workers}", f"--resources={json.dumps({RESOURCE: workers})}"]
    env = _environment(join=address is not None)
    asked: list[int] = []
    # From here on a signal must not end this process alone: Ray would stay behind.
    before = {n: signal.signal(n, lambda n, _: asked.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with subprocess.Popen(command, env=env) as process:
            while not asked:
                try:
                    return process.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
            process.terminate()
            return _ended(process)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def store_bytes(settings: DataSettings) -> int:
    """Bytes of a run's own object store: what may be made ahead, and as much for what is in use.

    The store goes through all of its memory before it uses any again, and to touch a page for the first time
    costs ten times as much as to write to it: one that is larger than needed, as Ray's of 30 % of the memory
    is, makes the first minutes of a run slow and takes that memory for good. What does not fit, as a step
    larger than ``prefetch_bytes``, Ray writes to disk and reads again.
    """
    room = int(0.3 * psutil.virtual_memory().total)
    if Path("/dev/shm").is_dir():  # Ray refuses a store that does not fit
        room = min(room, int(0.9 * psutil.disk_usage("/dev/shm").free))
    return max(LEAST_STORE, min(2 * settings.prefetch_bytes, room))


def _knock(address: str) -> None:
    """See that somebody listens at ``host:port``; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


def has_token() -> bool:
    """Whether this machine has a token for Ray clusters."""
    return bool(os.environ.get(TOKEN)) or token_path().is_file()


def token_path() -> Path:
    """The file that holds the token."""
    return Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def _ended(process: subprocess.Popen) -> int:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
    return 0


def _environment(join: bool) -> dict[str, str]:
    """Of the processes of Ray on this machine; makes the token of a new cluster."""
    own = {**os.environ, "PYTHONPATH": _path()}
    if own.setdefault(MODE, "token") == "token" and not has_token():
        if join:
            raise DataError(f"no token: copy {token_path()} from the cluster's first machine, or set {TOKEN}")
        _make_token(token_path())
    return own


def _make_token(path: Path) -> None:
    """Whole or not at all; one that another process has made meanwhile stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _path() -> str:
    """``PYTHONPATH`` with this package on it."""
    root = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
