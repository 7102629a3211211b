"""Cal-QL: losses, gradients, returns and whole updates against float64 computations."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script
from plain import (
    ACT,
    BATCH,
    OBS,
    SEEDS,
    check_act,
    check_critics,
    check_moments,
    check_weights,
    forward,
    make_agent,
    make_batch,
    matrices,
    member,
    same,
    same_gradient,
    same_metrics,
    updated,
)
from test_parity_cql import LOUD, N, PlainCQL, make_cql
from test_parity_cql import make_inputs as make_cql_inputs

pytestmark = pytest.mark.usefixtures("float64")
LOUD = {name: value for name, value in LOUD.items() if name != "bc_updates"}
VARIANTS = [  # the defaults are lagrange, max_backup and no entropy_backup
    {},
    {"lagrange": False},
    {"max_backup": False},
    {"lagrange": False, "max_backup": False, "entropy_backup": True},
    {"entropy_backup": True, "gap_floor": 5.5},
    {"learn_entropy_coef": False, "entropy_coef": 0.3, "entropy_backup": True},
    {"entropy_coef": 0.3, "lagrange": False, "gap_floor": 5.0},
]
each_variant = pytest.mark.parametrize("settings", VARIANTS, ids=str)


def make_cal_ql(**settings):
    """Cal-QL with loud critics, targets that differ, policies at the bound of log_std at times."""
    agent, g = make_agent("cal_ql", "CalQL", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for i, module in enumerate((agent.critic, agent.target_critic)):
            for p in module.parameters():
                p.copy_(0.6 * torch.randn(p.shape, generator=g.manual_seed(p.numel() + i)))
        agent.actor.net.layers[-1].weight[..., ACT:] *= 4
        agent.actor.net.layers[-1].bias[..., ACT:] += 1.5
        if agent.cfg.learn_entropy_coef:
            agent.log_entropy_coef += torch.tensor([0.1, -0.4, 0.3])
        if agent.cfg.lagrange:
            agent.log_multiplier += torch.tensor([0.5, -0.2, 0.0])
    return agent


def make_inputs(seed: int):
    """Returns among the values of Q, so that some of them are bounded and some are not."""
    (batch, noise), g = make_cql_inputs(seed), torch.Generator().manual_seed(seed + 900)
    batch["mc_return"] = torch.randn(SEEDS, BATCH, generator=g)
    return batch, noise


class PlainCalQL(PlainCQL):
    """One member: CQL's, but for the loss of the critics."""

    def critic_loss(self, batch, y, now, uniform, future):
        """Equation 5.1: Q of the policy's actions counts as mc(s) where it lies below it."""
        td, gaps, self.floored, count = 0, [], 0, 0
        means = {"q": 0, "q_policy": 0, "q_random": 0}
        for network in self.critics:

            def q(action, network=network):
                return forward(torch.cat([batch["obs"], action], 1), network)[:, 0]

            data = q(batch["action"])
            td = td + ((y - data) ** 2).mean()
            total = sum(q(a).exp() / log_prob.exp() for a, log_prob in uniform)
            for action, log_prob in now + future:
                value = q(action)
                below = value.detach() < batch["mc_return"]
                calibrated = torch.where(below, batch["mc_return"], value)
                total, count = total + calibrated.exp() / log_prob.exp(), count + int(below.sum())
            gap = torch.log(total) - data
            if self.c.gap_floor is not None:
                self.floored += int((gap < self.c.gap_floor).sum())
                gap = torch.where(gap < self.c.gap_floor, self.c.gap_floor, gap)
            gaps.append(gap.mean())
            means["q"] += data.mean() / 2
            means["q_policy"] += sum(q(a).mean() for a, _ in now) / N / 2
            means["q_random"] += sum(q(a).mean() for a, _ in uniform) / N / 2
        alpha = self.c.alpha * min(math.exp(self.log_multiplier.detach()), 1e6)
        means |= {"td_loss": td, "conservative_gap": (gaps[0] + gaps[1]) / 2}
        self.means = {name: value.detach() for name, value in means.items()}
        self.means["bound_share"] = torch.tensor(count / (2 * 2 * N * BATCH))  # now and future
        return td + alpha * (gaps[0] + gaps[1])


