"""The engine on DeepSpeed: data parallelism with ZeRO 0 to 3, gradients averaged once per optimizer step."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from unite_fast.config import Config
from unite_fast.engine.backend import AutocastForward, clip_coefficient, gradient_norm, total_norm
from unite_fast.engine.gathering import FlatGroup, WeightGather
from unite_fast.engine.optim import MAX_STAGES, Groups, MuonAdamW, matrix_shape
from unite_fast.engine.reduction import GradientMean
from unite_fast.engine.sharding import Fragment, Layout, MatrixExchange, flat_fragments
from unite_fast.engine.world import World
from unite_fast.errors import UserError

# Elements of a buffer that gradients are averaged through, of which IN_FLIGHT exist: 100 MB in float32 keep NVLink
# busy, and take 2.5 ms on a 400 Gbit/s adapter, beside which the hops of 32 ranks' ring, 6 µs each, are little. From
# there on it grows with the ranks, whose micro-batches leave the memory for it, up to a stage of the reduction.
BUCKET_ELEMENTS, BUCKET_RANKS = 25_000_000, 32
# ZeRO 3 steps a group in pieces of this many elements; one piece a group, since Apex counts calls as steps.
UNDIVIDED = 10**12


def read_in_bf16(model: nn.Module, groups: Groups, autocast: torch.dtype | None, *, fp8: bool) -> set[str]:
    """Names of Muon's matrices that the training passes read as autocast's bfloat16 copy and in no other way."""
    if autocast is not torch.bfloat16 or fp8:  # FP8 products scale and round the float32 weight
        return set()
    return {name for kind, group in groups if kind == "muon" for name in group} - model.float32_matrices()


def bucket_elements(ranks: int, elements: int) -> int:
    """Elements of the buffer through which this number of ranks averages this number of gradient elements in total."""
    return max(BUCKET_ELEMENTS, min(BUCKET_ELEMENTS * ranks // BUCKET_RANKS, elements // MAX_STAGES))


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed package, quiet, on this device, without the communication extra it would compile for CPUs.

    Raises:
        UserError: not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would pick CUDA even for a run with train.device cpu
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"several processes and ZeRO need DeepSpeed ({error}): pip install 'unite_fast[deepspeed]', "
            "or start one process with train.zero_stage 0"
        ) from None
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cpu":
        # A shared-memory all-reduce for inference. Building it takes 100 s on two cores, a killed build leaves a lock
        # that hangs the next start, and training never calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedBackend:
    """DeepSpeed with our optimizer under it.

    DeepSpeed's own Muon is a different algorithm (another scale, clipping after the orthogonalisation), so `MuonAdamW`
    is passed to it as a client optimizer; under ZeRO 1 and 2 it sees one flat slice per group and assembles matrices
    through a `MatrixExchange`.

    A step's backward passes add gradients locally. The last one averages them, once; under ZeRO 0 to 2 this overlaps
    with the backward and is done by a `GradientMean`, for two reasons. DeepSpeed's hooks would miss parameters that
    only earlier passes use. And DeepSpeed 0.19 has no reduce-scatter under ZeRO 1 and 2: whatever `reduce_scatter`
    says, it all-reduces every bucket (twice the traffic) or, with `use_multi_rank_bucket_allreduce` off, reduces to one
    owner after the other (n times n - 1 hops; B on 32 GPUs: slower than the all-reduce, by the plan's model of NCCL).

    DeepSpeed would wait for the updated weights at the end of its step. Under ZeRO 1 and 2 a `WeightGather` gathers
    them while the next forward runs, and only the counters of DeepSpeed's step are used.
    """

    def __init__(
        self,
        forward: AutocastForward,
        groups: Groups,
        optimizer: MuonAdamW,
        config: Config,
        world: World,
    ):
        deepspeed = import_deepspeed(world.device)
        self._stage, self._clip, self._world = config.train.zero_stage, config.optimizer.clip_norm, world
        self._optimizer = optimizer
        places = {name: place for place, name in enumerate(forward.model.reading_order())}
        self._gathered_parameters = deepspeed.zero.GatheredParameters
        self._parameters = {name: p for _, group in groups for name, p in group.items()}
        shapes = {name: p.shape for name, p in self._parameters.items()}  # ZeRO 3 empties the parameters
        self._accumulation: ExitStack | None = None
        elements = sum(shape.numel() for shape in shapes.values())
        self._engine, *_ = deepspeed.initialize(
            model=forward,
            optimizer=optimizer,
            config=deepspeed_config(self._stage, self._clip, elements),
        )
        self._zero = self._engine.optimizer
        kinds = {name: kind for kind, group in groups for name in group}
        self.masters = {kind: [] for kind, _ in groups}
        if self._stage == 0:
            self.layout = Layout.whole(self._parameters)
            self.masters = {kind: list(group.values()) for kind, group in groups}
        elif self._stage < 3:
            masters = [group["params"][0] for group in optimizer.param_groups]
            fragments = []
            load = [0] * world.size
            for index, ((kind, group), master) in enumerate(zip(groups, masters, strict=True)):
                self.masters[kind].append(master)
                sizes = {name: shapes[name] for name in group}
                fragments += flat_fragments(sizes, index, master.numel(), world.rank)
                if kind == "muon":
                    matrices = [matrix_shape(shape) for shape in sizes.values()]
                    exchange = MatrixExchange(matrices, master.numel(), world.rank, world.size, load)
                    optimizer.exchanges[master] = exchange
            self.layout = Layout(masters, fragments, sharded=True)
            self._check_layout()
        else:
            masters = list(self._zero.fp32_partitioned_groups_flat)
            self.layout = Layout(masters, self._pieces(shapes, masters), sharded=True)
            self._check_layout()
            for index, master in enumerate(masters):
                name = next(f.name for f in self.layout.fragments if f.master == index)
                self.masters[kinds[name]].append(master)
        self._gather: WeightGather | None = None
        self._means: list[Tensor] = []
        if self._stage in (1, 2):
            self._zero.step = self._step_slices
            flat = [
                FlatGroup(whole, master, [f for f in fragments if f.master == index])
                for index, (whole, master) in enumerate(zip(self._zero.bit16_groups_flat, masters, strict=True))
            ]
            self._gather = WeightGather(
                forward.model,
                flat[::-1],  # `in_stages` begins with what is read last
                rounded=read_in_bf16(forward.model, groups, forward.dtype, fp8=config.train.fp8),
                lazily=not config.train.compile,
                rank=world.rank,
                ranks=world.size,
            )
        self._mean = None
        if self._stage < 3:
            self._mean = GradientMean(
                [list(group.values()) for _, group in groups],
                [master.numel() for master in self.layout.masters] if self._stage else None,
                [[-places[name] for name in group] for _, group in groups],
                ranks=world.size,
                bucket=bucket_elements(world.size, elements),
                like=self.layout.masters[0],
            )

    def forward(self, phase: str, inputs: dict[str, Any]) -> Any:
        if self._gather is not None:
            self._gather.before_forward()
        return self._engine(phase, **inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        if self._accumulation is None:
            self._accumulation = ExitStack()
            self._accumulation.enter_context(
                self._engine.no_sync() if self._stage == 0 else self._engine.coalesce_grad_reduction()
            )
        if last and self._mean is not None:
            self._mean.begin(loss)
        self._engine.backward(loss)
        if not last:
            return
        means = [] if self._mean is None else self._mean.finish()
        if means:
            for parameter in self._parameters.values():
                parameter.grad = None
        self._accumulation.close()
        self._accumulation = None
        self._means = means
        for index in range(len(means)):
            self._zero.averaged_gradients[index] = None  # zeros: DeepSpeed found no gradients to reduce

    def update(self) -> Tensor:
        if self._stage == 3:
            self._engine.step()
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._world.device)
            return norm.float()
        norm = gradient_norm(list(self._parameters.values())) if self._stage == 0 else self._partitions_norm()
        self._optimizer.clip_coefficient = clip_coefficient(norm, self._clip)
        self._engine.step()
        return norm

    def _step_slices(self) -> None:
        """The optimizer on this rank's slices, in the place of DeepSpeed's own step."""
        for master, mean in zip(self.layout.masters, self._means, strict=True):
            master.grad = mean
        self._means = []
        self._optimizer.step()
        for master in self.layout.masters:
            master.grad = None
        self._gather.begin()

    def publish(self) -> None:
        if self._gather is not None:
            self._gather.publish()
        elif self._stage == 3:
            for name, full in self.layout.gather(lambda master: master):
                parameter = self._parameters[name]
                with self._gathered_parameters([parameter], modifier_rank=0):
                    parameter.data.copy_(full)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        # ZeRO 3's module hooks release a layer after its forward and fetch it with a collective before the next,
        # which would hang an evaluation that one rank runs alone.
        offload = self._zero.parameter_offload
        with self._gathered_parameters(list(self._parameters.values())):
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def _partitions_norm(self) -> Tensor:
        """Global norm of ZeRO 1's and 2's averaged gradients.

        DeepSpeed would take it too, but read it on the host, which drains the device once a step.
        """
        squares = total_norm(self._means).square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def _pieces(self, shapes: dict[str, torch.Size], masters: list[Tensor]) -> list[Fragment]:
        """ZeRO 3's fragments: every parameter cut into equal pieces, the last padded."""
        from deepspeed.utils import safe_get_local_fp32_param

        starts = {master.data_ptr(): index for index, master in enumerate(masters)}
        fragments = []
        for name, shape in shapes.items():
            piece = safe_get_local_fp32_param(self._parameters[name])
            index = starts[piece.untyped_storage().data_ptr()]
            start = min(self._world.rank * piece.numel(), shape.numel())
            length = min(piece.numel(), shape.numel() - start)
            offset = piece.storage_offset() - masters[index].storage_offset()
            fragments.append(Fragment(name, shape, index, offset, start, length))
        return fragments

    def _check_layout(self) -> None:
        """Check that DeepSpeed's layout is the one computed here; a future version may use another order."""
        for fragment in self.layout.fragments:
            parameter = self._parameters[fragment.name]
            held = self.layout.masters[fragment.master].detach()[fragment.offset : fragment.offset + fragment.length]
            if self._stage == 3:
                expected = parameter.ds_tensor.detach().view(-1)[: fragment.length]
            else:
                expected = parameter.detach().reshape(-1)[fragment.start : fragment.start + fragment.length]
            if not torch.equal(held, expected):
                raise RuntimeError(
                    f"this DeepSpeed lays {fragment.name} out in an unknown way: install the version in setup.py"
                )


def deepspeed_config(stage: int, clip_norm: float | None, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary.

    Batch keys only feed its own counters: accumulation, scaling and data are ours, so it sees one unit per step.

    Args:
        stage: ZeRO stage.
        clip_norm: used by ZeRO 3 alone; below it we clip.
        elements: trained parameters, which bound ZeRO 3's buffer.
    """
    bucket = min(BUCKET_ELEMENTS, elements + elements % 2)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,  # with one reduction behind the last backward there is nothing to overlap with
        "contiguous_gradients": True,
        "round_robin_gradients": False,  # the flat order is then the group's order
        "reduce_bucket_size": bucket,
    }
    if stage in (1, 2):
        zero["compute_grad_norm"] = False
        zero["reduce_bucket_size"] = 1  # it reduces nothing there and needs no buffer
    if stage == 3:
        zero["sub_group_size"] = UNDIVIDED
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": (clip_norm or 0.0) if stage == 3 else 0.0,
        "steps_per_print": None,
        # Its throughput timer waits for the device at every forward.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
