import pytest
import torch
from torch import Tensor

from infini_attention.ops import segment_positions
from infini_attention.ops.convolution import short_convolution

SEGMENT, WIDTH, CHANNELS = 5, 3, 4


def noise(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = noise(CHANNELS, WIDTH, seed=1)


def naive(row: Tensor) -> Tensor:
    """(length, channels) of one row from its start."""
    output = torch.zeros_like(row)
    for t in range(len(row)):
        for j in range(min(WIDTH - 1, t % SEGMENT) + 1):
            output[t] += WEIGHT[:, j] * row[t - j]
    return output


def convolve(
    x: Tensor, recent: Tensor | None = None, *, before: int = 0, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    opened = torch.full((len(x),), before)
    positions = segment_positions(
        x.shape[1], segment_length=SEGMENT, open_lengths=opened, padding_mask=mask, device=x.device
    )
    return short_convolution(x, WEIGHT, recent, positions=positions, padding_mask=mask)


def test_it_is_the_sum_over_the_tokens_before_in_the_same_segment() -> None:
    x = noise(2, 13, CHANNELS)
    output, recent = convolve(x)
    torch.testing.assert_close(output, torch.stack([naive(row) for row in x]))
    torch.testing.assert_close(recent, x[:, -2:])


@pytest.mark.parametrize("pieces", [[1] * 13, [4, 9], [2, 1, 7, 3], [13]])
def test_pieces_are_the_same_computation(pieces: list[int]) -> None:
    x = noise(2, 13, CHANNELS)
    outputs, recent, before = [], None, 0
    for piece in x.split(pieces, dim=1):
        output, recent = convolve(piece, recent, before=before)
        outputs.append(output)
        before += piece.shape[1]
    assert torch.equal(torch.cat(outputs, dim=1), convolve(x)[0])


def test_padding_on_either_side_and_between_changes_nothing() -> None:
    x, filled = noise(3, 9, CHANNELS), noise(3, 13, CHANNELS, seed=3)
    mask = torch.ones(3, 13, dtype=torch.bool)
    for row, padding in enumerate([[0, 1, 2, 3], [9, 10, 11, 12], [0, 4, 7, 12]]):
        mask[row, padding] = False
        filled[row, mask[row]] = x[row]
    expected, last = convolve(x)
    output, recent = convolve(filled, mask=mask)
    for row in range(3):
        torch.testing.assert_close(output[row, mask[row]], expected[row])
    torch.testing.assert_close(recent, last)

    early, rest = filled[:, :6], filled[:, 6:]
    _, recent = convolve(early, mask=mask[:, :6])
    opened = mask[:, :6].sum(dim=1)
    positions = segment_positions(
        7, segment_length=SEGMENT, open_lengths=opened, padding_mask=mask[:, 6:], device="cpu"
    )
    later, recent = short_convolution(rest, WEIGHT, recent, positions=positions, padding_mask=mask[:, 6:])
    for row in range(3):
        torch.testing.assert_close(later[row, mask[row, 6:]], expected[row, int(opened[row]) :])
    torch.testing.assert_close(recent, last)


def test_gradients() -> None:
    x, weight, recent = noise(2, 7, CHANNELS), WEIGHT.clone(), noise(2, 2, CHANNELS, seed=4)
    positions = segment_positions(7, segment_length=SEGMENT, open_lengths=torch.tensor([3, 1]))
    inputs = [each.requires_grad_() for each in (x, weight, recent)]

    def function(x: Tensor, weight: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        return short_convolution(x, weight, recent, positions=positions)

    assert torch.autograd.gradcheck(function, inputs)


def test_half_precision_is_summed_in_fp32() -> None:
    x, weight = noise(1, 9, CHANNELS).bfloat16(), WEIGHT.bfloat16()
    positions = segment_positions(9, segment_length=SEGMENT)
    output, recent = short_convolution(x, weight, None, positions=positions)
    exact, _ = short_convolution(x.double(), weight.double(), None, positions=positions)
    assert output.dtype == recent.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16())
