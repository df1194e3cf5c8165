"""Settings of the whole suite, made before anything else is imported.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is first imported. One
thread: the tensors are small, and on shared cores waiting threads cost far more than they save.
"""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
