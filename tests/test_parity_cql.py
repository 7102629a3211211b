"""CQL: losses, gradients and whole updates against float64 computations from the paper."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from plain import (
    ACT,
    BATCH,
    SEEDS,
    UNIT,
    PlainAdam,
    check_act,
    check_critics,
    check_moments,
    check_weights,
    flat,
    forward,
    make_agent,
    make_batch,
    make_units,
    matrices,
    member,
    same,
    same_gradient,
    same_metrics,
    updated,
)

pytestmark = pytest.mark.usefixtures("float64")
N = 4
# Rates of their own, a tau that shows, critics of another depth than the policy.
LOUD = {
    "num_actions": N,
    "gamma": 0.9,
    "alpha": 1.7,
    "target_gap": 2.5,
    "bc_updates": 2,
    "tau": 0.1,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
    "critic_hidden_layers": 3,
}
VARIANTS = [
    {},
    {"regularizer": "rho"},
    {"max_backup": True, "lagrange": True},
    {"entropy_backup": True, "gap_floor": 4.0},
    {"regularizer": "rho", "lagrange": True, "max_backup": True, "entropy_backup": True},
    {"learn_entropy_coef": False, "entropy_coef": 0.3, "entropy_backup": True},
    {"entropy_coef": 0.3, "lagrange": True, "gap_floor": 3.5},
]
each_variant = pytest.mark.parametrize("settings", VARIANTS, ids=str)


def make_cql(narrow: bool = False, **settings):
    """CQL with loud critics, targets that differ, policies at the upper bound of log_std at times.

    `narrow` brings some to the lower bound too, where pi of the data's actions is no use.
    """
    agent, g = make_agent("cql", "CQL", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for i, module in enumerate((agent.critic, agent.target_critic)):
            for p in module.parameters():
                p.copy_(0.6 * torch.randn(p.shape, generator=g.manual_seed(p.numel() + i)))
        last = agent.actor.net.layers[-1]
        last.weight[..., ACT:] *= 90 if narrow else 4
        last.bias[..., ACT:] += -9 if narrow else 1.5
        if agent.cfg.learn_entropy_coef:
            agent.log_entropy_coef += torch.tensor([0.1, -0.4, 0.3])
        if agent.cfg.lagrange:
            agent.log_multiplier += torch.tensor([0.5, -0.2, 0.0])
    return agent


def make_inputs(seed: int):
    """A batch, some of its actions at the bounds, and what `update` needs of noise.

    The noise keeps actions within +-tanh(10): PyTorch's softplus is exact to 2e-9 alone beyond.
    """
    batch, g = make_batch(seed)[0], torch.Generator().manual_seed(seed + 500)
    batch["action"][:, :2] = torch.tensor([1.0, -1.0, 0.2])
    noise = {
        "policy": torch.randn(SEEDS, N, 2 * BATCH, ACT, generator=g),
        "uniform": torch.rand(SEEDS, N, BATCH, ACT, generator=g),
        "actor": torch.randn(SEEDS, BATCH, ACT, generator=g),
    }
    return batch, {name: values.clamp(-1.2, 1.2) for name, values in noise.items()}


class PlainCQL:
    """One member: a policy, two critics and their targets as lists of matrices."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.policy = matrices(agent.actor.net, k)
        self.critics = [matrices(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [matrices(agent.target_critic, 2 * k + i) for i in range(2)]
        self.log_coef = agent.log_entropy_coef[k].detach().clone().requires_grad_()
        self.log_multiplier = agent.log_multiplier[k].detach().clone().requires_grad_()
        self.actor_adam = PlainAdam(flat(self.policy), self.c.actor_lr)
        both = flat(self.critics[0]) + flat(self.critics[1])
        self.critic_adam = PlainAdam(both, self.c.critic_lr)
        self.coef_adam = PlainAdam([self.log_coef], self.c.actor_lr)
        self.multiplier_adam = PlainAdam([self.log_multiplier], self.c.critic_lr)

    def gaussian(self, obs):
        out = forward(obs, self.policy)
        mean, log_std = out[..., :ACT], out[..., ACT:]
        self.at_bounds = int((log_std < -20).sum()), int((log_std > 2).sum())
        return mean, torch.clip(log_std, -20, 2).exp()

    def log_density(self, raw, scaled, std):
        """The change of variables a = tanh(raw): da/draw = cosh(raw)^-2."""
        size = torch.where(raw < 0, -raw, raw)
        log_cosh = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
        log_normal = -(scaled**2) / 2 - torch.log(std * math.sqrt(2 * math.pi))
        return (log_normal + 2 * log_cosh).sum(-1)

    def draw(self, obs, noise):
        mean, std = self.gaussian(obs)
        raw = mean + std * noise
        return torch.tanh(raw), self.log_density(raw, noise, std)

    def samples(self, batch, noise):
        """n pairs (actions, log of their densities) of each kind, all without gradient."""
        with torch.no_grad():
            now = [self.draw(batch["obs"], noise["policy"][j, :BATCH]) for j in range(N)]
            future = [self.draw(batch["next_obs"], noise["policy"][j, BATCH:]) for j in range(N)]
        density = torch.full((BATCH,), math.log(0.5**ACT))
        return now, [(2 * noise["uniform"][j] - 1, density) for j in range(N)], future

    def target(self, batch, future):
        y, coef = [], self.log_coef.detach().exp()
        for row in range(BATCH):
            values = []
            for action, log_prob in future if self.c.max_backup else future[:1]:
                pair = torch.cat([batch["next_obs"][row], action[row]])
                value = min(forward(pair, network)[0].detach() for network in self.targets)
                values.append(value - coef * log_prob[row] * self.c.entropy_backup)
            alive = 0.0 if batch["terminated"][row] else 1.0
            y.append(batch["reward"][row] + self.c.gamma * alive * max(values))
        return torch.stack(y)

    def critic_loss(self, batch, y, now, uniform, future):
        """Equation 4 without its 1/2 (D3): TD errors and alpha times the conservative gaps."""
        td, gaps, self.floored, means = 0, [], 0, {"q": 0, "q_policy": 0, "q_random": 0}
        for network in self.critics:

            def q(action, network=network):
                return forward(torch.cat([batch["obs"], action], 1), network)[:, 0]

            data = q(batch["action"])
            td = td + ((y - data) ** 2).mean()
            if self.c.regularizer == "h":
                total = sum(q(a).exp() / log_prob.exp() for a, log_prob in now + uniform + future)
            else:
                total = sum(q(a).exp() for a, _ in now)
            gap = torch.log(total) - data
            if self.c.gap_floor is not None:
                self.floored += int((gap < self.c.gap_floor).sum())
                gap = torch.maximum(gap, torch.tensor(self.c.gap_floor))
            gaps.append(gap.mean())
            means["q"] += data.mean() / 2
            means["q_policy"] += sum(q(a).mean() for a, _ in now) / N / 2
            means["q_random"] += sum(q(a).mean() for a, _ in uniform) / N / 2
        alpha = self.c.alpha * min(math.exp(self.log_multiplier.detach()), 1e6)
        means |= {"td_loss": td, "conservative_gap": (gaps[0] + gaps[1]) / 2}
        if self.c.regularizer == "rho":
            del means["q_random"]
        self.means = {name: value.detach() for name, value in means.items()}
        return td + alpha * (gaps[0] + gaps[1])

    def actor_loss(self, batch, noise, cloning):
        action, log_prob = self.draw(batch["obs"], noise["actor"])
        if cloning:
            mean, std = self.gaussian(batch["obs"])
            raw = torch.atanh(torch.clip(batch["action"], -(1 - 1e-6), 1 - 1e-6))
            value = self.log_density(raw, (raw - mean) / std, std)
        else:
            pair = torch.cat([batch["obs"], action], 1)
            value = torch.minimum(*[forward(pair, network)[:, 0] for network in self.critics])
        self.log_prob = log_prob.detach().mean()
        return (self.log_coef.detach().exp() * log_prob - value).mean()

    def update(self, batch, noise, cloning):
        """All losses, then all steps."""
        now, uniform, future = self.samples(batch, noise)
        y = self.target(batch, future)
        critic_loss = self.critic_loss(batch, y, now, uniform, future)
        actor_loss = self.actor_loss(batch, noise, cloning)
        metrics = {**self.means, "critic_loss": critic_loss, "actor_loss": actor_loss}
        metrics["entropy"] = -self.log_prob
        coef_loss = -self.log_coef * (self.log_prob - ACT)
        self.actor_adam.step(actor_loss)
        self.critic_adam.step(critic_loss)
        if self.c.learn_entropy_coef:
            metrics["entropy_coef"] = self.log_coef.detach().exp()
            self.coef_adam.step(coef_loss)
        if self.c.lagrange:
            alpha = self.c.alpha * torch.exp(self.log_multiplier)
            metrics["alpha"] = alpha.detach()
            self.multiplier_adam.step(alpha * (self.c.target_gap - self.means["conservative_gap"]))
        with torch.no_grad():
            for target, online in zip(self.targets, self.critics, strict=True):
                for old, new in zip(flat(target), flat(online), strict=True):
                    old.copy_(0.9 * old + 0.1 * new)
        return metrics


@pytest.mark.parametrize(
    ("settings", "narrow"),
    [*((settings, False) for settings in VARIANTS), (VARIANTS[0], True), (VARIANTS[3], True)],
    ids=str,
)
def test_losses_and_gradients(settings, narrow):
    """`narrow` policies are no use for cloning: pi of the data's actions is zero."""
    agent, (batch, noise) = make_cql(narrow, **settings), make_inputs(21)
    actions, densities, *of_next = agent.proposals(batch["obs"], batch["next_obs"], noise)
    alpha = agent.cfg.alpha * agent.log_multiplier.exp().detach()
    y = agent.target(batch, *of_next).detach()
    sampled = actions.detach(), densities.detach()
    critic_loss, metrics = agent.critic_loss(y, batch, *sampled, alpha)
    floored, bounds = 0, torch.zeros(2)
    for k in range(SEEDS):
        plain, one, of_one = PlainCQL(agent, k), member(batch, k), member(noise, k)
        now, uniform, future = plain.samples(one, of_one)
        same(y[k], plain.target(one, future), "target")
        expected = plain.critic_loss(one, y[k], now, uniform, future)
        floored += plain.floored
        same_gradient(critic_loss, agent.critic, expected, plain.critic_adam.parameters, k)
        same_metrics(metrics, plain.means, k)
        for cloning in (False,) if narrow else (False, True):
            ours, log_prob = agent.actor_loss(batch, noise["actor"], cloning)
            expected = plain.actor_loss(one, of_one, cloning)
            same_gradient(ours, agent.actor, expected, plain.actor_adam.parameters, k)
            same(log_prob[k], plain.log_prob, "log_prob")
            bounds += torch.tensor(plain.at_bounds)
    if agent.cfg.gap_floor is not None and not narrow:
        assert 0 < floored < SEEDS * 2 * BATCH, f"{floored} gaps are below the floor"
    assert (bounds[0] > 0) == narrow and 0 < bounds[1] < SEEDS * 2 * BATCH * ACT


@each_variant
def test_updates(settings):
    """Four updates: BC of the policy in the first two; all that training changes."""
    agent = make_cql(**settings)
    plain = [PlainCQL(agent, k) for k in range(SEEDS)]
    for step in range(4):
        batch, noise = make_inputs(30 + step)
        assert agent.variant(step) == (step < 2,)
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), member(noise, k), step < 2)
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


