"""Round a weight to int8 so that what is read through it changes least (GPTQ).

Rounding column by column, the error of each column is made up for in those that are still to be
rounded, as far as the inputs seen correlate them (Frantar et al. 2022, algorithm 1, with their
Cholesky form of the inverse Hessian). Scales stay those of plain rounding.
"""

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal, as in the paper, for channels that were never seen apart
BLOCK = 64  # columns whose errors are carried on together


def compensated(weight: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """The int8 codes of weight [out, in] for scale [out, 1], given x xᵀ summed [in, in]."""
    inverse = _inverse_root(hessian)
    left, codes = weight.float().clone(), torch.empty(weight.shape, dtype=torch.int8)
    width = weight.shape[1]
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = _block(left[:, start:stop], codes[:, start:stop], scale, inverse, start)
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes


def _block(left: Tensor, codes: Tensor, scale: Tensor, inverse: Tensor, start: int) -> Tensor:
    """Round a block's columns in place; gives their errors over the inverse's diagonal."""
    errors = torch.empty_like(left)
    for i in range(left.shape[1]):
        at = start + i
        column = left[:, i]
        rounded = torch.round(column / scale[:, 0]).clamp(-127, 127)
        codes[:, i] = rounded.to(torch.int8)
        errors[:, i] = (column - rounded * scale[:, 0]) / inverse[at, at]
        left[:, i + 1 :] -= errors[:, i : i + 1] * inverse[at, at + 1 : start + left.shape[1]]
    return errors


def _inverse_root(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    diagonal = hessian.diagonal()
    least = DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = hessian.double() + torch.diag(least.expand(len(hessian))).double()
    lower = torch.linalg.cholesky(damped)
    root: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return root.float()
