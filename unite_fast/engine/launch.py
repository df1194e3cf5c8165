"""Where a process finds its place among those that a launcher started; needs no torch."""

from __future__ import annotations

from unite_fast.errors import UserError

DEFAULT_PORT = "29500"  # torchrun's own default


def launch_environment(environ: dict[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a launcher, or {} for a lone process.

    Reads what torchrun and the deepspeed launcher set; under Slurm, what `srun` sets for each task of a step.
    (An sbatch script's own shell sees the job's task count although it is one process, so the step's count is read.)

    Raises:
        UserError: a launcher set some of the variables but not all.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        found = {
            key: environ[key]
            for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            if key in environ
        }
        if "RANK" not in found or "WORLD_SIZE" not in found:
            raise UserError(
                "RANK and WORLD_SIZE must be set together; start with torchrun, deepspeed or srun, or unset both"
            )
        found.setdefault("LOCAL_RANK", "0")
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        found = {
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        }
        address = environ.get("MASTER_ADDR") or environ.get("SLURM_LAUNCH_NODE_IPADDR")
        if address:
            found["MASTER_ADDR"] = address
        found["MASTER_PORT"] = environ.get("MASTER_PORT", DEFAULT_PORT)
    else:
        return {}
    if int(found["WORLD_SIZE"]) > 1:
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            if key not in found:
                raise UserError(f"{key} is not set for a run of {found['WORLD_SIZE']} processes: export it, see README")
    return found
