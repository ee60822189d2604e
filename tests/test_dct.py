"""dct.py: the transform against its definition and scipy, the low-pass operator against theory.

Run: pytest tests/test_dct.py
"""

import math

import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import dct as dct_file
from dct import dct, dct_matrix, idct, lowpass, lowpass_matrix

DOUBLE = torch.float64
sizes = st.integers(1, 150)
sizes_and_keeps = sizes.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


def random(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def close(actual, expected, atol=1e-12):
    assert_close(actual, expected, rtol=0, atol=atol)


@given(sizes)
def test_matrix_is_orthonormal(n):
    matrix = dct_matrix(n, DOUBLE)
    close(matrix @ matrix.T, torch.eye(n, dtype=DOUBLE))


def test_matrix_is_orthonormal_at_the_span_of_the_paper():
    rows = dct_matrix(4092, DOUBLE)[::97]
    close(rows @ rows.T, torch.eye(len(rows), dtype=DOUBLE))


@pytest.mark.parametrize("n", [2047, 2048])
def test_angles_are_exact(n):
    """Against cosines of integer ratios folded by hand into the first eighth of a turn."""

    def cosine(ratio):  # of pi * ratio / 2n
        ratio = min(ratio % (4 * n), -ratio % (4 * n))
        if ratio > n:
            return -cosine(2 * n - ratio)
        if 2 * ratio > n:
            return math.sin(math.pi * (n - ratio) / (2 * n))
        return math.cos(math.pi * ratio / (2 * n))

    matrix = dct_matrix(n, DOUBLE) * math.sqrt(n / 2)
    picks = [(k, i) for k in range(n - 1, 0, -101) for i in range(n - 1, 0, -103)]
    expected = [cosine((2 * i + 1) * k) for k, i in picks]
    close(
        torch.stack([matrix[pick] for pick in picks]), torch.tensor(expected, dtype=DOUBLE), 2e-15
    )


@given(sizes)
def test_inverse_undoes_the_transform(n):
    x = random(3, n)
    close(idct(dct(x)), x)
    close(dct(idct(x)), x)


@given(sizes, st.floats(-2, 2), st.floats(-2, 2))
def test_linear(n, a, b):
    x, y = random(2, n)
    close(dct(a * x + b * y), a * dct(x) + b * dct(y))


@given(sizes)
def test_energy_is_kept(n):
    x = random(n)
    close(dct(x).square().sum(), x.square().sum(), atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 31, 64, 255, 1000, 4095, 4096])
@pytest.mark.parametrize(("ours", "theirs"), [(dct, scipy.fft.dct), (idct, scipy.fft.idct)])
@pytest.mark.parametrize(("dtype", "atol"), [(DOUBLE, 1e-12), (torch.float32, 1e-5)])
def test_equals_scipy(ours, theirs, n, dtype, atol):
    x = random(2, n)
    expected = torch.from_numpy(theirs(x.numpy(), type=2, norm="ortho"))
    close(ours(x.to(dtype)), expected.to(dtype), atol)


@pytest.mark.parametrize("dim", range(-3, 3))
@pytest.mark.parametrize(("ours", "theirs"), [(dct, scipy.fft.dct), (idct, scipy.fft.idct)])
def test_equals_scipy_along_any_dimension(ours, theirs, dim):
    x = random(3, 5, 4)
    close(ours(x, dim), torch.from_numpy(theirs(x.numpy(), type=2, norm="ortho", axis=dim)))


@pytest.mark.parametrize("transform", [dct, idct])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(transform, dtype):
    x = random(3, 100, dtype=dtype)
    assert torch.equal(transform(x), transform(x.float()).to(dtype))


def test_integers_are_taken_as_floats():
    assert_close(dct(torch.arange(9)), dct(torch.arange(9.0)))


@pytest.mark.parametrize("transform", [dct, idct])
def test_gradients(transform):
    assert torch.autograd.gradcheck(transform, random(2, 7).requires_grad_())


@given(sizes_and_keeps)
def test_lowpass_is_a_truncated_transform(n_keep):
    n, keep = n_keep
    p, x = lowpass_matrix(n, keep, DOUBLE), random(n, 3)
    assert p.shape == (keep, n)
    if keep:
        short = idct(dct(x, 0)[:keep], 0)
        close(p @ x, math.sqrt(keep / n) * short)


@given(sizes_and_keeps)
def test_lowpass_passes_constants_and_is_centrosymmetric(n_keep):
    n, keep = n_keep
    p = lowpass_matrix(n, keep, DOUBLE)
    close(p.sum(1), torch.ones(keep, dtype=DOUBLE))
    close(p.flip(0, 1), p)


@given(sizes)
def test_lowpass_that_keeps_all_is_the_identity(n):
    close(lowpass_matrix(n, n, DOUBLE), torch.eye(n, dtype=DOUBLE))


@given(sizes_and_keeps)
def test_lowpass_samples_a_band_limited_signal_anew(n_keep):
    n, keep = n_keep
    amplitudes = random(keep)

    def signal(samples):
        """Of time 0 .. 1, at the middles of `samples` equal parts."""
        time = (torch.arange(samples, dtype=DOUBLE) + 0.5) / samples
        return torch.cos(math.pi * time[:, None] * torch.arange(keep)) @ amplitudes

    close(lowpass_matrix(n, keep, DOUBLE) @ signal(n), signal(keep), atol=1e-11)


@pytest.mark.parametrize("least", [1, 9, 512])
@given(n_keep=sizes_and_keeps)
def test_lowpass_is_its_matrix(least, n_keep):
    n, keep = n_keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dct_file, "LEAST_TO_SPLIT", least)
        check_lowpass(n, keep)


