import pytest
import torch
from torch import Tensor

from infini_attention.ops.convolution import recent_after, short_convolution

WIDTH, CHANNELS = 3, 4


def noise(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = noise(CHANNELS, WIDTH, seed=1)


def naive(row: Tensor) -> Tensor:
    """(length, channels) of one row from its start."""
    output = torch.zeros_like(row)
    for t in range(len(row)):
        for j in range(min(WIDTH - 1, t) + 1):
            output[t] += WEIGHT[:, j] * row[t - j]
    return output


def convolve(x: Tensor, recent: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mixtures, and what to look back at after all real tokens."""
    tokens = torch.full((len(x),), x.shape[1]) if mask is None else mask.sum(dim=1)
    output, seen = short_convolution(x, WEIGHT, recent, padding_mask=mask)
    return output, recent_after(seen, WIDTH - 1, tokens)


def test_it_is_the_sum_over_the_tokens_before() -> None:
    x = noise(2, 13, CHANNELS)
    output, recent = convolve(x)
    torch.testing.assert_close(output, torch.stack([naive(row) for row in x]))
    torch.testing.assert_close(recent, x[:, -2:])


@pytest.mark.parametrize("pieces", [[1] * 13, [4, 9], [2, 1, 7, 3], [13]])
def test_pieces_are_the_same_computation(pieces: list[int]) -> None:
    x = noise(2, 13, CHANNELS)
    outputs, recent = [], None
    for piece in x.split(pieces, dim=1):
        output, recent = convolve(piece, recent)
        outputs.append(output)
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
    later, recent = convolve(rest, recent, mask=mask[:, 6:])
    for row in range(3):
        first = int(mask[row, :6].sum())
        torch.testing.assert_close(later[row, mask[row, 6:]], expected[row, first:])
    torch.testing.assert_close(recent, last)


def test_what_is_looked_back_at_after_any_number_of_tokens() -> None:
    x, recent = noise(2, 6, CHANNELS), noise(2, WIDTH - 1, CHANNELS, seed=5)
    _, seen = short_convolution(x, WEIGHT, recent)
    everything = torch.cat([recent, x], dim=1)
    after = recent_after(seen, WIDTH - 1, torch.tensor([1, 5]))
    assert torch.equal(after, torch.stack([everything[0, 1:3], everything[1, 5:7]]))


def test_packed_documents_look_back_at_nothing_before_them() -> None:
    x, cut = noise(1, 9, CHANNELS), 4
    places = torch.cat([torch.arange(cut), torch.arange(9 - cut)])
    output, _ = short_convolution(x, WEIGHT, None, document_positions=places)
    torch.testing.assert_close(output[0], torch.cat([naive(x[0, :cut]), naive(x[0, cut:])]))


def test_gradients() -> None:
    x, weight, recent = noise(2, 7, CHANNELS), WEIGHT.clone(), noise(2, 2, CHANNELS, seed=4)
    places = torch.tensor([2, 3, 4, 0, 1, 2, 3])
    inputs = [each.requires_grad_() for each in (x, weight, recent)]

    def function(x: Tensor, weight: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        return short_convolution(x, weight, recent, document_positions=places)

    assert torch.autograd.gradcheck(function, inputs)


def test_half_precision_is_summed_in_fp32() -> None:
    x, weight = noise(1, 9, CHANNELS).bfloat16(), WEIGHT.bfloat16()
    output, seen = short_convolution(x, weight, None)
    exact, _ = short_convolution(x.double(), weight.double(), None)
    assert output.dtype == seen.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16())
