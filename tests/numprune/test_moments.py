import pytest
import torch

from numprune.moments import Moments


def inputs(count=50, channels=600, outputs=5):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (channels, outputs))


@pytest.mark.parametrize("channels", [1, 255, 256, 257, 600])  # the half is summed in strips of 256
def test_moments_match_explicit_sums(channels):
    x, y = inputs(channels=channels)
    moments = Moments(channels, outputs=5)
    for part in (slice(0, 20), slice(20, 21), slice(21, 50)):
        moments.add(x[part][None], y[part][None])  # (…, D): any leading dimensions
    torch.testing.assert_close(moments.gram, x.T @ x / 50)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.cross, y.T @ x / 50)
    torch.testing.assert_close(moments.target_mean, y.mean(0))
    assert torch.equal(moments.gram, moments.gram.T)


def test_float32_sums_do_not_lose_accuracy_with_more_tokens():
    """Means of 10^3 and of 4 * 10^5 tokens: products over 4,096 are rounded to float32, sums of them to float64."""
    generator = torch.Generator().manual_seed(0)
    for count in (1_000, 400_000):
        x = torch.randn(count, 8, generator=generator) + 10
        moments = Moments(8, outputs=8)
        moments.add(x, x)
        exact = x.double().T @ x.double() / count
        for found in (moments.gram, moments.cross):
            assert float((found / exact - 1).abs().max()) < 4e-6
        torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("channels", [[0, 5], [3, 200, 255, 256, 257, 511, 512, 599], list(range(600))])
def test_moments_of_a_subset_ignore_other_channels(channels):
    """600 channels are summed in three strips."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, size, generator=generator, dtype=torch.float64) for size in (600, 3))
    whole, alone = Moments(600, outputs=3), Moments(len(channels), outputs=3)
    whole.add(x, y)
    alone.add(x[:, channels], y)
    some = whole.of(torch.tensor(channels))
    assert (some.channels, some.outputs, some.count) == (len(channels), 3, 20)
    for name in ("gram", "mean", "cross", "target_mean"):
        torch.testing.assert_close(getattr(some, name), getattr(alone, name))
    torch.testing.assert_close(some.gram, x[:, channels].T @ x[:, channels] / 20)
    some.absorb(alone)
    torch.testing.assert_close(whole.gram, x.T @ x / 20)
    torch.testing.assert_close(whole.target_mean, y.mean(0))


def test_moments_can_be_split_and_merged():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, size, generator=generator) for size in (7, 3))
    whole, part, rest = (Moments(7, outputs=3) for _ in range(3))
    for moments, rows in ((whole, slice(None)), (part, slice(0, 8)), (rest, slice(8, None))):
        moments.add(x[rows], y[rows])
    left = whole.without(part)
    assert left.count == 12
    for name in ("gram", "mean", "cross", "target_mean"):
        torch.testing.assert_close(getattr(left, name), getattr(rest, name))
    left.absorb(part)
    assert left.count == 20
    for name in ("gram", "mean", "cross", "target_mean"):
        torch.testing.assert_close(getattr(left, name), getattr(whole, name))
