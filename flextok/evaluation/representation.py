"""What features hold: how two spaces agree (CKNNA), and which classes can be read from one (k-NN, linear probe)."""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def cknna(a: torch.Tensor, b: torch.Tensor, k: int = 10, rows_at_once: int = 1024) -> float:
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
        a: [N, D1], one vector per image (mean over positions for a grid). Computed in float64 on the CPU.
        b: [N, D2], of the same images in the same order.
        k: Neighbours, 1 to N - 1. Values grow with k / N: compare at the same k and N only.
        rows_at_once: Rows of the kernel matrices in memory.

    Returns:
        About 0 (about k / N, for unrelated spaces) to 1 (the same space up to rotation and scale).

    Raises:
        ValueError: For features that are the same for all images.
    """
    a, b = (torch.nn.functional.normalize(x.detach().to("cpu", torch.float64), dim=1) for x in (a, b))
    ab, aa, bb = 0.0, 0.0, 0.0
    for rows in torch.arange(len(a)).split(rows_at_once):
        kernel_a, near_a = _kernel_rows(a, rows, k)
        kernel_b, near_b = _kernel_rows(b, rows, k)
        ab += (kernel_a * kernel_b)[near_a & near_b].sum().item()
        aa += kernel_a[near_a].square().sum().item()
        bb += kernel_b[near_b].square().sum().item()
    for name, own in (("first", aa), ("second", bb)):
        if own < 1e-20 * len(a) * k:  # rounding alone gives 1e-32 for each pair
            raise ValueError(f"the {name} features are the same for all {len(a)} images: CKNNA is undefined")
    return ab / (aa * bb) ** 0.5


def _kernel_rows(features: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the centred kernel [R, N], and which entries are among the k nearest of their row, bool [R, N]."""
    kernel = features[rows] @ (features - features.mean(0)).T
    nearest = kernel.scatter(1, rows[:, None], -torch.inf).topk(k, dim=1).indices
    return kernel, torch.zeros_like(kernel, dtype=torch.bool).scatter(1, nearest, True)


def probe_accuracy(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor
) -> dict[str, float]:
    """Shares of test images whose class two classifiers on frozen features name right, 0 to 1.

    Args:
        train_x, test_x: Features [N, D] and [M, D].
        train_y, test_y: Class of each, integers [N] and [M]; at least two classes in training.

    Returns:
        knn: k nearest neighbours, k = 20 or all of fewer training images, by cosine distance, with one vote each.
        linear: Logistic regression with L2 penalty C = 1 on features that are standardised by the training images'
            mean and standard deviation. The fit is deterministic: lbfgs draws no numbers.
    """
    probes = {
        "knn": KNeighborsClassifier(min(20, len(train_x)), metric="cosine"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    train_x, train_y, test_x, test_y = (tensor.cpu().numpy() for tensor in (train_x, train_y, test_x, test_y))
    return {name: float(probe.fit(train_x, train_y).score(test_x, test_y)) for name, probe in probes.items()}
