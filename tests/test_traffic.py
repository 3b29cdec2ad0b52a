"""The counter of bytes sent, by itself; that it agrees with the sizes: ``tests/test_parallel_options.py``."""

from __future__ import annotations

import pytest


def collectives(names: list[str]) -> tuple[dict[str, float], str]:
    """On a rank of two: what is counted of some collectives, and what was said of one that is refused."""
    import torch
    import torch.distributed as dist

    from mmi_megatron.parallel import groups, traffic
    from tests.tiny import tiny_config

    groups.initialize(tiny_config(2))
    try:
        ours, all_of_us = torch.ones(6), [torch.empty(6), torch.empty(6)]
        gathered = all_of_us if dist.get_rank() == 0 else None
        calls = {
            "all_reduce": lambda: dist.all_reduce(ours),
            "all_gather": lambda: dist.all_gather(all_of_us, ours),
            "gather": lambda: dist.gather(ours, gathered),
        }
        with traffic.Sent() as sent:
            for name in names:
                calls[name]()
        return dict(sent.bytes), ""
    except RuntimeError as error:
        return dict(sent.bytes), str(error)
    finally:
        groups.destroy()


@pytest.mark.parametrize(("name", "sent"), [("all_reduce", 24.0), ("all_gather", 24.0)])
def test_a_collective_counts_what_its_ring_sends(ranks, name, sent):
    for counted, said in ranks.run(2, collectives, [name]):
        assert said == "" and counted == {"other": sent}


def test_a_collective_without_a_rule_is_refused_by_name(ranks):
    for counted, said in ranks.run(2, collectives, ["all_reduce", "gather", "all_reduce"]):
        assert "c10d::gather_ has no rule for the bytes it sends" in said and "Sent._count" in said
        assert counted == {"other": 24.0}
