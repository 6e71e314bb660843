"""A reinforcement-learning agent that chooses the sizes of blocks, one after another.

AMC (He et al., ECCV 2018, arXiv 1802.03494): an actor maps the state in front of a block to the share of it that goes,
clipped so that the budget can still be met (algorithm 1); here also so that it is used up. The reward comes with the
last block and is given to all of them: the negative divergence from the dense model. Actor and critic are trained as in
DDPG (Lillicrap et al., ICLR 2016) with AMC's constants, except smaller networks and, as asked, fewer episodes.

Notation: T blocks; a state has F features; B transitions in a batch.
"""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from numprune.counted import counted
from numprune.errors import InputError
from numprune.progress import progress
from numprune.search.space import Space, key
from numprune.slices import Size

_HIDDEN = 64
_BATCH = 64
_ACTOR_RATE, _CRITIC_RATE = 1e-4, 1e-3
_SOFT = 0.01  # of the target networks
_NOISE = 0.5  # standard deviation of the first actions
_RANDOM = 4  # one episode of so many, at the beginning, has random actions only
_FINAL_NOISE = 0.02  # in the last episode
_BASELINE = 0.95  # of the moving average that is subtracted from rewards


@dataclass(frozen=True)
class Episodes:
    """What an agent found.

    Attributes:
        plans: different ones, the best first.
        candidates: how many were measured.
    """

    plans: Sequence[Mapping[str, Size]]
    candidates: int


class _Network(nn.Module):
    def __init__(self, inputs: int, *, bounded: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, 1),
            *([nn.Sigmoid()] if bounded else []),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return (B, 1) of inputs (B, ...)."""
        output: Tensor = self.layers(torch.cat(inputs, dim=-1))
        return output


class _Walk:
    """The blocks of a plan, chosen one after another within the budget."""

    def __init__(self, space: Space) -> None:
        self._space = space
        blocks = space.anatomy.blocks
        self._whole = sum(space.ladders[block.name][-1].cost for block in blocks)
        self._kinds = space.anatomy.kinds

    def plan(self, act: Callable[[Tensor], float]) -> tuple[dict[str, Size], list[Tensor], list[float]]:
        """Return a plan with the states (F,) in front of its blocks, and the actions after clipping.

        Args:
            act: a state -> the share of the block that goes.
        """
        blocks, ladders = self._space.anatomy.blocks, self._space.ladders
        plan: dict[str, Size] = {}
        states: list[Tensor] = []
        actions: list[float] = []
        kept, left = 0, list(blocks)
        while left:
            block, *left = left
            ladder = ladders[block.name]
            cost = ladder[-1].cost
            room = self._space.limit - kept
            most = room - sum(ladders[other.name][0].cost for other in left)
            least = room - sum(ladders[other.name][-1].cost for other in left)
            states.append(self._state(len(plan), block.kind, cost, kept, room, actions[-1] if actions else 0.0))
            wanted = min(max((1 - act(states[-1])) * cost, least), most)
            rung = ladder[max(bisect_right(ladder, wanted, key=lambda rung: rung.cost) - 1, 0)]
            actions.append(1 - rung.cost / cost if cost else 0.0)
            plan[block.name] = rung.size
            kept += rung.cost
        return plan, states, actions

    def _state(self, done: int, kind: str, cost: int, kept: int, room: int, before: float) -> Tensor:
        kinds = [float(kind == other) for other in self._kinds]
        shares = [cost / self._whole, kept / self._whole, room / self._whole]
        return torch.tensor([done / len(self._space.ladders), *kinds, *shares, before])


class _Agent:
    def __init__(self, features: int) -> None:
        self.actor = _Network(features, bounded=True)
        self._critic = _Network(features + 1, bounded=False)
        self._targets = copy.deepcopy(self.actor), copy.deepcopy(self._critic)
        self._optimizers = [
            torch.optim.Adam(network.parameters(), rate)
            for network, rate in ((self.actor, _ACTOR_RATE), (self._critic, _CRITIC_RATE))
        ]

    def train(self, states: Tensor, actions: Tensor, rewards: Tensor, following: Tensor, ends: Tensor) -> None:
        """Take one step on transitions: states (B, F), actions, rewards and ends (B, 1), and the next states (B, F)."""
        actor, critic = self._targets
        with torch.no_grad():
            value = rewards + (1 - ends) * critic(following, actor(following))
        self._step(1, nn.functional.mse_loss(self._critic(states, actions), value))
        self._step(0, -self._critic(states, self.actor(states)).mean())
        for target, network in zip(self._targets, (self.actor, self._critic), strict=True):
            for slow, value in zip(target.parameters(), network.parameters(), strict=True):
                slow.data.lerp_(value.data, _SOFT)

    def _step(self, which: int, loss: Tensor) -> None:
        optimizer = self._optimizers[which]
        self.actor.zero_grad()
        self._critic.zero_grad()
        loss.backward()
        optimizer.step()


def explore(space: Space, reward: Callable[[Mapping[str, Size]], float], episodes: int, seed: int) -> Episodes:
    """Return the plans that an agent tried.

    Args:
        space: of plans; those that no server can run are not returned.
        reward: of a plan, higher is better.
        episodes: plans to try.
        seed: of networks and noise.

    Raises:
        InputError: no server can run any of the plans tried.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _explore(space, reward, episodes, generator)