def prepared(agent, batch, noise):
    """The critics' loss at any inputs, and what it is given."""
    actions, densities, *of_next = agent.proposals(batch["obs"], batch["next_obs"], noise)
    y, alpha = agent.target(batch, *of_next), agent.cfg.alpha * agent.log_multiplier.exp()
    return y.detach(), batch, actions.detach(), densities.detach(), alpha.detach()


@each_variant
def test_losses_and_gradients(settings):
    agent, (batch, noise) = make_cal_ql(**settings), make_inputs(21)
    given = prepared(agent, batch, noise)
    critic_loss, metrics = agent.critic_loss(*given)
    ours, log_prob = agent.actor_loss(batch["obs"], noise["actor"])
    floored, at_bounds = 0, 0
    for k in range(SEEDS):
        plain, one, of_one = PlainCalQL(agent, k), member(batch, k), member(noise, k)
        now, uniform, future = plain.samples(one, of_one)
        same(given[0][k], plain.target(one, future), "target")
        expected = plain.critic_loss(one, given[0][k], now, uniform, future)
        floored += plain.floored
        same_gradient(critic_loss, agent.critic, expected, plain.critic_adam.parameters, k)
        same_metrics(metrics, plain.means, k)
        assert 0.1 < plain.means["bound_share"] < 0.9
        expected = plain.actor_loss(one, of_one, False)
        same_gradient(ours, agent.actor, expected, plain.actor_adam.parameters, k)
        same(log_prob[k], plain.log_prob, "log_prob")
        at_bounds += plain.at_bounds[1]
    if agent.cfg.gap_floor is not None:
        assert 0 < floored < SEEDS * 2 * BATCH, f"{floored} gaps are below the floor"
    assert 0 < at_bounds < SEEDS * BATCH * ACT


@each_variant
def test_updates(settings):
    """Four updates, and all that training changes."""
    agent = make_cal_ql(**settings)
    plain = [PlainCalQL(agent, k) for k in range(SEEDS)]
    for step in range(4):
        batch, noise = make_inputs(30 + step)
        assert agent.variant(step) == ()
        metrics = updated(agent, batch, noise)
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), member(noise, k), False)
            same_metrics(metrics, expected, k)
            check_weights(agent.actor.net, k, one.policy, "policy")
            same(agent.log_entropy_coef[k], one.log_coef, "entropy_coef")
            same(agent.log_multiplier[k], one.log_multiplier, "multiplier")
            check_critics(agent, k, one)
    check_moments(agent.actor_adam, [one.actor_adam for one in plain])
    check_moments(agent.critic_adam, [one.critic_adam for one in plain])
    if agent.cfg.learn_entropy_coef:
        check_moments(agent.entropy_adam, [one.coef_adam for one in plain])
    if agent.cfg.lagrange:
        check_moments(agent.multiplier_adam, [one.multiplier_adam for one in plain])


# ---- the bound


def test_a_return_above_q_takes_the_gradient_of_the_policys_actions():
    """The penalty then moves Q at uniform actions and at the data's alone."""
    agent, (batch, noise) = make_cal_ql(), make_inputs(4)
    y, _, actions, densities, alpha = prepared(agent, batch, noise)
    highest = agent.q(agent.critic, batch["obs"], actions).amax((1, 2))
    for row, above in ((0, 2.0), (1, -2.0)):  # the first row of each member is bounded
        batch["mc_return"][:, row] = highest[:, row] + above
    batch["mc_return"][:, 2:] = -1e9
    action = batch["action"].requires_grad_()
    loss, _ = agent.critic_loss(y, batch, actions.requires_grad_(), densities, alpha)
    of_sampled, of_data = torch.autograd.grad(loss.sum(), (actions, action))
    moved = of_sampled.abs().amax(-1)  # [S, 3n, B]
    assert (moved[:, N:, 0] == 0).all() and (moved[:, :N, 0] > 0).any(1).all()
    assert (moved[:, N:, 1] > 0).any(1).all() and (moved[:, N:, 2:] > 0).any(1).all()
    assert (of_data.abs().amax(-1) > 0).any(-1).all()

    with torch.no_grad():  # far above: only the bound is left in the sum
        batch["mc_return"][:] = 500.0
        loss, metrics = agent.critic_loss(y, batch, actions, densities, alpha)
        total = 500 + (-densities[:, N:]).logsumexp(1)  # [S, B]
        q = agent.q(agent.critic, batch["obs"], action.unsqueeze(1)).squeeze(2)
    same(metrics["conservative_gap"], (total.unsqueeze(1) - q).mean((1, 2)), "gap")
    assert (metrics["bound_share"] == 1).all()


