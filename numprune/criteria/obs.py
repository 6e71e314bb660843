"""Greedy optimal brain surgeon on whole units."""

import torch
from torch import Tensor

from numprune.criteria.view import BlockView
from numprune.linalg import cholesky, damped, spd_inverse
from numprune.slices import Size

_PANEL = 128  # channels whose removals are applied together
_COMPACT = 0.75  # removed rows and columns are dropped once the remaining units fall below this share


def obs(view: BlockView) -> Tensor:
    """Return, for each unit, the share of the block's output energy lost after its removal in greedy order, (units,).

    Ascending order of this score is the greedy order: each time, the unit is removed whose removal costs least after
    refitting the other weights. The n-th score is the block's error curve at n. Units that stay after `view.removed`
    removals score infinity.
    """
    order, costs = greedy_removal(view.weight, view.gram, view.channels_per_unit, stop=view.removed)
    energy = torch.einsum("od,de,oe->", view.weight, view.gram, view.weight)
    scores = view.weight.new_full((view.units,), torch.inf)
    scores[order] = costs.cumsum(0) / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    return scores


def obs_members(view: BlockView, units: Tensor) -> Tensor:
    """Return the round of `greedy_members` in which each member of `units` (K,) is removed: (K, members)."""
    order, _ = greedy_members(view.weight, view.gram, units, Size(view.units, view.members))
    scores = view.weight.new_full((len(units), view.members), len(order))
    rounds = torch.arange(len(order), dtype=scores.dtype, device=scores.device)
    return scores.scatter_(1, order.T, rounds.expand(len(units), -1))