def _explore(
    space: Space, reward: Callable[[Mapping[str, Size]], float], episodes: int, generator: torch.Generator
) -> Episodes:
    walk = _Walk(space)
    agent: _Agent | None = None
    memory: list[tuple[Tensor, ...]] = []
    found: dict[tuple[Size, ...], tuple[float, dict[str, Size]]] = {}
    random, average = max(1, episodes // _RANDOM), None
    for episode in progress(range(episodes), "agent", "episode"):
        share = max(0, episode - random) / max(1, episodes - random)
        noise = _NOISE * (_FINAL_NOISE / _NOISE) ** share

        def act(state: Tensor, agent: _Agent | None = agent, noise: float = noise) -> float:
            if agent is None:
                return float(torch.rand((), generator=generator))
            with torch.no_grad():
                mean = float(agent.actor(state))
            return _truncated(mean, noise, generator)

        plan, states, actions = walk.plan(act)
        if key(plan) not in found:
            found[key(plan)] = reward(plan), plan
        value = found[key(plan)][0]
        average = value if average is None else _BASELINE * average + (1 - _BASELINE) * value
        for number, (state, action) in enumerate(zip(states, actions, strict=True)):
            end = number == len(states) - 1
            scalars = (torch.tensor([one]) for one in (action, value - average, float(end)))
            action_, reward_, end_ = scalars
            memory.append((state, action_, reward_, state if end else states[number + 1], end_))
        if episode + 1 >= random:
            agent = agent or _Agent(len(states[0]))
            for _ in states:
                chosen = torch.randint(len(memory), (_BATCH,), generator=generator).tolist()
                agent.train(*(torch.stack(part) for part in zip(*(memory[index] for index in chosen), strict=True)))
    best = sorted((pair for pair in found.values() if space.is_servable(pair[1])), key=lambda pair: -pair[0])
    if not best:
        raise InputError(
            f"--episodes: each of the {counted(len(found), 'plan')} that the agent tried gives attention more than "
            f"{space.shapes} sizes; let it try more than {counted(episodes, 'episode')}"
        )
    return Episodes([plan for _, plan in best], len(found))


def _truncated(mean: float, deviation: float, generator: torch.Generator) -> float:
    """Return a draw from the normal distribution truncated to [0, 1]."""
    low, high = (0.5 * (1 + math.erf((end - mean) / (deviation * math.sqrt(2)))) for end in (0.0, 1.0))
    uniform = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
    drawn = mean + deviation * math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * uniform - 1)))
    return min(max(drawn, 0.0), 1.0)
