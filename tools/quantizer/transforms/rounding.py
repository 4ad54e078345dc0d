"""Round a weight to int8 so that what is read through it changes least (GPTQ).

Rounding column by column, the error of each column is made up for in those that are still to be
rounded, as far as the inputs seen correlate them (Frantar et al. 2022, algorithm 1). With the
Hessian H = M D Mᵀ, M upper triangular and 1 on its diagonal, the same codes are

    q_i = round(w_i + sum_{j<i} M_ji (w_j - q_j))

for which no inverse is made (LDLQ; Chee et al. 2023 show that it is GPTQ). Scales stay those of
plain rounding.
"""

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal, as in the paper, for channels that were never seen apart
BLOCK = 32  # columns whose errors are carried on together


def compensated(weight: Tensor, scale: Tensor, shares: Tensor) -> Tensor:
    """The int8 codes of weight [out, in] for scale [out, 1], given `error_shares` of its inputs.

    The work is done on the weight's transpose, where a column lies in one piece, in steps of scale.
    """
    errors = (weight.float() / scale).t().contiguous()  # [in, out]; before its turn, what is wanted
    codes = errors.clone()
    for start in range(0, len(codes), BLOCK):
        block, stop = slice(start, start + BLOCK), start + BLOCK
        _round_block(codes[block], errors[block], shares[block, block].t().contiguous())
        codes[stop:].addmm_(shares[block, stop:].t(), errors[block])
    return codes.to(torch.int8).t().contiguous()


def _round_block(codes: Tensor, errors: Tensor, shares: Tensor) -> None:
    """Round a block's columns, rows of codes [block, out], and leave their errors.

    A column gets its share of the errors before it when its turn comes, in one product with them
    all; row i of shares [block, block] is zero from i on.
    """
    before = errors.t()
    for code, error, share in zip(codes.unbind(), errors.unbind(), shares.unbind(), strict=True):
        error.sub_(code.addmv_(before, share).round_().clamp_(-127, 127))


def error_shares(hessian: Tensor) -> Tensor:
    """What each channel gets of the errors of those before it: M above its diagonal, float32.

    `hessian` is x xᵀ summed [in, in]; some of its mean is added to its diagonal.
    """
    diagonal = hessian.diagonal()
    least = DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = hessian.double() + torch.diag(least.expand(len(hessian))).double()
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)  # H = upper upperᵀ
    shares: Tensor = (upper / upper.diagonal()).triu(1).float()
    return shares
