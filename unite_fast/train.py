"""Train UNITE: `deepspeed unite_fast/train.py --config configs/l_h100.json`, or plain `python`, or `torchrun`."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script, Python puts this folder first on the path; the packages live one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from unite_fast.config import Config
from unite_fast.engine.launch import launch_environment
from unite_fast.errors import UserError

APART = 3.0  # seconds: ranks start apart, and launchers look once a second whether one has ended, to end the others
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="JSON configuration, see configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override keys, for example --set data.path=/data/imagenet/train train.global_batch=256",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run folder's newest checkpoint, if any"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def prepare_process() -> None:
    """Settings of a process that trains, from before torch is imported."""
    _share_cores()
    keep_pages()


def _share_cores() -> None:
    """Let OpenMP threads give up a core that another process wants.

    By default libgomp spins 300,000 turns at the end of every parallel loop. With two busy neighbours on two cores
    the quickstart's step then took 4 to 7 s in place of 0.3; after 10,000 turns of spinning it took 1.5 s, and on
    idle cores the same as by default (1,000 turns cost a factor of two there).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_pages() -> None:
    """Let the process keep the memory that a step frees, since the next one takes as much again.

    glibc gives most of it back: the quickstart took 4,800 page faults a step, molecules 21,000. Without them the steps
    took 0.90 and 0.87 of the processor time (EPYC 9005, one core), and no more memory at most.
    """
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, 2**25)  # larger blocks go back all the same: it is the most that glibc takes
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _load(options: argparse.Namespace) -> Config:
    """The configuration; what all ranks find wrong with it is told by rank 0, before the others do."""
    try:
        return Config.load(options.config, options.set)
    except UserError:
        if launch_environment(dict(os.environ)).get("RANK", "0") != "0":
            time.sleep(APART)  # there is no process group yet to ask the others
        raise


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    prepare_process()
    try:
        config = _load(options)
        from unite_fast.engine.loop import train  # imports torch: a bad configuration fails before that

        train(config, resume=options.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
