"""Round a weight to int8 so that what is read through it changes least (GPTQ).

Rounding column by column, the error of each column is made up for in those that are still to be
rounded, as far as the inputs seen correlate them (Frantar et al. 2022, algorithm 1, with their
Cholesky form of the inverse Hessian). Scales stay those of plain rounding.
"""

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal, as in the paper, for channels that were never seen apart
BLOCK = 64  # columns whose errors are carried on together


def compensated(weight: Tensor, scale: Tensor, inverse: Tensor) -> Tensor:
    """The int8 codes of weight [out, in] for scale [out, 1], given `inverse_root` of its inputs.

    The work is done on the weight's transpose, where a column lies in one piece.
    """
    left = weight.float().t().contiguous()  # [in, out]
    codes = torch.empty(left.shape, dtype=torch.int8)
    scales = scale[:, 0].contiguous()
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = _block(
            left[start:stop], codes[start:stop], scales, inverse[start:stop, start:stop]
        )
        left[stop:].addmm_(inverse[start:stop, stop:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def _block(left: Tensor, codes: Tensor, scales: Tensor, inverse: Tensor) -> Tensor:
    """Round a block's columns, rows of left [block, out]; gives their errors over the diagonal.

    A column gets the errors of those before it when its turn comes, in one product with them all.
    """
    errors = torch.empty_like(left)
    across = inverse.t().contiguous()
    for i, diagonal in enumerate(inverse.diagonal().tolist()):
        column = left[i].addmv_(errors[:i].t(), across[i, :i], alpha=-1)
        rounded = (column / scales).round_().clamp_(-127, 127)
        codes[i] = rounded
        torch.addcmul(column, rounded, scales, value=-1, out=errors[i]).div_(diagonal)
    return errors


def inverse_root(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, x xᵀ summed [in, in]."""
    diagonal = hessian.diagonal()
    least = DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = hessian.double() + torch.diag(least.expand(len(hessian))).double()
    lower = torch.linalg.cholesky(damped)
    root: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return root.float()
