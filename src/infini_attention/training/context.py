"""Context parallelism in training: which rows and which part of them a process gets."""

from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader

from infini_attention.models.loss import shifted
from infini_attention.ops.context_parallel import segment_split
from infini_attention.training.segments import cut


class ContextShare:
    """This process's place among those that share the same sequences, `size` of them in a group.

    `number` counts the groups, and so what is different from group to group: rows, and what is drawn.
    """

    def __init__(self, size: int, process: int, group: Any = None) -> None:
        self.size = size
        self.number, self.rank = divmod(process, size)
        self._group = group

    @classmethod
    def of(cls, args: Any) -> "ContextShare":
        """The share that `args.context_parallel_size` and the running processes make."""
        size = args.context_parallel_size
        if size == 1:
            return cls(1, args.process_index)
        group, _ = dist.new_subgroups(group_size=size)
        return cls(size, args.process_index, group)

    def shared(self, loader: DataLoader) -> DataLoader:
        """`loader`, which gives every process rows of its own, changed to give a group the same ones."""
        if self.size > 1:
            shard: Any = loader.batch_sampler
            shard.num_processes //= self.size
            shard.process_index = self.number
        return loader

    def share(self, inputs: dict[str, Any], segment_length: int) -> dict[str, Any]:
        """This process's run of segments of the rows in `inputs`, with labels that reach past its end."""
        if self.size == 1:
            return inputs
        inputs = dict(inputs)
        length = inputs["input_ids"].shape[1]
        run = segment_split(length, segment_length=segment_length, ranks=self.size)[self.rank]
        labels, weights = inputs.pop("labels", None), inputs.pop("segment_weights", None)
        inputs["shift_labels"] = shifted(labels, inputs.pop("shift_labels", None))
        mine = cut(inputs, run)
        if weights is not None:
            columns = slice(run.start // segment_length, -(-run.stop // segment_length))
            mine["segment_weights"] = weights[:, columns]
        return mine | {"context_group": self._group}
