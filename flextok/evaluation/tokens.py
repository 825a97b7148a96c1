"""What tokens hold: how much of the codebook each position uses, and whether the first tokens group images.

Libraries are imported where they are used: training imports this, and should start quickly.
"""

from collections.abc import Sequence

import numpy as np
import torch


def code_statistics(tokens: torch.Tensor, codebook_size: int) -> dict[str, int | list[int] | list[float]]:
    """Use of the codebook at each position, over N images.

    N images show at most N codes: `used` is at most N, `entropy_bits` at most log2(N) and `perplexity` at most N,
    however large the codebook. Far more images than codes are needed to estimate the entropy of a position; compare
    at the same N.

    Args:
        tokens: Integers [N, L] in 0..codebook_size - 1.
        codebook_size: Number of codes.

    Returns:
        used: Distinct codes at each position, L integers.
        entropy_bits: Entropy of the codes' frequencies at each position, L floats in 0..log2(min(N, codebook_size)).
        perplexity: 2 ** entropy_bits, L floats.
        used_overall: Distinct codes at any position.

    Raises:
        ValueError: Tokens out of range.
    """
    from scipy.stats import entropy

    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"tokens are in {low}..{high}, but a codebook of {codebook_size} has 0..{codebook_size - 1}")
    counts = [position.unique(return_counts=True)[1].numpy() for position in tokens.cpu().T]
    bits = [float(entropy(count, base=2)) for count in counts]
    return {
        "used": [len(count) for count in counts],
        "entropy_bits": bits,
        "perplexity": [2**bit for bit in bits],
        "used_overall": len(tokens.unique()),
    }


def first_tokens_silhouette(
    codes: torch.Tensor, k: int, labels: Sequence[int] | None = None, n_clusters: int = 8, seed: int = 0
) -> float | None:
    """How well the codes of the first k tokens group images: their mean silhouette (Rousseeuw 1987), Euclidean.

    An image is the vector of its first k codes, k * C numbers. With labels, groups are classes: near 1, the first
    tokens tell classes apart; near 0, they do not; below 0, images are nearer to other classes. Without labels,
    groups are clusters of k-means on those vectors, and the value says how clustered they are, whatever the meaning.

    FSQ codes coincide for many images. k-means then gets fewer clusters: at most half as many as there are distinct
    vectors, but two where there are two or three, since a cluster for each distinct vector would give 1 for any data.

    Args:
        codes: Quantised latents [N, L, C], e.g. of FSQ in [-1, 1].
        labels: Class of each image, [N].
        n_clusters: Clusters of k-means, at least 2; of no effect with labels.
        seed: Of k-means.

    Returns:
        The silhouette in [-1, 1], or None where it is undefined: all images have the same first codes, there is one
        group only, or each image is a group of its own.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    vectors = codes[:, :k].flatten(1).double().numpy()
    distinct = len(np.unique(vectors, axis=0))
    if distinct < 2:
        return None
    if labels is None:
        clusters = min(n_clusters, max(2, distinct // 2))
        labels = KMeans(clusters, n_init=10, random_state=seed).fit_predict(vectors)
    if not 2 <= len(np.unique(labels)) < len(vectors):
        return None
    return float(silhouette_score(vectors, labels))