def test_with_returns_below_every_q_it_is_cql():
    """The other script's, with the same weights: losses, gradients and updates."""
    settings = {"lagrange": True, "max_backup": True, "entropy_backup": True, "gap_floor": 3.5}
    cql, agent = make_cql(**settings, bc_updates=0), make_cal_ql(**settings)
    agent.load_state_dict(cql.state_dict())
    for step in range(3):
        batch, noise = make_inputs(50 + step)
        batch["mc_return"][:] = -1e9
        found, expected = agent.update(batch, noise), cql.update(batch, noise, False)
        assert (found.pop("bound_share") == 0).all() and found.keys() == expected.keys()
        for name in expected:
            same(found[name], expected[name], name)
        for name, theirs in cql.state_dict().items():  # moments of the gradients among them
            same(agent.state_dict()[name], theirs, name)


def test_bound_share_is_counted():
    """Critics of 1 and 2 everywhere: returns of 0.5, 1, 1.5, 2 and 3 exceed 0, 0, 1, 1 and 2."""
    agent, (batch, noise) = make_cal_ql(), make_inputs(8)
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.zero_()
        agent.critic.layers[-1].bias.view(SEEDS, 2)[:] = torch.tensor([1.0, 2.0])
    for returns, share in (([0.5, 1, 1.5, 2], 2 / 8), ([3, 3, 3, 1.5], 7 / 8)):
        batch["mc_return"] = torch.tensor(returns).repeat(SEEDS, BATCH // 4)
        _, metrics = agent.critic_loss(*prepared(agent, batch, noise))
        assert (metrics["bound_share"] == share).all()
        assert (metrics["q_policy"] == 1.5).all(), "it is Q, without the bound"


# ---- the Monte-Carlo returns

EPISODES = [(4, False), (1, False), (6, True), (1, True), (9, False)]  # steps, terminated


def returns_of(rewards, terminated: bool, gamma: float, infinite_horizon: bool) -> list[float]:
    """Sums from every step on; an episode that was cut off is played on with its last reward."""
    ahead = [*rewards] if terminated or not infinite_horizon else [*rewards, *rewards[-1:] * 5000]
    return [math.fsum(r * gamma**k for k, r in enumerate(ahead[t:])) for t in range(len(rewards))]


def make_episode(rewards, terminated: bool) -> dict:
    count = len(rewards)
    episode = {"obs": np.ones((count + 1, OBS)), "action": np.ones((count, ACT))}
    episode |= {"reward": np.array(rewards, np.float32), "truncated": np.zeros(count)}
    return {**episode, "terminated": (np.arange(count) == count - 1) * float(terminated)}


@pytest.mark.parametrize("infinite_horizon", [False, True])
@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_returns_of_every_kind_of_episode(gamma, infinite_horizon):
    """Of the rewards as the critics see them."""
    settings = {"gamma": gamma, "infinite_horizon": infinite_horizon}
    agent = make_cal_ql(**settings, reward_scale=2.0, reward_shift=-0.5).float()
    rng = np.random.default_rng(5)
    for count, terminated in EPISODES:
        rewards = rng.normal(size=count).astype(np.float32)
        episode = make_episode(rewards, terminated)
        given = copy.deepcopy(episode)
        rows = agent.rows(episode)
        assert all((episode[name] == given[name]).all() for name in given), "it changed its input"
        assert {*rows} == {"obs", "action", "reward", "next_obs", "terminated", "mc_return"}
        seen = (2 * rewards - np.float32(0.5)).tolist()
        expected = torch.tensor(returns_of(seen, terminated, gamma, infinite_horizon))
        assert rows["mc_return"].dtype == torch.float32 and rows["reward"].tolist() == seen
        torch.testing.assert_close(rows["mc_return"].double(), expected, rtol=1.2e-7, atol=0)


def test_returns_of_a_sparse_task():
    """The authors' rule for antmaze: -5 / (1 - gamma) at each step of an episode that failed."""
    agent = make_cal_ql(gamma=0.99, infinite_horizon=True)
    failed = agent.rows(make_episode([-5.0] * 14, False))["mc_return"]
    torch.testing.assert_close(failed.double(), torch.full((14,), -500.0), rtol=1e-6, atol=0)
    reached = agent.rows(make_episode([-5.0] * 3, True))["mc_return"]
    assert reached[-1] == -5 and (reached > -15).all()


def test_returns_are_summed_in_float64():
    """Three thousand steps of 0.1 without a discount."""
    found = make_cal_ql(gamma=1.0).rows(make_episode([0.1] * 3_000, True))["mc_return"]
    expected = torch.arange(3_000, 0, -1) * float(np.float32(0.1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=0)


def test_an_infinite_horizon_needs_a_discount():
    script = load_script("cal_ql")
    with pytest.raises(script.RunError, match=r"infinite_horizon: .*gamma"):
        make_cal_ql(gamma=1.0, infinite_horizon=True)
    make_cal_ql(gamma=1.0)


# ---- the rest


def test_explores_with_draws_in_the_environments_units():
    """a = center + half_range tanh(mean + std noise), from observations in its units too."""
    agent, (batch, noise) = make_cal_ql(), make_inputs(6)
    obs = 3 * batch["obs"]
    action = agent.explore(obs, noise["actor"])
    assert not action.requires_grad
    low, high = torch.tensor([-2.0, -1.0, 0.0]), torch.tensor([2.0, 3.0, 0.5])
    clipped = 0
    for k in range(SEEDS):
        out = forward((obs[k] - agent.obs_mean) / agent.obs_std, matrices(agent.actor.net, k))
        mean, log_std = out[:, :ACT], out[:, ACT:]
        clipped += int((log_std > 2).sum())
        raw = mean + torch.clip(log_std, -20, 2).exp() * noise["actor"][k]
        same(action[k], low + (high - low) * (torch.tanh(raw) + 1) / 2, "action")
    assert 0 < clipped < SEEDS * BATCH * ACT
    same(agent.explore(obs, 0 * noise["actor"]), agent.act(obs), "without noise")


def test_acts_with_the_mean():
    agent, (batch, _) = make_cal_ql(), make_batch(5)
    last = agent.actor.net.layers[-1]
    mean = SimpleNamespace(weight=last.weight[..., :ACT], bias=last.bias[..., :ACT])
    check_act(agent, SimpleNamespace(layers=[*agent.actor.net.layers[:-1], mean]), 3 * batch["obs"])


def test_alpha_grows_where_the_gap_is_too_large_and_is_bounded():
    for target_gap, rises in ((-1e3, True), (1e3, False)):
        agent = make_cal_ql(target_gap=target_gap)
        before, after = (agent.update(*make_inputs(3))["alpha"] for _ in range(2))
        assert ((after > before) == rises).all()
    with torch.no_grad():
        agent.log_multiplier.fill_(30)
    assert (agent.update(*make_inputs(3))["alpha"] == 1.7e6).all()
    fresh = make_agent("cal_ql", "CalQL", alpha=3.0, num_actions=N)
    assert (fresh.update(*make_inputs(3))["alpha"] == 3).all(), "it starts at its setting (D6)"


def test_policy_and_critics_have_depths_of_their_own():
    agent = make_cal_ql(hidden_layers=1, critic_hidden_layers=4)
    assert (len(agent.actor.net.layers), len(agent.critic.layers)) == (2, 5)
    assert len(agent.target_critic.layers) == 5


def test_noise_is_drawn_where_it_is_used():
    assert make_cal_ql().noise_shapes == {
        "policy": ("normal", (N, 2 * BATCH, ACT)),
        "uniform": ("uniform", (N, BATCH, ACT)),
        "actor": ("normal", (BATCH, ACT)),
    }


def test_defaults_are_the_authors():
    cfg = load_script("cal_ql").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.batch_size) == (0.99, 0.005, 256)
    assert (cfg.num_actions, cfg.alpha, cfg.target_gap, cfg.online_share) == (10, 5.0, 0.8, 0.5)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.hidden_dim) == (1e-4, 3e-4, 256)
    assert (cfg.hidden_layers, cfg.critic_hidden_layers) == (2, 4)
    assert (cfg.learn_entropy_coef, cfg.entropy_coef, cfg.entropy_backup) == (True, 1.0, False)
    assert cfg.lagrange and cfg.max_backup and cfg.gap_floor is None
    assert not (cfg.infinite_horizon or cfg.normalize_obs) and cfg.updates_per_step == 1
