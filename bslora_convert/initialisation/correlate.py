"""Where in a stretch of draws modules may stand: correlation by FFT.

    c_k = Σ_j t_j x_{k+j}           t: unit vector of a module's first h numbers, x: draws in units of their rms
        = irfft(rfft(x) · conj(rfft(t)))        in blocks, which overlap by the positions at which the sum wraps around

A module with cosine c stands out by c √h standard deviations. The transform is linear: the sum of K templates is sought at the
price of one, and c √(h / K) are left. Groups are as large as lets an expected match stand out.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from bslora_convert.initialisation.match import HEAD, RMS

LENGTH = 1 << 16  # of a transform
STEP = LENGTH - HEAD
EXPECTED = 0.45  # cosine, for which groups of short templates are made
DEVIATIONS = 5.5  # of a peak that is worth a look
TOGETHER = 12  # templates at most


class Detector:
    """Looks for several modules at once."""

    def __init__(self, heads: Mapping[str, np.ndarray]) -> None:
        self._groups: list[tuple[tuple[str, ...], torch.Tensor]] = []
        names = sorted(heads, key=lambda name: len(heads[name]))
        while names:
            room = int(len(heads[names[0]]) * (EXPECTED / DEVIATIONS) ** 2)
            group = tuple(names[: min(max(room, 1), TOGETHER)])
            names = names[len(group) :]
            total = np.zeros(LENGTH, np.float32)
            for name in group:
                total[: len(heads[name])] += heads[name]
            self._groups.append((group, torch.fft.rfft(torch.from_numpy(total)).conj()))

    def peaks(self, draws: np.ndarray) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Positions in the order of the draws, each with the modules of which one may stand there."""
        blocks = max(-(-(len(draws) - HEAD) // STEP), 1)
        padded = torch.zeros((blocks - 1) * STEP + LENGTH)
        padded[: len(draws)] = torch.from_numpy(draws)
        padded[: len(draws)] += 0.5
        spectra = torch.fft.rfft(padded.unfold(0, LENGTH, STEP))
        seen = []
        for group, template in self._groups:
            likeness = torch.fft.irfft(spectra * template, LENGTH)[:, :STEP]
            at = (likeness >= DEVIATIONS * len(group) ** 0.5 * RMS).nonzero()
            seen += [(block * STEP + position, group) for block, position in at.tolist()]
        yield from sorted(seen)
