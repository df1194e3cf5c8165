"""Rank and device of this process, and communication between the processes of a run."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unite_fast.config import Config
from unite_fast.engine.launch import launch_environment
from unite_fast.errors import UserError, require_none

# A node that loads a cold file system can lag by minutes; a rank that died should still be noticed the same hour.
TIMEOUT = timedelta(minutes=30)
# Looks, a second apart: a node may have a network folder's entries as they were a minute ago (NFS, acdirmax).
SETTLED = 70
TOLD = 1.0  # seconds that a rank has to say what is wrong before the others end
GLOO_THREADS = "pt_gloo_runloop"  # what PyTorch calls those that run gloo's collectives
LOOK = 0.01  # seconds: twice what a thread that waits for the interpreter's lock lets pass before it asks for it again
LAST_LOOK = 30.0  # seconds: those threads free tensors in milliseconds; one that is still busy is broken, not slow


@dataclass(frozen=True)
class World:
    """This process among the processes of a run.

    Attributes:
        rank: 0 … size − 1 over all nodes.
        size: number of processes.
        local_rank: 0 … on this node; the CUDA device index.
        device: where this process computes.
        local_size: number of processes on this node, which share its memory.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def all_true(self, flag: bool) -> bool:
        """True if `flag` is true on every rank. Collective: every rank must call it; waits for the device."""
        if self.size == 1:
            return flag
        vote = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MIN)
        return bool(vote.item())

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank; the others' is ignored. Collective, any object that pickles."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank. Collective, any object that pickles."""
        if self.size == 1:
            return [value]
        box = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.all_true(True)

    def require_none(self, problems: Sequence[str], what: str) -> None:
        """End all ranks where one finds problems, telling those that several find alike once. Collective.

        Args:
            problems, what: as for `errors.require_none`.

        Raises:
            UserError: on the first of the ranks that find the same; says all of it.
            SystemExit: on the others, with the exit code of a mistake.
        """
        found = self.collect(list(problems))
        if found.index(found[self.rank]) == self.rank:
            require_none(problems, what)
        if any(found):
            time.sleep(TOLD)  # launchers end all ranks, also one that is about to print, once the first has ended
            sys.exit(2)


def init_world(config: Config) -> World:
    """`join_world` on the configuration's device; ZeRO needs a process group even for a lone process."""
    return join_world(config.train.device, always_group=config.train.zero_stage > 0)


def join_world(wanted: str = "auto", *, always_group: bool = False) -> World:
    """Find this process's place and device, and join the process group where there are several processes.

    NCCL on CUDA, gloo on CPU.

    Args:
        wanted: auto, cpu or cuda.
        always_group: make a process group for a lone process too.

    Raises:
        UserError: CUDA asked for and absent, fewer GPUs than local ranks, incomplete launcher variables.
    """
    launched = launch_environment(dict(os.environ))
    rank = int(launched.get("RANK", 0))
    size = int(launched.get("WORLD_SIZE", 1))
    local_rank = int(launched.get("LOCAL_RANK", 0))
    device = _device(wanted, local_rank)
    if (size > 1 or always_group) and not dist.is_initialized():
        on_gpu, lone = device.type == "cuda", {}
        if size > 1:
            os.environ.update(launched)  # DeepSpeed reads LOCAL_RANK from here, also when srun set it
        else:
            os.environ.setdefault("LOCAL_RANK", "0")
            lone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None, **lone
        )
    world = World(rank, size, local_rank, device)
    return replace(world, local_size=world.collect(node := platform.node()).count(node))


def leave_world() -> None:
    """Leave the process group, where there is one, so that the process can end. For a `finally`.

    With NCCL and several ranks nothing is done while an exception propagates: leaving would wait for the node's other
    ranks, which wait in a collective for this one. The process then ends without leaving, and its launcher ends the
    others. (So do not call it inside an `except` either.)

    A thread of gloo frees a collective's tensors a moment after the collective has returned, which takes the
    interpreter's lock. Where the interpreter ends in that moment the process aborts, "terminate called without an
    active exception", so this waits until those threads (on Linux, where they can be seen) have nothing left to do.

    A mistake that several ranks find alike goes on, to be told, on the first of them that comes here.

    Raises:
        SystemExit: on the others, with the exit code of a mistake.
    """
    if not dist.is_initialized():
        return
    error = sys.exception()
    told = isinstance(error, UserError) and not _first_to_find(error)
    if error is None or dist.get_backend() != "nccl" or dist.get_world_size() == 1:
        dist.destroy_process_group()
        await_gloo()
    if told:
        time.sleep(TOLD)
        sys.exit(2)


def _first_to_find(error: UserError) -> bool:
    """Whether no other rank has asked this about the same error. Not collective: the others may wait for this one."""
    if dist.get_world_size() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(f"found {ascii(str(error))}", 1) == 1
    except RuntimeError:  # the rank that keeps the store has ended, perhaps of another error
        return True


def await_gloo() -> None:
    """Wait until gloo's threads have freed the tensors of the collectives that have returned; see `leave_world`."""
    latest = time.monotonic() + LAST_LOOK
    before = None
    while (now := _gloo_threads()) != before or any(state != "S" for state, *_ in now.values()):
        if time.monotonic() > latest:
            return
        before = now
        time.sleep(LOOK)


def _gloo_threads() -> dict[str, list[str]]:
    """The state and the counts of context switches of each of gloo's threads: one that waits for work has no more."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if fields["Name"].strip() == GLOO_THREADS:
            switches = [fields["voluntary_ctxt_switches"].strip(), fields["nonvoluntary_ctxt_switches"].strip()]
            found[task.name] = [fields["State"].split()[0], *switches]
    return found


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device is cuda but PyTorch sees no CUDA device: set train.device to auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: it sees {torch.cuda.device_count()} of its node's GPUs; start fewer "
            f"processes, or let each see all (Slurm: --gpus-per-node in place of --gpus-per-task)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
