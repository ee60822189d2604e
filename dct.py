"""The discrete cosine transform, and the low-pass operator that FreqKV makes of it.

Defines the orthonormal DCT-II (`dct`, `dct_matrix`), its inverse the DCT-III (`idct`), and the
matrix that takes n samples to fewer with the same low frequencies (`lowpass_matrix`).

    C[k, i] = s_k cos(pi (2i + 1) k / 2n),   s_0 = sqrt(1/n),   s_k = sqrt(2/n) for k > 0

`dct` and `idct` go by the FFT, the operator is a matrix: up to some 4096 samples that is faster.
Matrices are made in float64, once for each size, dtype and device, and shared: only read them.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["dct", "dct_matrix", "idct", "lowpass_halves", "lowpass_matrix"]

Device = torch.device | str
Build = Callable[[int, int], tuple[Tensor, ...]]


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
    """Orthonormal DCT-II of size n as a matrix C [frequency, sample]; C.T is its inverse."""
    return _kept(_dct_matrix, n, n, dtype, torch.device(device))[0]


def lowpass_matrix(
    n: int, keep: int, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> Tensor:
    """The operator P = sqrt(keep/n) C_keep.T C_n[:keep], [keep, n] (FreqKV, section 3).

    P takes n samples to their `keep` lowest frequencies, and those back to `keep` samples. Rows of
    P sum to 1, so constants pass unchanged; a band-limited signal is sampled anew, as high. P is
    centrosymmetric, P[keep-1-m, n-1-i] = P[m, i]. ValueError unless 0 <= keep <= n and n >= 1.
    """
    return _kept(_lowpass_matrix, n, keep, dtype, torch.device(device))[0]


def lowpass_halves(
    n: int, keep: int, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> tuple[Tensor, Tensor]:
    """The blocks (A, B) of `lowpass_matrix(n, keep)` that see sums and differences of samples.

    Even frequencies are symmetric about the middle of the signal and odd ones antisymmetric. With
    J the reversal, the first half of y = P x is A (x + Jx) + B (x - Jx), and the second half, read
    from its end, A (x + Jx) - B (x - Jx): half the arithmetic. A and B, [ceil(keep/2), ceil(n/2)],
    take the first ceil(n/2) rows of x + Jx and x - Jx.
    """
    a, b = _kept(_lowpass_halves, n, keep, dtype, torch.device(device))
    return a, b


def dct(x: Tensor, dim: int = -1) -> Tensor:
    """Orthonormal DCT-II of real x along `dim`; same shape. Half types are computed in float32."""
    return _transform(x, dim, inverse=False)


def idct(x: Tensor, dim: int = -1) -> Tensor:
    """Orthonormal DCT-III of real x along `dim`, the inverse of `dct`; same shape."""
    return _transform(x, dim, inverse=True)


def _transform(x: Tensor, dim: int, inverse: bool) -> Tensor:
    if x.is_complex() or not x.shape[dim]:
        raise ValueError(f"x: was {x.dtype} {tuple(x.shape)}, must be real, with samples")
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    rows = x.movedim(dim, -1).to(torch.promote_types(dtype, torch.float32))
    # The Fourier transform of the even samples forward and then the odd ones backward is the DCT
    # but for a turn by s_k exp(-i pi k / 2n); frequency n - k is in what k leaves (Makhoul, 1980).
    n, half = rows.shape[-1], rows.shape[-1] // 2 + 1
    k = torch.arange(half, dtype=torch.float64, device="cpu")
    turn = torch.polar(torch.full_like(k, math.sqrt(2 / n)), k * (-math.pi / (2 * n)))
    turn[0] /= math.sqrt(2)
    turn, i = turn.to(x.device, rows.dtype.to_complex()), torch.arange(n, device=x.device)
    order = torch.cat((i[::2], i[1::2].flip(0)))
    if inverse:
        rest = torch.cat((torch.zeros_like(rows[..., :1]), rows[..., n - half + 1 :].flip(-1)), -1)
        rows = torch.fft.irfft(torch.complex(rows[..., :half], -rest) / turn, n)
        rows = rows[..., order.argsort()]
    else:
        band = torch.fft.rfft(rows[..., order]) * turn
        rows = torch.cat((band.real, -band.imag[..., 1 : n - half + 1].flip(-1)), dim=-1)
    return rows.to(dtype).movedim(-1, dim)


@lru_cache(maxsize=128)
def _kept(
    build: Build, n: int, keep: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    if not 0 <= keep <= n or n < 1:
        raise ValueError(f"n, keep: were {n}, {keep}, must be n >= 1 and 0 <= keep <= n")
    # A tensor made in inference mode could never take part in training.
    with torch.inference_mode(False), torch.no_grad():
        return tuple(matrix.to(dtype).to(device) for matrix in build(n, keep))


def _dct_matrix(n: int, keep: int) -> tuple[Tensor]:
    """The first `keep` rows of C_n. The device is named, as the caller's default may be `meta`."""
    k, i = torch.arange(keep, device="cpu")[:, None], torch.arange(n, device="cpu")
    # (2i+1)k grows like n^2; modulo a full turn of 4n it stays a small integer, and exact.
    matrix = torch.cos(((2 * i + 1) * k % (4 * n)).double() * (math.pi / (2 * n)))
    matrix[1:] *= math.sqrt(2)
    return (matrix / math.sqrt(n),)


def _lowpass_matrix(n: int, keep: int) -> tuple[Tensor]:
    (low,), (small,) = _dct_matrix(n, keep), _dct_matrix(max(keep, 1), keep)
    return (math.sqrt(keep / n) * small.T[:keep] @ low,)


def _lowpass_halves(n: int, keep: int) -> tuple[Tensor, Tensor]:
    (p,) = _lowpass_matrix(n, keep)
    rows, columns = (keep + 1) // 2, (n + 1) // 2
    front, back = p[:rows, :columns] / 2, p.flip(1)[:rows, :columns] / 2
    if n % 2:  # the middle of x + Jx holds its sample twice
        front[:, -1], back[:, -1] = front[:, -1] / 2, back[:, -1] / 2
    return front + back, front - back