def test_densities_are_those_of_torch_distributions():
    agent, (batch, noise) = make_cql(), make_inputs(7)
    actions, densities, next_action, _ = agent.proposals(batch["obs"], batch["next_obs"], noise)
    mean, log_std = agent.actor(batch["obs"])
    normal = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TanhTransform()
    policy = torch.distributions.TransformedDistribution(normal, [tanh])
    raw = mean.unsqueeze(1) + log_std.exp().unsqueeze(1) * noise["policy"][:, :, :BATCH]
    inside = (raw.abs() < 5).all(-1)  # where tanh can be inverted
    expected = policy.log_prob(actions[:, :N].moveaxis(1, 0)).sum(-1).moveaxis(0, 1)
    torch.testing.assert_close(densities[:, :N][inside], expected[inside], rtol=1e-7, atol=0)
    assert inside.double().mean() > 0.1
    assert (densities[:, N : 2 * N] == math.log(1 / 8)).all()  # a cube of side 2
    assert torch.equal(actions[:, 2 * N :], next_action)
    assert actions[:, N : 2 * N].min() < -0.9 and actions[:, N : 2 * N].max() > 0.9


def test_log_sum_exp_estimates_the_integral():
    """With the weights of importance: the integral of exp(Q) over all actions, for any policy."""
    script = load_script("cql")
    cfg = script.TrainConfig(hidden_dim=4)
    cfg.num_actions = 40_000  # more than anyone would train with
    agent = script.CQL(cfg, make_units(*UNIT))
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.mul_(3)
    g, obs = torch.Generator().manual_seed(0), torch.tensor([[[0.3], [-0.8]]])
    noise = {
        "policy": torch.randn(1, cfg.num_actions, 4, 1, generator=g),
        "uniform": torch.rand(1, cfg.num_actions, 2, 1, generator=g),
    }
    actions, densities, *_ = agent.proposals(obs, -2 * obs, noise)
    batch = {"obs": obs, "action": torch.zeros(1, 2, 1)}
    _, metrics = agent.critic_loss(torch.zeros(1, 2), batch, actions, densities, torch.ones(1))
    grid = torch.linspace(-1, 1, 2001)[1:-1:2].reshape(1, -1, 1, 1).expand(-1, -1, 2, 1)
    integral = agent.q(agent.critic, obs, grid).exp().mean(-2) * 2
    q = agent.q(agent.critic, obs, batch["action"].unsqueeze(1)).squeeze(-2)
    expected = (integral.log() - q).mean() + math.log(3 * cfg.num_actions)  # D4
    torch.testing.assert_close(metrics["conservative_gap"][0], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("regularizer", ["h", "rho"])
def test_unseen_actions_are_pushed_below_those_of_the_data(regularizer):
    """A bandit of one state: every action of the data lies in (-0.8, -0.4) and earns 1."""
    script, q = load_script("cql"), {}
    scaler = make_units(*UNIT)
    for alpha in (0.0, 1.0):
        cfg = script.TrainConfig(
            regularizer=regularizer, alpha=alpha, batch_size=16, hidden_dim=16, hidden_layers=1,
            critic_hidden_layers=2, bc_updates=0, critic_lr=1e-2, num_actions=5,
        )  # fmt: skip
        agent, g = script.CQL(cfg, scaler), torch.Generator().manual_seed(0)
        samplers = {"normal": torch.randn, "uniform": torch.rand}
        for _ in range(100):
            action = -0.8 + 0.4 * torch.rand(1, 16, 1, generator=g)
            batch = {"obs": torch.ones(1, 16, 1), "action": action, "reward": torch.ones(1, 16)}
            batch |= {"next_obs": batch["obs"], "terminated": torch.ones(1, 16)}
            shapes = agent.noise_shapes.items()
            noise = {k: samplers[kind](1, *shape, generator=g) for k, (kind, shape) in shapes}
            agent.update(batch, noise, *agent.variant(0))
        actions = torch.tensor([-0.6, 0.0, 0.4, 0.8]).reshape(1, 4, 1, 1)
        q[alpha] = agent.q(agent.critic, torch.ones(1, 1, 1), actions)[0, :, :, 0].mean(0)
    assert abs(q[0.0][0] - 1) < 0.1
    assert (q[1.0][1:] < q[0.0][1:] - 0.5).all(), "no lower than without the penalty"
    assert (q[1.0][1:] < q[1.0][0] - 0.5).all(), "no lower than the data's"


def test_alpha_grows_where_the_gap_is_too_large_and_is_bounded():
    for target_gap, rises in ((-1e3, True), (1e3, False)):
        agent = make_cql(lagrange=True, target_gap=target_gap)
        before, after = (agent.update(*make_inputs(3), True)["alpha"] for _ in range(2))
        same(before, 1.7 * torch.tensor([0.5, -0.2, 0.0]).exp(), "alpha")
        assert ((after > before) == rises).all()
    with torch.no_grad():
        agent.log_multiplier.fill_(30)
    assert (agent.update(*make_inputs(3), True)["alpha"] == 1.7e6).all()


def test_the_end_of_cloning_compiles_once_more(monkeypatch):
    eager, compiled = make_cql(bc_updates=3), make_cql(bc_updates=3)
    compile_, script = torch.compile, load_script("cql")
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        traced = {"fullgraph": True, "backend": "aot_eager"}
        patch.setattr(torch, "compile", lambda f, **_: compile_(f, **traced))
        cfg = dataclasses.replace(compiled.cfg, compile="true")
        update = script.compiled(compiled.update, cfg, torch.device("cpu"))
    torch._dynamo.utils.counters.clear()
    for step in range(6):
        args = (*make_inputs(step), *eager.variant(step))
        expected, found = eager.update(*args), update(*args)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_acts_with_the_mean():
    agent, (batch, _) = make_cql(), make_batch(5)
    with torch.no_grad():
        agent.actor.net.layers[-1].weight[..., ACT:] = 0  # log_std does not matter
    mean = SimpleNamespace(layers=[*agent.actor.net.layers[:-1], SimpleNamespace()])
    last = agent.actor.net.layers[-1]
    mean.layers[-1].weight, mean.layers[-1].bias = last.weight[..., :ACT], last.bias[..., :ACT]
    check_act(agent, mean, 3 * batch["obs"])


def test_policy_and_critics_have_depths_of_their_own():
    agent = make_cql(hidden_layers=1, critic_hidden_layers=4)
    assert (len(agent.actor.net.layers), len(agent.critic.layers)) == (2, 5)
    assert len(agent.target_critic.layers) == 5


def test_noise_is_drawn_where_it_is_used():
    shapes = {
        "policy": ("normal", (N, 2 * BATCH, ACT)),
        "uniform": ("uniform", (N, BATCH, ACT)),
        "actor": ("normal", (BATCH, ACT)),
    }
    assert make_cql().noise_shapes == shapes
    del shapes["uniform"]
    assert make_cql(regularizer="rho").noise_shapes == shapes


def test_defaults_are_the_authors():
    cfg = load_script("cql").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.batch_size) == (0.99, 0.005, 256)
    assert (cfg.regularizer, cfg.num_actions, cfg.alpha, cfg.bc_updates) == ("h", 10, 5.0, 40_000)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.hidden_dim) == (1e-4, 3e-4, 256)
    assert (cfg.hidden_layers, cfg.critic_hidden_layers) == (3, 3)
    assert (cfg.learn_entropy_coef, cfg.entropy_coef, cfg.entropy_backup) == (True, 1.0, False)
    assert not (cfg.lagrange or cfg.max_backup or cfg.normalize_obs) and cfg.gap_floor is None
    assert cfg.target_gap == 10
