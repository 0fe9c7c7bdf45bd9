"""Pictures that look alike, found without any label: groups in the graph of nearest neighbours, and warped copies.

groups(images, 40)                       # (rows,): of each picture the number of its group
warped(batch.image, batch.keys)          # each turned, stretched, moved and bent, as its own random numbers say

Groups as labels to pre-train on: Caron and others, "Deep clustering", arXiv:1807.05520.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dltrain import Keys

__all__ = ["groups", "warped"]

# Of warps, at most: radians, shear, stretch, halves of a side; of bends the standard deviation, in halves of a side.
TURN, SHEAR, STRETCH, MOVE, BEND, NODES = 0.3, 0.3, 0.2, 0.25, 0.1, 3


def groups(images: npt.NDArray[np.float32], count: int, neighbours: int = 5) -> npt.NDArray[np.int64]:
    """Spectral clustering of pictures, (rows, pixels), each joined to those that are the nearest by angle."""
    from sklearn.cluster import SpectralClustering
    from sklearn.neighbors import kneighbors_graph

    unit = images / np.linalg.norm(images, axis=1, keepdims=True).clip(1e-9)
    graph = kneighbors_graph(unit, neighbours)
    # Either one's neighbour is the other's; and all are joined a little, so that the graph is in one piece.
    joined = graph.maximum(graph.T).toarray() + 1e-3
    found = SpectralClustering(count, affinity="precomputed", random_state=0).fit_predict(joined)
    return np.asarray(found, np.int64)


def warped(images: torch.Tensor, keys: Keys) -> torch.Tensor:
    """(rows, 1, side, side) in [0, 1], of the same shape."""
    rngs = [keys.rng(row) for row in range(len(images))]
    drawn = np.stack([rng.uniform(-1, 1, 7) for rng in rngs]).astype(np.float32)
    bends = np.stack([rng.normal(0, BEND, (2, NODES, NODES)) for rng in rngs]).astype(np.float32)
    turn, shear, wide, high, right, down, ink = torch.from_numpy(drawn).to(images.device).T
    cos, sin, shear = (TURN * turn).cos(), (TURN * turn).sin(), SHEAR * shear
    wide, high = 1 + STRETCH * wide, 1 + STRETCH * high
    x = torch.stack([wide * cos, wide * (shear * cos - sin), MOVE * right], 1)
    y = torch.stack([high * sin, high * (cos + shear * sin), MOVE * down], 1)
    places = F.affine_grid(torch.stack([x, y], 1), list(images.shape), align_corners=False)
    bent = F.interpolate(
        torch.from_numpy(bends).to(images.device), images.shape[-2:], mode="bicubic", align_corners=True
    )
    found = F.grid_sample(images, places + bent.permute(0, 2, 3, 1), align_corners=False)
    # Pens differ as well.
    return found.clamp(0, 1) ** (0.4 * ink).exp()[:, None, None, None]
