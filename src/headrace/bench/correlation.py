"""How far the values of a time series depend on those before them, and what that does to an average's error."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Series = npt.NDArray[np.float64]  # in time order

_CRITICAL = 2.0  # an autocorrelation below 2 sqrt(log10(n) / n) counts as none, as Politis and White have it


def autocovariances(series: Series, lags: int) -> Series:
    """Return those of lag 0 to `lags`, each divided by the series' length. Takes n log n steps."""
    centred = series - series.mean()
    padded = 1 << (2 * len(series) - 1).bit_length()  # room for no lag to wrap round
    spectrum = np.fft.rfft(centred, padded)
    found: Series = np.fft.irfft(spectrum * spectrum.conj(), padded)[: lags + 1] / len(series)
    return found


def block_length(series: Series) -> int:
    """Return the length of a circular block bootstrap's blocks that suits the variance of the series' mean.

    Source: D. N. Politis and H. White, "Automatic block-length selection for the dependent bootstrap", Econometric
    Reviews 23 (2004), with the correction by A. Patton, Politis and White, Econometric Reviews 28 (2009), 372-375.
    """
    n = len(series)
    covariances = _window(series)
    lags = np.arange(1, len(covariances))
    long_run = float(covariances[0] + 2 * covariances[1:].sum())
    if long_run <= 0:
        return 1
    weighted = 2 * float((lags * covariances[1:]).sum())
    length = math.cbrt(1.5 * weighted**2 / long_run**2 * n)  # (2 G^2 / D)^(1/3) n^(1/3) with D = 4/3 g(0)^2
    return math.ceil(min(max(length, 1.0), 3 * math.sqrt(n), n / 3))


def correlation_time(series: Series) -> float:
    """Return how many successive values carry as much about the mean as one independent value; at least 1."""
    covariances = _window(series)
    if covariances[0] <= 0:
        return 1.0
    return max(1.0, 1 + 2 * float(covariances[1:].sum() / covariances[0]))


def variance_of_mean(series: Series) -> float:
    """Estimate the variance of the mean from overlapping blocks of the suitable length.

    Source: M. S. Meketon and B. Schmeiser, "Overlapping batch means: something for nothing?", Proceedings of the
    Winter Simulation Conference (1984).
    """
    n, length = len(series), block_length(series)
    sums = np.concatenate(([0.0], np.cumsum(series)))
    means = (sums[length:] - sums[:-length]) / length
    squares = float(((means - series.mean()) ** 2).sum())
    return length * squares / ((n - length + 1) * (n - length))


def _window(series: Series) -> Series:
    """Return the autocovariances under a flat-top window as wide as the correlation reaches."""
    n = len(series)
    quiet = max(5, math.ceil(math.sqrt(math.log10(n))))  # so many small ones in a row, and the correlation has ended
    most = min(math.ceil(math.sqrt(n)) + quiet, n - 1)
    covariances = autocovariances(series, most)
    if covariances[0] <= 0:
        return covariances[:1]
    small = np.abs(covariances) < _CRITICAL * math.sqrt(math.log10(n) / n) * covariances[0]
    width = min(2 * max(1, _last_large(small, quiet)), most)
    window = np.clip(2 * (1 - np.arange(width + 1) / width), 0, 1)
    flat_top: Series = window * covariances[: width + 1]
    return flat_top


def _last_large(small: npt.NDArray[np.bool_], quiet: int) -> int:
    """Return the lag after which `quiet` autocorrelations in a row are small, or the last one."""
    ends = np.convolve(small[1:], np.ones(quiet), mode="valid") == quiet
    return int(np.argmax(ends)) if ends.any() else len(small) - 1
