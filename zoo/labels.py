"""Members' answers in one order of classes, joined by label name where they know different ones.

A member says nothing about classes that it does not know: its softmax is over its own. Of classes
that two members share they should say the same, so each answer is scaled until the shared classes
have the same mass in both. With more members the scales are the least-squares solution of all
pairs' demands (Jiang et al. 2011, "Statistical ranking and combinatorial Hodge theory",
arXiv:0811.1067): exact where the members are parts of one distribution. Members that no shared
class ties together stand side by side, with equal mass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The log-probability of what a member does not know, before others tell; finite for gradients.
_NOTHING = -1e30


class ByLabel:
    """Every member's answer [B, C], over all classes.

    own: the classes of each member, in its own order. classes: the C names to count in, those that
    any member knows. same: whether all members know all classes. known: bool [M, C]. Raises
    ValueError for other classes.
    """

    def __init__(self, own: Sequence[Sequence[str]], classes: Sequence[str]) -> None:
        if {name for names in own for name in names} != set(classes):
            raise ValueError("the classes are not those that the members know")
        self.knows_all = [set(names) == set(classes) for names in own]
        self.same = all(self.knows_all)
        places = [{name: index for index, name in enumerate(names)} for names in own]
        self.known = torch.tensor([[name in place for name in classes] for place in places])
        # A class that a member lacks is read from a column behind its own. None: as they are.
        self.columns = [[place.get(name, len(place)) for name in classes]
                        if tuple(place) != tuple(classes) else None for place in places]
        if not self.same:
            self._tie()

    def __call__(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """logits: of each member [B, its classes]. Where all know the same classes, these in one
        order; else log-probabilities, float32, with what the others say of the unknown ones."""
        if self.same:
            return tuple(self.one(number, part) for number, part in enumerate(logits))
        own = [part.float().log_softmax(1) for part in logits]
        return self._completed([
            self.one(number, part if self.knows_all[number] else _with_nothing(part))
            for number, part in enumerate(own)])

    def one(self, number: int, part: Tensor) -> Tensor:
        """The columns of one member in the order of the classes."""
        columns = self.columns[number]
        return part if columns is None else part[:, columns]

    def _tie(self) -> None:
        """Which members share which classes, and what solves their demands."""
        members = len(self.known)
        self.pairs = [(one, other, _places(self.known[one] & self.known[other]))
                      for one in range(members) for other in range(one + 1, members)
                      if (self.known[one] & self.known[other]).any()]
        laplacian = torch.zeros(members, members, dtype=torch.float64)
        names = list(range(members))
        for one, other, _ in self.pairs:
            laplacian[[one, other], [one, other]] += 1
            laplacian[[one, other], [other, one]] -= 1
            names = [names[one] if name == names[other] else name for name in names]
        self.solution = torch.linalg.pinv(laplacian, hermitian=True).float()  # (M, M)
        self.group = [list(dict.fromkeys(names)).index(name) for name in names]
        self.covers = [_places(self.known[torch.tensor(self.group) == number].any(0))
                       for number in range(max(self.group) + 1)]

    def _completed(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """parts: log-probabilities [B, C] of each member, nothing at what it does not know."""
        demands = [torch.zeros_like(part[:, 0]) for part in parts]  # each (B,)
        for one, other, shared in self.pairs:
            ratio = parts[other][:, shared].logsumexp(1) - parts[one][:, shared].logsumexp(1)
            demands[one], demands[other] = demands[one] + ratio, demands[other] - ratio
        known = self.known.to(parts[0].device)
        scales = self.solution.to(parts[0].device) @ torch.stack(demands)  # (M, B)
        scaled = torch.stack(list(parts)) + scales[..., None]  # (M, B, C)
        pooled = scaled.logsumexp(0) - known.sum(0).log()  # (B, C), over those that know a class
        masses = torch.stack([pooled[:, places].logsumexp(1) for places in self.covers])
        scaled = scaled - masses[self.group][..., None]
        pooled = scaled.logsumexp(0) - known.sum(0).log()
        return torch.where(known[:, None], scaled, pooled).log_softmax(2).unbind(0)


def _with_nothing(part: Tensor) -> Tensor:
    return torch.cat([part, torch.full_like(part[:, :1], _NOTHING)], dim=1)


def _places(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()
