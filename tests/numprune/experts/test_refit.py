"""The joint fit of all experts against least squares over all their inputs at once."""

import torch

from numprune.experts.inputs import Share
from numprune.experts.refit import Batch, refit_experts

TOKENS, EXPERTS, OUT, INPUTS = 900, 4, 6, 5


def problem(noise=0.0):
    """Two experts a token: start, truth, inputs (T, E, D), targets, and batches with every fourth token held out."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :2]
    values = normal(TOKENS, 1, INPUTS) + 0.5 * normal(TOKENS, EXPERTS, INPUTS)  # what experts read is alike
    start, truth = normal(EXPERTS, OUT, INPUTS), normal(EXPERTS, OUT, INPUTS)
    inputs = torch.zeros(TOKENS, EXPERTS, INPUTS, dtype=torch.float64)
    for expert in range(EXPERTS):
        tokens = (chosen == expert).any(1)
        inputs[tokens, expert] = values[tokens, expert]
    target = torch.einsum("ted,eod->to", inputs, truth) + noise * normal(TOKENS, OUT)
    held_out = torch.arange(TOKENS) % 4 == 3

    def batches():
        for some in torch.arange(TOKENS).split(250):
            shares = []
            for expert in range(EXPERTS):
                tokens = (chosen[some] == expert).any(1).nonzero()[:, 0]
                shares.append(Share(expert, tokens, inputs[some][tokens, expert]))
            yield Batch(shares, target[some], held_out[some])

    return start, truth, inputs, target, batches


def test_a_few_steps_solve_the_joint_least_squares_of_all_experts():
    start, _, inputs, target, batches = problem(noise=0.5)
    flat = inputs.flatten(1)
    gram = flat.T @ flat
    damping = 0.02
    own = gram.diagonal().view(EXPERTS, INPUTS).mean(1)
    ridge = (damping * own).repeat_interleave(INPUTS)
    missing = target - torch.einsum("ted,eod->to", inputs, start)
    exact = torch.linalg.solve(gram + ridge.diag(), flat.T @ missing).T.view(OUT, EXPERTS, INPUTS).movedim(1, 0)
    found = refit_experts(start, batches, damping).weights - start
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_reachable_targets_are_reached():
    start, truth, _, _, batches = problem()
    found = refit_experts(start, batches, 1e-9).weights
    assert float((found - truth).norm()) < 0.02 * float((start - truth).norm())


def test_short_text_leads_to_more_damping():
    start, _, _, _, batches = problem(noise=0.01)

    def few():
        """Sixteen tokens with targets that have nothing to do with the inputs."""
        batch = next(batches())
        shares = [Share(s.expert, s.tokens[s.tokens < 16], s.inputs[s.tokens < 16]) for s in batch.shares]
        noise = torch.randn(16, OUT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        yield Batch(shares, noise, batch.held_out[:16])

    assert refit_experts(start, batches, 1e-4, choose=True).damping == 1e-4
    assert refit_experts(torch.zeros_like(start), few, 1e-4, choose=True).damping > 0.1