def greedy_removal(
    weight: Tensor, gram: Tensor, channels_per_unit: int, damping: float = 1e-4, *, stop: int | None = None
) -> tuple[Tensor, Tensor]:
    """Remove units, cheapest first, and refit the remaining weights after each removal.

    With Q = (G + gamma I)^-1, removing unit u with channels g costs s_u = tr(W_g (Q_gg)^-1 W_g^T), after which
    W <- W - W_g Q_gg^-1 Q_g: and Q <- Q - Q_:g Q_gg^-1 Q_g: (Hassibi & Stork 1993 for one channel; Kurtic et al. 2023,
    ZipLM, arXiv 2302.04089, eq. 2-4, for groups).

    Computed in panels, like LAPACK's pivoted Cholesky (dpstrf). Only M = W^T W is needed: s_u = tr(Q_gg^-1 M_gg).
    With Q_gg = R R^T and u = R^-1 Q_g:, a removal is

        Q <- Q - u^T u,    M <- M - u^T v - v^T u,    v = R^-1 M_g: - (R^-1 M_gg R^-T) u / 2.

    The next choice needs the diagonal blocks of Q and M, which are kept up to date, and the rows of the chosen unit, to
    which the panel's pending u and v are applied first. Everything else waits until the panel is full: three matrix
    products then apply all its removals, which one by one would each pass over the whole of Q and W.

    Args:
        weight: (out, D) float64.
        gram: (D, D) float64.
        channels_per_unit: c; D is a multiple.
        damping: gamma relative to the mean of diag(G), above 0.
        stop: n, how many units to remove; all when None. The first n are the same either way.

    Returns:
        order: (n,) unit indices, first removed first.
        costs: (n,) the squared output error E||dy||^2 that each removal adds, in that order; finite and not negative.

    Raises:
        ValueError: `gram` is not finite or far from positive semidefinite.
    """
    c = channels_per_unit
    units = weight.shape[1] // c
    steps = units if stop is None else min(stop, units)
    moments = damped(gram, damping)
    Q, M = spd_inverse(moments), weight.T @ weight
    least = moments.diagonal().reciprocal()
    del moments  # D x D, as Q and M are
    left = torch.arange(units, device=weight.device)  # the units in Q and M
    removed = torch.zeros(units, dtype=torch.bool, device=weight.device)  # which of those are removed
    order, costs = [left[:0]], [least[:0]]
    for done in range(0, steps, max(1, _PANEL // c)):
        count = min(max(1, _PANEL // c), steps - done)
        chosen, paid, U, V = _choose_panel(Q, M, least, removed, c, count)
        order.append(left[chosen])
        costs.append(paid)
        removed[chosen] = True
        if done + count == steps:
            break
        if units - done - count < _COMPACT * len(left):
            stay = (~removed).nonzero()[:, 0]
            channels = (stay[:, None] * c + torch.arange(c, device=stay.device)).flatten()
            Q = Q[channels][:, channels]
            M = M[channels][:, channels]
            U, V, least = U[:, channels], V[:, channels], least[channels]
            left, removed = left[stay], removed[stay]
        Q.addmm_(U.T, U, alpha=-1)
        M.addmm_(U.T, V, alpha=-1).addmm_(V.T, U, alpha=-1)
    return torch.cat(order), torch.cat(costs)


def greedy_members(
    weight: Tensor, gram: Tensor, units: Tensor, size: Size, damping: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Remove all members but one of the remaining `units`, one of each unit per round, so that all have equally many.

    The other units have already been removed and the rest refitted. Within a round, the next member to remove is the
    cheapest one among units that have not lost any in this round; costs and refits are those of `greedy_removal`.

    Args:
        weight: (out, D) float64, of the whole block.
        gram: (D, D) float64.
        units: (K,) left, ascending.
        size: of the whole block; each member has the same number of channels.
        damping: as of `greedy_removal`.

    Returns:
        order: (members - 1, K), the member that each unit loses in each round.
        costs: (members - 1,), the squared output error E||dy||^2 that each round adds; finite and not negative.

    Raises:
        ValueError: `gram` is not finite or far from positive semidefinite.
    """
    rounds = size.members - 1
    c = weight.shape[1] // (size.units * size.members)
    channels = (units[:, None] * size.members * c + torch.arange(size.members * c, device=units.device)).flatten()
    moments = damped(gram, damping)[:, channels]
    inside = moments[channels]
    Q = spd_inverse(inside)
    refitted = weight @ moments @ Q
    M = refitted.T @ refitted
    least = inside.diagonal().reciprocal()
    order = torch.empty(rounds, len(units), dtype=torch.long, device=units.device)
    costs = weight.new_zeros(rounds)
    removed = torch.zeros(len(units), size.members, dtype=torch.bool, device=units.device)
    for number in range(rounds):
        barred = removed.clone()
        for _ in units:
            chosen, cost, U, V = _choose_panel(Q, M, least, barred.flatten(), c, 1)
            Q.addmm_(U.T, U, alpha=-1)
            M.addmm_(U.T, V, alpha=-1).addmm_(V.T, U, alpha=-1)
            unit, member = chosen // size.members, chosen % size.members
            order[number, unit] = member
            costs[number] += cost[0]
            removed[unit, member] = True
            barred[unit] = True
    return order, costs


def _choose_panel(
    Q: Tensor, M: Tensor, least: Tensor, removed: Tensor, c: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose `count` units, each the cheapest after the removal of those before it; Q and M (D, D) are not modified.

    For c = 1, the loop never waits for a value, which keeps a GPU busy.

    Args:
        least: (D,) lower bound of diag(Q).
        removed: (units,) not to be chosen.

    Returns:
        chosen (count,), their costs (count,), and the rows u and v (count * c, D) of their removals.
    """
    chosen = torch.empty(count, dtype=torch.long, device=Q.device)
    costs = Q.new_empty(count)
    U, V = Q.new_empty(count * c, len(Q)), Q.new_empty(count * c, len(Q))
    q, m = _diagonal_blocks(Q, c), _diagonal_blocks(M, c)
    q_diagonal, least = q.diagonal(dim1=1, dim2=2), least.view(-1, c)
    identity = torch.eye(c, dtype=Q.dtype, device=Q.device)[None]
    within = torch.arange(c, device=Q.device)
    q[removed] = identity  # anything that can be factored
    barred = Q.new_zeros(len(q)).masked_fill_(removed, torch.inf)
    for k in range(count):
        # Q_jj shrinks towards 1 / (G_jj + gamma), its value when only j is left. Anything below is rounding error,
        # and so is a negative cost.
        torch.maximum(q_diagonal, least, out=q_diagonal)
        unit = chosen[k : k + 1]
        torch.min(_costs(q, m).clamp_min_(0).add_(barred), 0, keepdim=True, out=(costs[k : k + 1], unit))
        g = unit if c == 1 else unit * c + within
        before, here = slice(k * c), slice(k * c, (k + 1) * c)
        owed_u, owed_v = U[before].index_select(1, g).T, V[before].index_select(1, g).T
        u, v = U[here], V[here]
        torch.addmm(Q.index_select(0, g), owed_u, U[before], alpha=-1, out=u)
        torch.addmm(M.index_select(0, g), owed_v, U[before], alpha=-1, out=v)
        v.addmm_(owed_u, V[before], alpha=-1)
        R = _factor(q.index_select(0, unit)[0])
        _solve(R, u)
        _solve(R, v)
        mu = v.index_select(1, g).T.contiguous()
        _solve(R, mu)
        v.addmm_(mu, u, alpha=-0.5)
        _update(q, m, *(rows.view(c, -1, c).permute(1, 2, 0) for rows in (u, v)))
        q.index_copy_(0, unit, identity)
        barred.index_fill_(0, unit, torch.inf)
    return chosen, costs, U, V


# For one channel a unit these are divisions; LAPACK's batched calls would take most of the time.


def _diagonal_blocks(matrix: Tensor, c: int) -> Tensor:
    """Return a copy of the blocks (units, c, c) on the diagonal of (D, D)."""
    return matrix.view(-1, c, len(matrix) // c, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _costs(q: Tensor, m: Tensor) -> Tensor:
    """Return tr(q^-1 m) of each of (units, c, c): (units,)."""
    if q.shape[1] == 1:
        return (m / q).flatten()
    return torch.cholesky_solve(m, cholesky(q)).diagonal(dim1=1, dim2=2).sum(1)


def _factor(pivot: Tensor) -> Tensor:
    """Return R (c, c), the Cholesky factor of pivot."""
    return pivot.sqrt() if len(pivot) == 1 else cholesky(pivot)


def _solve(R: Tensor, rows: Tensor) -> None:
    """Overwrite rows (c, n) with R^-1 rows."""
    if len(R) == 1:
        rows.div_(R)
    else:
        rows.copy_(torch.linalg.solve_triangular(R, rows, upper=False))


def _update(q: Tensor, m: Tensor, u: Tensor, v: Tensor) -> None:
    """Subtract u u^T from q and u v^T + v u^T from m, all (units, c, c)."""
    if q.shape[1] == 1:
        q.addcmul_(u, u, value=-1)
        m.addcmul_(u, v, value=-2)
    else:
        q.baddbmm_(u, u.mT, alpha=-1)
        m.baddbmm_(u, v.mT, alpha=-1).baddbmm_(v, u.mT, alpha=-1)
