"""What the best of n samples by a proxy is worth, estimated from N >= n samples without drawing n of them."""

import numpy as np
from scipy.special import gammaln


def best_of_n(proxy, gold, counts):
    """E gold(argmax of proxy over n samples), unbiased, for each n: (len(counts), ...).

    Sorted by proxy, the i-th of N samples (from 1) is the best of a random subset of n in C(i-1, n-1) of C(N, n)
    cases: the estimator of Nakano et al. (2021), arXiv:2112.09332, that Gao et al. (2023), arXiv:2210.10760, use. Of
    samples with equal proxies each is as likely to be taken.

    Args:
        proxy: (N,).
        gold: (N,) or (N, M).
        counts: numbers n, each from 1 to N.
    """
    values, group = np.unique(proxy, return_inverse=True)
    sums = np.zeros((len(values), *gold.shape[1:]))
    np.add.at(sums, group, gold)
    size = np.bincount(group)
    mean = sums / size.reshape(-1, *[1] * (gold.ndim - 1))
    last = np.cumsum(size)  # rank of the last sample of each group
    at_most = np.stack([_subsets(last, len(proxy), n) for n in counts])  # P(best is in this group or a lower one)
    weights = np.diff(at_most, axis=1, prepend=0.0)
    return np.tensordot(weights, mean, axes=1)


def _subsets(i, total, n):
    """C(i, n) / C(N, n)."""
    i = np.asarray(i, float)
    with np.errstate(invalid="ignore"):
        log = gammaln(i + 1) - gammaln(i - n + 1) - gammaln(total + 1) + gammaln(total - n + 1)
    return np.where(i >= n, np.exp(np.where(i >= n, log, 0.0)), 0.0)


def kl(counts):
    """log n - (n - 1) / n, in nats: KL of best-of-n from the sampler, or more where proxies tie.

    It is exact without ties and a bound otherwise: Beirami et al. (2024), arXiv:2401.01879.
    """
    n = np.asarray(counts, float)
    return np.log(n) - (n - 1) / n
