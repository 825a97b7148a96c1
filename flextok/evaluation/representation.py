"""What features hold: how two spaces agree (CKNNA), and which classes can be read from one (k-NN, linear probe)."""

from collections.abc import Sequence

import numpy as np
import torch

Labels = torch.Tensor | Sequence[int] | np.ndarray

# Rows of the kernel matrices that are in memory at once.
CKNNA_ROWS = 1024


def cknna(a: torch.Tensor, b: torch.Tensor, k: int = 10) -> float:
    """Centered kernel nearest-neighbour alignment of two feature spaces (Huh et al. 2024, arXiv 2405.07987, appendix).

    REPA (arXiv 2410.06940) measures a decoder's features against an encoder's by it, with k = 10. It is CKA whose
    HSIC counts only pairs that are neighbours in both spaces. For features scaled to unit length, phi_i of `a` and
    psi_i of `b`, with the kernel <., .> centred over each row:

        K_ij = <phi_i, phi_j> - mean_l <phi_i, phi_l>,    L_ij = <psi_i, psi_j> - mean_l <psi_i, psi_l>
        Align(K, L) = sum_ij alpha(i, j) K_ij L_ij / (n - 1)^2
        alpha(i, j) = 1 if i != j and phi_j in knn(phi_i; k) and psi_j in knn(psi_i; k), else 0
        CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L))

    with knn by the kernel itself, without the point. This is the biased estimate of HSIC that the appendix writes
    down. Some implementations mask an unbiased one instead: their values differ, so compare values of one kind only.

    Args:
        a: [N, D1], one vector per image (mean over positions for a grid). Any float dtype; computed in float64. A
            vector of zeros stays one.
        b: [N, D2], of the same images in the same order.
        k: Neighbours, 1 to N - 1. Values grow with k / N: compare at the same k and N only.

    Returns:
        About 0 (about k / N, for unrelated spaces) to 1 (the same space up to rotation and scale).

    Raises:
        ValueError: For shapes that do not match, `k` out of range, values that are not finite, or features that
            are the same for all images.
    """
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b):
        raise ValueError(f"features are {list(a.shape)} and {list(b.shape)}, expected [N, D1] and [N, D2]")
    if not 1 <= k < len(a):
        raise ValueError(f"k is {k}, but {len(a)} images have 1 to {len(a) - 1} neighbours: lower k or use more images")
    a, b = _unit_length(a), _unit_length(b)
    ab, aa, bb = 0.0, 0.0, 0.0
    for start in range(0, len(a), CKNNA_ROWS):
        rows = slice(start, start + CKNNA_ROWS)
        kernel_a, near_a = _kernel_rows(a, rows, k)
        kernel_b, near_b = _kernel_rows(b, rows, k)
        ab += (kernel_a * kernel_b)[near_a & near_b].sum().item()
        aa += kernel_a[near_a].square().sum().item()
        bb += kernel_b[near_b].square().sum().item()
    for name, own in (("first", aa), ("second", bb)):
        if own < 1e-20 * len(a) * k:  # rounding alone gives 1e-32 for each pair
            raise ValueError(f"the {name} features are the same for all {len(a)} images: CKNNA is undefined")
    return ab / (aa * bb) ** 0.5


def _unit_length(features: torch.Tensor) -> torch.Tensor:
    features = features.detach().to("cpu", torch.float64)
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values: look for the step that made them")
    return torch.nn.functional.normalize(features, dim=1, eps=torch.finfo(features.dtype).tiny)


def _kernel_rows(features: torch.Tensor, rows: slice, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the centred kernel [R, N], and which entries are among the k nearest of their row, bool [R, N]."""
    kernel = features[rows] @ (features - features.mean(0)).T
    own = torch.arange(len(features))[rows, None]
    nearest = kernel.scatter(1, own, -torch.inf).topk(k, dim=1).indices
    return kernel, torch.zeros_like(kernel, dtype=torch.bool).scatter(1, nearest, True)


def knn_accuracy(train_x: torch.Tensor, train_y: Labels, test_x: torch.Tensor, test_y: Labels, k: int = 20) -> float:
    """Top-1 accuracy of a k-nearest-neighbour classifier: cosine distance, one vote each (scikit-learn).

    Args:
        train_x, test_x: Features [N, D] and [M, D].
        train_y, test_y: Class of each, integers [N] and [M].
        k: Neighbours that vote, 1 to N.

    Returns:
        Share of test images with the right class, 0 to 1.

    Raises:
        ValueError: For shapes that do not match, values that are not finite, fewer than two classes to learn from,
            or `k` out of range.
    """
    from sklearn.neighbors import KNeighborsClassifier

    train_x, train_y, test_x, test_y = _checked_probe(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k is {k}, but there are {len(train_x)} training images: set 1 to {len(train_x)}")
    return float(KNeighborsClassifier(k, metric="cosine").fit(train_x, train_y).score(test_x, test_y))


def linear_probe_accuracy(train_x: torch.Tensor, train_y: Labels, test_x: torch.Tensor, test_y: Labels) -> float:
    """Top-1 accuracy of logistic regression (scikit-learn's, with L2 penalty C = 1) on standardised features.

    Mean and standard deviation are those of the training images. The fit is deterministic: lbfgs draws no numbers.

    Args:
        train_x, test_x: Features [N, D] and [M, D].
        train_y, test_y: Class of each, integers [N] and [M].

    Returns:
        Share of test images with the right class, 0 to 1.

    Raises:
        ValueError: For shapes that do not match, values that are not finite, or fewer than two classes to learn from.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_x, train_y, test_x, test_y = _checked_probe(train_x, train_y, test_x, test_y)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(probe.fit(train_x, train_y).score(test_x, test_y))


def _checked_probe(train_x: torch.Tensor, train_y: Labels, test_x: torch.Tensor, test_y: Labels) -> list[np.ndarray]:
    """The four as NumPy arrays."""
    arrays = []
    for name, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        x, y = torch.as_tensor(x).detach().cpu().float().numpy(), torch.as_tensor(y).cpu().numpy()
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
            raise ValueError(
                f"{name} features are {list(x.shape)} and labels {list(y.shape)}, expected [N, D] and [N] of at least "
                "one image"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"{name} features hold NaN or infinite values: look for the step that made them")
        arrays += [x, y]
    if arrays[0].shape[1] != arrays[2].shape[1]:
        raise ValueError(
            f"training features have {arrays[0].shape[1]} channels, but test features {arrays[2].shape[1]}"
        )
    classes = np.unique(arrays[1])
    if len(classes) < 2:
        raise ValueError(
            f"all {len(arrays[1])} training images are of class {classes[0]}, expected at least two classes: "
            "use a labelled data set"
        )
    return arrays
