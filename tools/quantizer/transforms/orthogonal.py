"""Orthogonal maps that spread what lies in a few channels over all of them, fast and from a seed.

x -> x R over the last dimension of size n = a*m, a the largest power of two in n:

    R = diag(signs) · (H_a ⊗ Q_m)      H_a: Hadamard, scaled; Q_m: a random orthogonal matrix

With random signs each channel of the result is a sum of all of the input's with weights of about
equal size, as in QuaRot (Ashkboos et al. 2024, section 3); where n is no power of two, Q_m mixes
what the Hadamard transform cannot. H_a is a product H_b ⊗ H_c, and H_c ⊗ Q_m is one small matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PRODUCT = 64  # the least size from which a Hadamard transform beats a product of matrices
ROWS = 1024  # turned at a time, so that a whole embedding is never held in float32


@dataclass(frozen=True)
class Orthogonal:
    """The map x -> x R of the module."""

    signs: Tensor  # float64 [n], 1 and -1
    rest: Tensor  # float64 [c*m, c*m]

    @property
    def size(self) -> int:
        """How many channels it turns."""
        return len(self.signs)

    def turn(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """diag(scale) R applied to x [..., n]; gives x's dtype, rounded once.

        `scale` [n] is ones where there is none. Float64 is computed in float64, else in float32.
        """
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        signs = self.signs.to(dtype) if scale is None else (self.signs * scale).to(dtype)
        made = torch.empty(x.shape, dtype=x.dtype)
        rows, out = x.reshape(-1, self.size), made.view(-1, self.size)
        for at in range(0, len(rows), ROWS):
            out[at : at + ROWS] = self._turn(rows[at : at + ROWS].to(dtype) * signs)
        return made

    def _turn(self, signed: Tensor) -> Tensor:
        m = len(self.rest)
        mixed = signed.reshape(-1, m) @ self.rest.to(signed.dtype)
        return hadamard(mixed.view(len(signed), -1, m)).view(len(signed), -1)


def hadamard(x: Tensor) -> Tensor:
    """The Hadamard transform of x [B, a, m] over a, a power of two, scaled to be orthogonal."""
    batch, a, m = x.shape
    span = 1
    while span < a:
        halves = x.view(batch, a // (2 * span), 2, span * m)
        first, second = halves[:, :, 0], halves[:, :, 1]
        x = torch.empty_like(halves)
        torch.add(first, second, out=x[:, :, 0])
        torch.sub(first, second, out=x[:, :, 1])
        span *= 2
    whole: Tensor = x.reshape(batch, a, m) * math.sqrt(1 / a)
    return whole


def random_orthogonal(size: int, seed: int) -> Orthogonal:
    """The map of the module for `size` channels; the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=random).double() * 2 - 1
    m = size // (size & -size)
    # The Q of a Gaussian matrix is uniform among orthogonal ones when R's diagonal is positive.
    q, r = torch.linalg.qr(torch.randn(m, m, generator=random, dtype=torch.float64))
    rest = (q * r.diagonal().sign()).contiguous()
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) * math.sqrt(1 / 2)
    while len(rest) < PRODUCT and size % (2 * len(rest)) == 0:
        rest = torch.kron(two, rest)
    return Orthogonal(signs, rest)
