"""`python -m unite_fast …` is `unite-fast …`, for launchers: `torchrun --nproc-per-node 8 -m unite_fast evaluate …`."""

import sys

from unite_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
