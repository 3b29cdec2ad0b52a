"""The first stage's visual tokenizer runs one micro-batch ahead.

In Megatron's 1F1B schedule the first stage hands on a micro-batch and then waits: in the warm-up until the
second stage has taken it, later until the gradient of an earlier one comes back. Here the exchange is
started, the images of the next micro-batch are tokenized meanwhile, and then it is waited for. Every
operation is done on the same numbers as otherwise and gradients are added up in the same order, so a
run is the same to the bit. Tried over gloo; over NCCL it has not run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class AheadCommunicator(p2p_communication.P2PCommunicator):
    """Megatron's exchanges as the first stage makes them, with time for something else meanwhile.

    What is sent and received, and in which order, is what Megatron's own exchange does, so the second
    stage needs no other one.

    Args:
        config: Megatron's.
        meanwhile: done while an exchange is under way, at the same place in the schedule on every rank
            of the stage, as it is collective over tensor parallelism.
    """

    def __init__(self, config: TransformerConfig, meanwhile: Callable[[], None]):
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        self.meanwhile = meanwhile

    def send_forward(self, output_tensors, is_last_stage: bool) -> None:
        """See Megatron."""
        self._exchange(output_tensors, receives=False)

    def send_forward_recv_backward(self, output_tensors, tensor_shapes, is_last_stage: bool):
        """See Megatron."""
        return [self._exchange(output_tensors, receives=True)]

    def _exchange(self, outputs: list[Tensor], receives: bool) -> Tensor | None:
        """Send the payload to the second stage and receive the gradient of an earlier one."""
        (payload,) = outputs
        shape = torch.tensor(payload.shape, dtype=torch.int64, device=payload.device)
        back = torch.empty_like(shape)
        operations = [dist.P2POp(dist.isend, shape, self.next_rank, self.pp_group)]
        if receives:
            operations.append(dist.P2POp(dist.irecv, back, self.next_rank, self.pp_group))
        works = [*dist.batch_isend_irecv(operations), *self._start(send=payload)]
        self.meanwhile()
        for work in works:
            work.wait()
        if not receives:
            return None
        gradient = torch.empty(back.tolist(), dtype=self.config.pipeline_dtype, device=payload.device)
        for work in self._start(receive=gradient):
            work.wait()
        return gradient

    def _start(self, send: Tensor | None = None, receive: Tensor | None = None) -> Iterable[dist.Work]:
        """Start to send to the second stage or to receive from it, through the groups that it expects."""
        return p2p_communication._p2p_ops(
            tensor_send_prev=None,
            tensor_recv_prev=None,
            tensor_send_next=send,
            tensor_recv_next=receive,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        ).values()


def groups() -> ProcessGroupCollection:
    """The process groups that Megatron's schedule asks for beside a communicator of one's own."""
    return ProcessGroupCollection(
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        embd=parallel_state.get_embedding_group(check_initialized=False),
        pos_embd=parallel_state.get_position_embedding_group(check_initialized=False),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
