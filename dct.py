# SPDX-License-Identifier: Apache-2.0
"""The discrete cosine transform as matrices, and the low-pass operator that FreqKV makes of it.

    dct(x)           =  x Cᵀ      C [n, n], the orthonormal DCT-II of size n
    idct(x)          =  x C       its inverse, the DCT-III
    lowpass(x, keep) =  P x       P [keep, n]: to the frequency domain, cut, and back

    C[k, i] = s_k cos(pi (2i + 1) k / 2n),   s_0 = sqrt(1/n),   s_k = sqrt(2/n) for k > 0
    P = sqrt(keep/n) C_keepᵀ C_n[:keep]

k is a frequency and i a sample. Knows nothing of caches or models (freqkv.py does). Matrices are
made in float64, once for each size, dtype and device, and shared: only read them.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Device = torch.device | str
MatrixBuilder = Callable[[int, int], Tensor]

MAX_MATRIX_LENGTH = 4096  # samples; `lowpass` of a longer signal goes by the FFT, without a matrix
LEAST_TO_SPLIT = 512  # samples; to split fewer takes longer than the products that it saves


# The definition


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
    """The orthonormal DCT-II of size n: C [frequency, sample]. Its transpose is its inverse."""
    return _matrix(_cosines, n, n, dtype, device)


def lowpass_matrix(
    n: int, keep: int, dtype: torch.dtype = torch.float32, device: Device = "cpu"
) -> Tensor:
    """The low-pass operator P [keep, n] = sqrt(keep/n) C_keepᵀ C_n[:keep] (FreqKV, section 3).

    P takes n samples to their `keep` lowest frequencies, and those back to `keep` samples. The
    factor makes the rows of P sum to 1: constants pass unchanged, and slots keep their scale.
    ValueError unless 0 <= keep <= n and n >= 1.
    """
    return _matrix(_lowpass_rows, n, keep, dtype, device)


def dct(x: Tensor, dim: int = -1) -> Tensor:
    """Orthonormal DCT-II of real x along `dim`; same shape. Half types are computed in float32."""
    samples = _move_last(x, dim)
    with _no_autocast(samples):
        spectrum = samples @ dct_matrix(samples.shape[-1], samples.dtype, samples.device).T
    return _move_back(spectrum, x, dim)


def idct(x: Tensor, dim: int = -1) -> Tensor:
    """Orthonormal DCT-III of real x along `dim`, the inverse of `dct`; same shape."""
    spectrum = _move_last(x, dim)
    with _no_autocast(spectrum):
        samples = spectrum @ dct_matrix(spectrum.shape[-1], spectrum.dtype, spectrum.device)
    return _move_back(samples, x, dim)


def lowpass(x: Tensor, keep: int) -> Tensor:
    """The low band of x [..., n, D] along its sequence, as `keep` samples [..., keep, D].

    Equal to `lowpass_matrix(n, keep) @ x`, by half-size products up to 4096 samples and by the FFT
    beyond. Computed in float32 or wider, returned in the dtype of x.
    """
    n = x.shape[-2]
    _check_sizes(n, keep)
    if not x.is_floating_point():
        raise ValueError(f"x: was {x.dtype}, must be a float")
    if keep == 0:
        return x[..., :0, :]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if n <= MAX_MATRIX_LENGTH:
        return _lowpass_by_halves(wide, keep).to(x.dtype)
    return _lowpass_by_fft(wide, keep).to(x.dtype)


# Two faster ways to P x


def _lowpass_by_halves(x: Tensor, keep: int) -> Tensor:
    """P x at half the arithmetic: even frequencies need sums of mirrored samples, odd differences.

    P is centrosymmetric, P[keep-1-j, n-1-i] = P[j, i]. So with s and d, the first ceil(n/2) rows of
    x + Jx and of x - Jx, where J reverses the samples, the first half of P x is A s + B d, and the
    second half, from its end, A s - B d. A and B are [ceil(keep/2), ceil(n/2)].

    The even frequencies of n samples are all frequencies of n/2. So if n and keep are even,
    A = P(n/2, keep/2) / 2, and A s is done in the same way.
    """
    n = x.shape[-2]
    half = (n + 1) // 2
    front = x[..., :half, :]
    back = x[..., n - half :, :].flip(-2)  # the mirror image of each sample in `front`
    if _is_split(n, keep):
        even = _lowpass_by_halves(front + back, keep // 2) / 2
    else:
        even = _product(_even_half, n, keep, front + back)  # [..., ceil(keep/2), D]
    odd = _product(_odd_half, n, keep, front - back)
    first = even + odd
    last = (even - odd)[..., : keep // 2, :]  # the middle one of an odd `keep` is in `first`
    return torch.cat((first, last.flip(-2)), dim=-2)


def _is_split(n: int, keep: int) -> bool:
    """Whether even frequencies go by the operator of half the size."""
    return n >= LEAST_TO_SPLIT and n % 2 == 0 and keep % 2 == 0


def _product(build: MatrixBuilder, n: int, keep: int, x: Tensor) -> Tensor:
    """What `build(n, keep)` makes, times x."""
    matrix = _matrix(build, n, keep, x.dtype, x.device)
    with _no_autocast(x):
        return matrix @ x


def _lowpass_by_fft(x: Tensor, keep: int) -> Tensor:
    """P x of a long signal, by the FFT of the signal and its mirror image.

    Coefficient k of the FFT of (x, Jx) is that of the DCT, turned by exp(i pi k / 2n). The inverse
    of size `keep` wants it turned by exp(i pi k / 2keep), and scaled by keep/n.
    """
    n = x.shape[-2]
    rows = x.transpose(-1, -2)
    mirrored = torch.cat((rows, rows.flip(-1)), dim=-1)  # [..., D, 2n]
    spectrum = torch.fft.rfft(mirrored)[..., :keep]
    k = torch.arange(keep, dtype=torch.float64, device="cpu")
    angle = k * (math.pi / 2) * (1 / keep - 1 / n)
    phase = torch.polar(torch.full_like(angle, keep / n), angle)
    phase = phase.to(spectrum.dtype).to(spectrum.device)
    shorter = torch.fft.irfft(spectrum * phase, 2 * keep)  # [..., D, 2 keep], mirrored too
    return shorter[..., :keep].transpose(-1, -2)


# Building the matrices, in float64 on the CPU


def _matrix(build: MatrixBuilder, n: int, keep: int, dtype: torch.dtype, device: Device) -> Tensor:
    """What `build(n, keep)` makes, once for each dtype and device."""
    return _cached_matrix(build, n, keep, dtype, torch.device(device))


# A compiler that looked inside would build the matrix anew at each call. This mark is what
# torch.compiler.assume_constant_result sets; calling that imports the compiler, for two seconds.
_matrix._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _cached_matrix(
    build: MatrixBuilder, n: int, keep: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    _check_sizes(n, keep)
    # A tensor made in inference mode could not be saved for backward later.
    with torch.inference_mode(False), torch.no_grad():
        return build(n, keep).to(dtype).to(device)


def _cosines(n: int, count: int) -> Tensor:
    """The first `count` rows of C_n."""
    k = torch.arange(count, device="cpu")[:, None]  # the default device may be another
    i = torch.arange(n, device="cpu")
    # (2i + 1) k grows like n²; modulo a full turn, 4n, it stays a small whole number, and exact.
    steps = (2 * i + 1) * k % (4 * n)
    rows = math.sqrt(2 / n) * torch.cos(steps.double() * (math.pi / (2 * n)))
    rows[:1] /= math.sqrt(2)
    return rows


def _lowpass_rows(n: int, keep: int) -> Tensor:
    """P [keep, n]."""
    if keep == 0:
        return torch.zeros(0, n, dtype=torch.float64, device="cpu")
    cut = _cosines(n, keep)
    back = _cosines(keep, keep).T
    return math.sqrt(keep / n) * back @ cut


def _even_half(n: int, keep: int) -> Tensor:
    """A of `_lowpass_by_halves`: [ceil(keep/2), ceil(n/2)]."""
    front, back = _quarters(n, keep)
    return front + back


def _odd_half(n: int, keep: int) -> Tensor:
    """B of `_lowpass_by_halves`: [ceil(keep/2), ceil(n/2)]."""
    front, back = _quarters(n, keep)
    return front - back


def _quarters(n: int, keep: int) -> tuple[Tensor, Tensor]:
    """The upper left quarter of P, and the upper right one mirrored, both halved."""
    rows = (keep + 1) // 2
    columns = (n + 1) // 2
    p = _lowpass_rows(n, keep)
    front = p[:rows, :columns] / 2
    back = p.flip(1)[:rows, :columns] / 2
    if n % 2 == 1:  # the middle sample is its own mirror image: x + Jx holds it twice
        front[:, -1] /= 2
        back[:, -1] /= 2
    return front, back


# Checks and conversions


def _check_sizes(n: int, keep: int) -> None:
    if n < 1 or not 0 <= keep <= n:
        raise ValueError(f"n, keep: were {n}, {keep}, must be n >= 1 and 0 <= keep <= n")


def _move_last(x: Tensor, dim: int) -> Tensor:
    """x with `dim` last, in float32 or wider."""
    if x.is_complex() or x.shape[dim] == 0:
        raise ValueError(f"x: was {x.dtype} {tuple(x.shape)}, must be real, with samples")
    return x.movedim(dim, -1).to(torch.promote_types(x.dtype, torch.float32))


def _move_back(y: Tensor, x: Tensor, dim: int) -> Tensor:
    """`_move_last` undone: `dim` in its place, and the dtype of x where that is a float."""
    dtype = x.dtype if x.is_floating_point() else y.dtype
    return y.movedim(-1, dim).to(dtype)


def _no_autocast(x: Tensor) -> torch.autocast:
    """A context in which products of x keep its dtype, whatever autocast is on around it."""
    device = "cpu" if x.is_meta else x.device.type
    return torch.autocast(device, enabled=False)
