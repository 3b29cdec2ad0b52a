"""How many replicas a number of ranks makes; known before any rank is started."""

from __future__ import annotations

from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError


def data_parallel_size(config: Config, ranks: int) -> int:
    """Data-parallel replicas of the model among ``ranks`` ranks.

    Raises:
        ConfigError: when the layout or the global batch does not divide, saying what would.
    """
    parallel, train = config.parallel, config.train
    each = parallel.tensor * parallel.pipeline * parallel.context
    if ranks < 1 or ranks % each:
        raise ConfigError(
            f"parallel.tensor: a replica of the model takes {each} ranks, which does not divide the "
            f"{ranks} of this run; start a multiple of {each} or change parallel.tensor={parallel.tensor}"
        )
    replicas = ranks // each
    if train.rows % (replicas * train.micro_rows):
        raise ConfigError(
            f"train.rows: {train.rows} is no multiple of train.micro_rows={train.micro_rows} times the "
            f"{replicas} replicas that {ranks} ranks make"
        )
    return replicas
