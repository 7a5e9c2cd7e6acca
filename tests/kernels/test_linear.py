import pytest
import torch

from llava15_kernels._dispatch import as_if_on
from llava15_kernels.linear import MAX_ROWS, fused_linear, fused_linear_ref, pays
from llava15_kernels.testing import DTYPES, assert_close

WIDTHS = [
    pytest.param([48, 16, 16], 64, id="q-k-v"),
    pytest.param([40, 7, 1], 72, id="uneven"),
    pytest.param([33], 2048, id="wide"),
    pytest.param([20, 12], 1536, id="two"),
    pytest.param([5], 1, id="K1"),
]


def layers(sizes, width, device, dtype, bias=False):
    weights = [(torch.randn(n, width, device=device) / width**0.5).to(dtype) for n in sizes]
    return weights, [torch.randn(n, device=device).to(dtype) if bias else None for n in sizes]


def check(x, weights, biases, **options):
    """By the error rule."""
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    doubles = [weight.double() for weight in weights], [None if bias is None else bias.double() for bias in biases]
    eager, ref = fused_linear_ref(x, weights, biases, **options), fused_linear_ref(x.double(), *doubles, **wide)
    ours = fused_linear(x, weights, biases, **options, backend="triton")
    assert_close(ours, eager, ref, "fused_linear")
    with as_if_on("sm_90"):  # the tiles of a GPU, in the interpreter too
        assert_close(fused_linear(x, weights, biases, **options, backend="triton"), eager, ref, "fused_linear, tiles of sm_90")
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("sizes", "width"), WIDTHS)
def test_side_by_side(device, sizes, width, rows, norm, dtype):
    x = torch.randn(rows, width, device=device).to(dtype) * 2
    options = {"norm_weight": torch.randn(width, device=device).to(dtype), "eps": 1e-5} if norm else {}
    ours = check(x, *layers(sizes, width, device, dtype), **options)
    assert ours.shape == (rows, sum(sizes)) and ours.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("size", "width"), [(48, 64), (37, 100), (9, 2048)])
def test_gated(device, size, width, rows, bias, dtype):
    x = torch.randn(1, rows, width, device=device).to(dtype) * 2
    weight = torch.randn(width, device=device).to(dtype)
    check(x, *layers([size, size], width, device, dtype, bias), norm_weight=weight, gated=True)
    check(x, *layers([size, size], width, device, dtype, bias), gated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("width", [64, 600, 4096])
def test_residual_and_bias(device, width, rows, dtype):
    """The product is rounded before the sum, as two eager calls round it."""
    x, residual = (torch.randn(rows, n, device=device).to(dtype) for n in (width, 40))
    weights, biases = layers([40], width, device, dtype, bias=True)
    check(x, weights, biases, residual=residual)
    check(x, weights, [None], residual=residual)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_bias_of_some_layers(device, rows):
    x = torch.randn(rows, 64, device=device)
    weights, biases = layers([32, 16, 16], 64, device, torch.float32, bias=True)
    check(x, weights, [biases[0], None, biases[2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_every_batch(device, dtype):
    """Of 2 to 16 rows, with values that a difference in the order of the sum would show."""
    x = torch.randn(MAX_ROWS, 1000, device=device).to(dtype)
    weights, biases = layers([40], 1000, device, dtype)
    options = {"norm_weight": torch.randn(1000, device=device).to(dtype), "backend": "triton"}
    full = fused_linear(x, weights, biases, **options)
    for rows in (2, 3, 9):
        assert torch.equal(fused_linear(x[:rows], weights, biases, **options), full[:rows])
        assert torch.equal(fused_linear(x[-rows:], weights, biases, **options), full[-rows:])


@pytest.mark.parametrize("rows", [1, 3])
def test_strided_operands(device, rows):
    """Rows of a larger buffer, and weights that are slices or transposes of another tensor."""
    x = torch.randn(8, 2 * 64 + 3, device=device)[1 : 1 + rows, 3:67]
    big = torch.randn(60, 200, device=device)
    weights = [big[3:35, 8:72], big[::3, 100:164], torch.randn(64, 10, device=device).t()]
    residual = torch.randn(rows, 2 * 62, device=device)[:, ::2]
    check(x, weights, [None] * 3, residual=residual)


@pytest.mark.parametrize("rows", [1, 2])
def test_nan_and_infinity_stay_in_their_row_and_column(device, rows):
    x = torch.randn(rows, 96, device=device)
    (weight,), _ = layers([20], 96, device, torch.float32)
    weight[3, 5] = torch.nan
    y = fused_linear(x, [weight], backend="triton")
    assert y[:, 3].isnan().all() and y.isnan().sum() == rows
    x[0, 7] = torch.inf
    y = fused_linear(x, [weight.nan_to_num()], backend="triton")
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_no_rows_and_no_outputs(device):
    weights, _ = layers([8], 16, device, torch.float32)
    assert fused_linear(torch.randn(0, 16, device=device), weights, backend="triton").shape == (0, 8)
    assert fused_linear(torch.randn(2, 16, device=device), [weights[0][:0]], backend="triton").shape == (2, 0)


def test_operands_are_not_written(device):
    x, (weights, biases) = torch.randn(1, 64, device=device), layers([16, 16], 64, device, torch.float32, bias=True)
    before = [tensor.clone() for tensor in (x, *weights, *biases)]
    fused_linear(x, weights, biases, gated=True, residual=torch.randn(1, 16, device=device), backend="triton")
    assert all(torch.equal(*pair) for pair in zip(before, (x, *weights, *biases), strict=True))


def test_where_it_pays():
    assert pays(1, torch.float32) and pays(16, torch.bfloat16)
    assert not pays(2, torch.float32) and not pays(17, torch.bfloat16)


def test_errors(device):
    x, (weights, _) = torch.randn(2, 64, device=device), layers([16, 8], 64, device, torch.float32)
    for message, arguments, options in [
        (r"17 rows", (torch.randn(17, 64, device=device), weights), {}),
        (r"expected \(\.\.\., K\)", (x[:, :32], weights), {}),
        (r"one of one shape|two of one shape", (x, weights), {"gated": True}),
        (r"1 biases for 2 weights", (x, weights, [None]), {}),
        (r"a bias \(9,\)", (x, weights, [None, torch.randn(9, device=device)]), {}),
        (r"norm_weight \(63,\)", (x, weights), {"norm_weight": torch.randn(63, device=device)}),
        (r"residual \(2, 16\), expected \(2, 24\)", (x, weights), {"residual": torch.randn(2, 16, device=device)}),
        (r"weights \[\]", (x, []), {}),
    ]:
        with pytest.raises(ValueError, match=message):
            fused_linear(*arguments, **options)
    with pytest.raises(TypeError, match=r"float32 and another tensor torch\.float16"):
        fused_linear(x, [weights[0].half()])
    with pytest.raises(TypeError, match="float64"):
        fused_linear(x.double(), [weights[0].double()])
