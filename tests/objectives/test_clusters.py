"""What cluster targets are made of: cosine transform, principal axes, k-means."""
import math

import numpy as np
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.objectives.clusters import dct_basis, kmeans, nearest_centroid, principal_axes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_dct_is_scipys():
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(4, 80, generator=seeded())
    truth = fft.dct(x.double().numpy(), type=2, norm="ortho")[:, :13]
    assert np.allclose((x @ dct_basis(80, 13)).numpy(), truth, atol=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_principal_axes_are_scikit_learns(whiten):
    PCA = pytest.importorskip("sklearn.decomposition").PCA
    x = torch.randn(800, 20, generator=seeded()) @ torch.randn(20, 20, generator=seeded(1)) + 3
    mean, axes, share = principal_axes(x.split(100), 6, whiten=whiten)
    peer = PCA(6, whiten=whiten, svd_solver="full").fit(x.numpy())
    ours, theirs = ((x - mean) @ axes).numpy(), peer.transform(x.numpy())
    assert np.allclose(np.abs(ours), np.abs(theirs), rtol=5e-3, atol=5e-3 * np.abs(theirs).max())
    assert math.isclose(share, peer.explained_variance_ratio_.sum(), rel_tol=1e-3)


def test_principal_axes_of_flat_data_are_finite():
    x = torch.randn(50, 3, generator=seeded()) @ torch.randn(3, 10, generator=seeded(1))  # rank 3
    mean, axes, _ = principal_axes([x], 8, whiten=True)
    assert torch.isfinite(axes).all()
    with pytest.raises(EsslError):
        principal_axes([x], 11)


@pytest.mark.parametrize("clusters", [2, 7, 40])
def test_kmeans_reaches_scikit_learns_inertia(clusters):
    KMeans = pytest.importorskip("sklearn.cluster").KMeans
    x = torch.randn(2000, 5, generator=seeded()) + 3 * torch.randint(3, (2000, 1), generator=seeded(1))
    start = x[:clusters].clone()
    ours = kmeans(x, clusters, iterations=12, start=start)
    peer = KMeans(clusters, init=start.numpy(), n_init=1, max_iter=12, tol=0, algorithm="lloyd").fit(x.numpy())
    assert math.isclose(ours.inertia[-1] * len(x), peer.inertia_, rel_tol=1e-3)
    assert len(ours.inertia) == 13 and all(a >= b - 1e-6 for a, b in zip(ours.inertia, ours.inertia[1:]))


def test_nearest_centroid_is_cdist():
    x, c = torch.randn(333, 9, generator=seeded()) + 5, torch.randn(31, 9, generator=seeded(1)) + 5
    codes, distance = nearest_centroid(x, c, chunk=50)
    truth = torch.cdist(x.double(), c.double()).min(1)
    assert torch.equal(codes, truth.indices) and torch.allclose(distance, truth.values.square().float(), atol=1e-3)


def test_empty_clusters_are_filled():
    x = torch.cat([torch.zeros(50, 2), torch.full((50, 2), 8.0) + torch.rand(50, 2, generator=seeded())])
    found = kmeans(x, 4, start=torch.zeros(4, 2))  # three of the four are empty at once
    assert len(nearest_centroid(x, found.centroids)[0].unique()) == 4
    with pytest.raises(EsslError, match="frames"):
        kmeans(x[:3], 4)


def test_kmeans_draws_from_its_generator():
    x = torch.randn(300, 4, generator=seeded())
    a, b, c = (kmeans(x, 9, generator=seeded(s)).centroids for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
