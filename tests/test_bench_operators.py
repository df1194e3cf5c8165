"""Every operator's benchmark runs, and its rival computes what ours does."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import test_operators as subject


@pytest.mark.parametrize("operator, sizes, direction", subject.CASES)
def test_the_rival_computes_the_same(operator, sizes, direction):
    torch.manual_seed(0)
    case = subject.OPERATORS[operator][0](sizes)
    found, before = [], [x.clone() for x in case.changed]
    for function in (case.ours, case.eager):
        torch.manual_seed(1)  # of the outputs' gradients
        for tensor, start in zip(case.changed, before):
            tensor.copy_(start)
        result = subject.prepared(function, case, direction)()()
        if direction == subject.FORWARD:  # `prepared` leaves out what takes no gradient
            result = function(*case.inputs)
        result = (result,) if isinstance(result, Tensor) else result or ()
        found.append([x for x in result if x is not None] + [x.clone() for x in case.changed])
    if operator == "newton_schulz":  # all matrices at once, and one by one
        found = [found[0][0], torch.stack(found[1])]
    if operator == "fp8_linear":  # eight bits keep three of a number's bits behind the first, gradients' two
        for ours, theirs in zip(*found, strict=True):
            assert ours.shape == theirs.shape and (ours - theirs).norm() < 0.1 * theirs.norm()
        return
    # Float32, sums in another order, over up to 139,264 elements in gradients of weights; orthogonal iterates double
    # the rounding of the one before.
    tolerance = 1e-3 if direction != subject.FORWARD or operator == "newton_schulz" else 1e-5
    assert_close(*found, rtol=tolerance, atol=tolerance)