@pytest.mark.parametrize(("n", "keep"), [(2044, 1022), (1024, 256), (1016, 508), (900, 451)])
def test_lowpass_of_the_sizes_in_use_is_its_matrix(n, keep):
    check_lowpass(n, keep)


def check_lowpass(n, keep):
    x = random(2, 3, n, 4)
    expected = lowpass_matrix(n, keep, DOUBLE) @ x
    close(lowpass(x, keep), expected)
    if keep:
        close(dct_file._lowpass_by_halves(x, keep), expected)
        close(dct_file._lowpass_by_fft(x, keep), expected)


@pytest.mark.parametrize("n", [4096, 4097, 8188, 131068])
@pytest.mark.parametrize("ratio", [0, 0.3, 0.5])
def test_lowpass_of_a_long_signal_needs_no_matrix(monkeypatch, n, ratio):
    """The window of Llama 3.1, 131072 slots, whose matrices would take 17 GB."""
    if n > 4096:
        monkeypatch.setattr(dct_file, "_matrix", None)
    x, keep = random(1, n, 2, dtype=torch.float32), int(ratio * n)
    low = scipy.fft.dct(x.double().numpy(), axis=1, norm="ortho")[:, :keep]
    expected = math.sqrt(keep / n) * scipy.fft.idct(low, axis=1, norm="ortho") if keep else low
    close(lowpass(x, keep), torch.from_numpy(expected).float(), 1e-5)


@pytest.mark.parametrize("n", [21, 4097])  # by matrices, and by the FFT
@pytest.mark.parametrize("keep", [0, 7, 8])
def test_lowpass_is_computed_in_float32(n, keep):
    x = random(2, n, 4, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert torch.equal(lowpass(half, keep), lowpass(half.float(), keep).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lowpass(x, keep), lowpass(x.float(), keep))
    close(lowpass(x, keep), lowpass(x.double(), keep).float(), 1e-5)


def test_transforms_are_computed_in_float32_under_autocast():
    x = random(2, 21, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        band, back = dct(x), idct(x)
    close(band, dct(x), 1e-6)
    close(back, idct(x), 1e-6)


@pytest.mark.parametrize(("n", "keep"), [(8, 4), (9, 5), (7, 0)])
def test_gradients_of_lowpass(n, keep):
    x = random(2, n, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lowpass(x, keep), x)
    if keep:
        assert torch.autograd.gradcheck(lambda x: dct_file._lowpass_by_fft(x, keep), x)


def test_matrices_are_made_once():
    assert dct_matrix(8) is dct_matrix(8)
    assert lowpass_matrix(8, 4) is lowpass_matrix(8, 4)
    assert dct_matrix(8, DOUBLE).dtype == DOUBLE
    close(dct_matrix(8, torch.bfloat16), dct_matrix(8).bfloat16(), atol=0)


# The sizes of the next two tests are used by no other: their matrices must be made inside.


def test_matrix_made_in_inference_mode_can_be_trained_through():
    with torch.inference_mode():
        dct(random(611))
        lowpass_matrix(613, 17, DOUBLE)
    x = random(611).requires_grad_()
    dct(x).square().sum().backward()
    close(x.grad, 2 * x.detach(), atol=1e-10)
    assert not lowpass_matrix(613, 17, DOUBLE).is_inference()


def test_default_device_meta_leaves_the_matrices_alone():
    with torch.device("meta"):
        matrix, low = dct_matrix(617), lowpass_matrix(617, 10)
    close(matrix @ matrix.T, torch.eye(617), atol=1e-5)
    assert low.device.type == "cpu"
    x = random(618, 2)
    with torch.device("meta"):
        halves = lowpass(x, 10)
    close(halves, lowpass_matrix(618, 10, DOUBLE) @ x)
    x = random(4097, 2)
    with torch.device("meta"):
        assert lowpass(x, 10).device.type == "cpu"


def test_meta_tensors_stay_on_meta():
    assert dct_matrix(8, device="meta").is_meta
    assert dct(torch.empty(3, 8, device="meta")).is_meta
    assert lowpass_matrix(8, 3, device="meta").shape == (3, 8)
    assert lowpass(torch.empty(2, 9, 4, device="meta"), 5).shape == (2, 5, 4)
    assert lowpass(torch.empty(2, 5000, 4, device="meta"), 5).shape == (2, 5, 4)


@pytest.mark.parametrize(("n", "keep"), [(0, 0), (-1, -1), (8, -1), (8, 9)])
def test_bad_sizes_are_refused(n, keep):
    with pytest.raises(ValueError, match=f"{n}, {keep}"):
        lowpass_matrix(n, keep)
    if n >= 0:
        with pytest.raises(ValueError, match=f"{n}, {keep}"):
            lowpass(torch.zeros(n, 2), keep)


@pytest.mark.parametrize("n", [0, -3])
def test_bad_size_of_the_transform_is_refused(n):
    with pytest.raises(ValueError, match=f"n.*were {n}"):
        dct_matrix(n)


def test_lowpass_of_whole_numbers_is_refused():
    """Their samples could not be written into a tensor of whole numbers."""
    with pytest.raises(ValueError, match=r"x: was torch\.int64, must be a float"):
        lowpass(torch.arange(9)[:, None], 4)


@pytest.mark.parametrize("transform", [dct, idct])
def test_complex_is_refused(transform):
    with pytest.raises(ValueError, match=r"x: was torch\.complex64"):
        transform(torch.zeros(4, dtype=torch.complex64))


@pytest.mark.cuda
def test_gpu_equals_cpu():
    x = random(3, 4092, dtype=torch.float32)
    close(dct(x.cuda()).cpu(), dct(x), atol=1e-4)
    assert dct_matrix(8, device="cuda").is_cuda
