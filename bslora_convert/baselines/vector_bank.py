"""Vectors as mixtures of two out of a bank: who mixes what, and the bank itself, by alternating least squares.

    x_n ≈ w_n c_{i_n} + (1 − w_n) c_{j_n}        0 ≤ w_n ≤ 1;  bank c (h, b);  min Σ_n ω_n ‖x_n − x̂_n‖²

    partner     given i, the best j of a shortlist and its share, in closed form: with t = ⟨x − c_i, c_j − c_i⟩ and
                s = ‖c_j − c_i‖², the share of j is t / s cut to [0, 1] and takes 2 share t − share² s off ‖x − c_i‖²
    assignment  the shortlist is what lies nearest to x, what points most its way, and the pair that it holds; the partner
                search starts from the first few of each and ends from the best pair's two, each taken only if it is better
    bank        linear least squares, a sparse h×h system, by conjugate gradients from the bank as it is

    exchange    vectors that are missed least give way to the worst mixed pieces; kept if the next round ends lower

None of the steps raises the objective. Which pairs to mix is a choice among h² for each vector, so a local optimum is what is
found; two starts are compared:

    farthest    zero, then again and again the vectors that the bank so far leaves most of: one at a time, or for a large
                bank as many as it has
    clusters    the centres of weighted k-means, for banks small enough for it
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHORTLIST = 32  # of each sort; small banks are searched whole
FIRSTS = 4  # of each sort
CHUNK = 1 << 22  # numbers of one (vectors, bank) table that stand in memory together
CLUSTERED = 1024  # largest bank that k-means is tried for
SINGLY = 64  # largest starting bank that grows by one vector at a time
EXCHANGED = 16  # one in so many vectors of the bank may be exchanged at a time
GRADIENT_STEPS = 12  # of the bank's conjugate gradients, each round


@dataclass(frozen=True, slots=True)
class Mixing:
    """Which two vectors of the bank each vector mixes, i and j (n,), and the share w (n,) of the first."""

    first: Tensor
    second: Tensor
    share: Tensor

    def of(self, bank: Tensor) -> Tensor:
        """The mixtures: (h, b) -> (n, b)."""
        w = self.share[:, None]
        return w * bank[self.first] + (1 - w) * bank[self.second]

    def larger_first(self) -> "Mixing":
        """The same mixtures with shares of a half at least, as top-k orders them."""
        turned = self.share < 0.5
        return Mixing(
            torch.where(turned, self.second, self.first),
            torch.where(turned, self.first, self.second),
            torch.where(turned, 1 - self.share, self.share),
        )


def assign(x: Tensor, bank: Tensor, held: Mixing | None) -> tuple[Mixing, Tensor]:
    """The best mixture found for each vector, no worse than the one it holds, and ‖x − x̂‖²: (n, b), (h, b) -> …, (n,)."""
    gram = bank @ bank.T
    rows = max(CHUNK // len(bank), 1)
    found = []
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        old = None if held is None else Mixing(held.first[part], held.second[part], held.share[part])
        found.append(_assign(x[part], bank, gram, old))
    return (
        Mixing(*(torch.cat([getattr(mixing, field) for mixing, _ in found]) for field in ("first", "second", "share"))),
        torch.cat([left for _, left in found]),
    )


def update_bank(x: Tensor, weights: Tensor, mixing: Mixing, bank: Tensor) -> Tensor:
    """A bank of lower objective for these mixtures, by conjugate gradients with a diagonal preconditioner."""
    w, omega = mixing.share[:, None], weights[:, None]

    def gathered(y: Tensor) -> Tensor:
        """Sum over the vectors that use each of the bank: (n, b) -> (h, b)."""
        total = torch.zeros_like(bank)
        return total.index_add_(0, mixing.first, w * y).index_add_(0, mixing.second, (1 - w) * y)

    diagonal = torch.zeros_like(bank[:, :1])
    diagonal.index_add_(0, mixing.first, omega * w * w).index_add_(0, mixing.second, omega * (1 - w) ** 2)
    inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1.0), 0.0)
    left = gathered(omega * (x - mixing.of(bank)))
    direction = inverse * left
    slope = (left * direction).sum()
    for _ in range(GRADIENT_STEPS):
        image = gathered(omega * mixing.of(direction))
        curvature = (direction * image).sum()
        if not float(curvature) > 0:
            break
        length = slope / curvature
        bank, left = bank + length * direction, left - length * image
        ahead = inverse * left
        slope, former = (left * ahead).sum(), slope
        direction = ahead + (slope / former) * direction
    return bank


def exchanged(x: Tensor, weights: Tensor, mixing: Mixing, bank: Tensor, left: Tensor) -> Tensor:
    """The bank with those vectors that are missed least replaced by the pieces that are mixed worst, where these lose more.

    Without c_i its users fall back to their other vector, which costs ω w² ‖c_i − c_j‖² each. left: ‖x − x̂‖² (n,).
    """
    apart = weights * (bank[mixing.first] - bank[mixing.second]).square().sum(1)
    missed = torch.zeros_like(bank[:, 0])
    missed.index_add_(0, mixing.first, apart * mixing.share.square())
    missed.index_add_(0, mixing.second, apart * (1 - mixing.share).square())
    count = min(max(len(bank) // EXCHANGED, 1), len(x))
    least, worst = missed.topk(count, largest=False), (weights * left).topk(count)
    worth = worst.values > least.values
    bank = bank.clone()
    bank[least.indices[worth]] = x[worst.indices[worth]]
    return bank


def farthest(x: Tensor, weights: Tensor, size: int) -> Tensor:
    """A starting bank (size, b): zero and the vectors that are worst mixed from what is there already."""
    bank = x.new_zeros((1, x.shape[1]))
    left, mixing = x.square().sum(1), None
    while len(bank) < size:
        count = min(1 if size <= SINGLY else len(bank), size - len(bank), len(x))
        worst = (weights * left).topk(count).indices
        bank = torch.cat([bank, x[worst]])
        if len(bank) < size:
            mixing, left = assign(x, bank, mixing)
    return bank


def clusters(x: Tensor, weights: Tensor, size: int, seed: int) -> Tensor:
    """A starting bank (size, b) of k-means centres."""
    from sklearn.cluster import KMeans

    means = KMeans(size, n_init=1, max_iter=20, random_state=seed)
    means.fit(x.cpu().numpy(), sample_weight=weights.cpu().numpy())
    return torch.from_numpy(means.cluster_centers_).to(x)


def starts(x: Tensor, weights: Tensor, size: int, seed: int) -> list[Tensor]:
    """The banks to start from."""
    banks = [farthest(x, weights, size)]
    if size <= min(CLUSTERED, len(x)):
        banks.append(clusters(x, weights, size, seed))
    return banks


def _assign(x: Tensor, bank: Tensor, gram: Tensor, held: Mixing | None) -> tuple[Mixing, Tensor]:
    products, norms = x @ bank.T, gram.diagonal()
    squares = x.square().sum(1)
    count = min(SHORTLIST, len(bank))
    near = torch.sub(products, norms, alpha=0.5).topk(count).indices
    along = (products / norms.sqrt().clamp_min(torch.finfo(x.dtype).tiny)).topk(count).indices
    options = torch.cat([near, along] + ([] if held is None else [held.first[:, None], held.second[:, None]]), dim=1)
    at = products.gather(1, options)

    def partner(one: Tensor) -> tuple[Mixing, Tensor]:
        return _partner(one, products.gather(1, one[:, None]), options, at, norms, gram, squares)

    best, left = partner(near[:, 0])
    if held is not None:
        i, j, w = held.first, held.second, held.share
        at_i, at_j = (products.gather(1, k[:, None])[:, 0] for k in (i, j))
        size = w * w * norms[i] + 2 * w * (1 - w) * gram[i, j] + (1 - w) ** 2 * norms[j]
        best, left = _better(best, left, held, squares - 2 * (w * at_i + (1 - w) * at_j) + size)
    for one in (*near[:, 1:FIRSTS].unbind(1), *along[:, :FIRSTS].unbind(1)):
        best, left = _better(best, left, *partner(one))
    for one in (best.first, best.second):
        best, left = _better(best, left, *partner(one))
    return best, left.clamp_min(0)


def _partner(
    one: Tensor, at_one: Tensor, options: Tensor, at: Tensor, norms: Tensor, gram: Tensor, squares: Tensor
) -> tuple[Mixing, Tensor]:
    """The best second vector for each first one, of the shortlist (module docstring).

    one: (n,). at_one: ⟨x, c_i⟩ (n, 1). options, at: the shortlist and ⟨x, c_j⟩ for it, (n, K).
    """
    beside = gram[one[:, None], options]
    own = norms[one][:, None]
    t = at - at_one + own - beside
    s = (norms[options] - 2 * beside + own).clamp_min(torch.finfo(at.dtype).tiny)
    share = (t / s).clamp(0, 1)
    most, place = (share * (2 * t - share * s)).max(1)
    other, share = (table.gather(1, place[:, None])[:, 0] for table in (options, share))
    same = other == one  # nothing helps: any other vector, with no share
    other, share = torch.where(same, (one + 1) % len(norms), other), torch.where(same, 0.0, share)
    return Mixing(one, other, 1 - share), squares - 2 * at_one[:, 0] + norms[one] - most


def _better(mixing: Mixing, left: Tensor, other: Mixing, other_left: Tensor) -> tuple[Mixing, Tensor]:
    """Of two mixtures of each vector the one that leaves less."""
    take = other_left < left
    return (
        Mixing(
            torch.where(take, other.first, mixing.first),
            torch.where(take, other.second, mixing.second),
            torch.where(take, other.share, mixing.share),
        ),
        torch.where(take, other_left, left),
    )
