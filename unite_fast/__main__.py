"""`python -m unite_fast …` is `unite-fast …`, for launchers: `torchrun --nproc-per-node 8 -m unite_fast evaluate …`."""

import sys


def main() -> int:
    """The command `unite-fast`, which `pip install .` brings along with the kernels but not what it needs."""
    try:
        from unite_fast.cli import main as run
    except ModuleNotFoundError as missing:
        if missing.name.partition(".")[0] in ("unite_fast", "unite_kernels"):
            raise
        print(
            f"error: the package {missing.name} is not installed; unite-fast needs what comes with "
            "pip install -e '.[train]', in the repository",
            file=sys.stderr,
        )
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
