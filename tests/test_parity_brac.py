"""BRAC: losses, gradients and whole updates against float64 computations from the paper."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from plain import (
    ACT,
    BATCH,
    OBS,
    SEEDS,
    PlainAdam,
    check_critics,
    check_moments,
    check_weights,
    flat,
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
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

pytestmark = pytest.mark.usefixtures("float64")
SAMPLES = 3
# Rates of their own, a tau that shows, an entropy weight, a kernel narrow enough to matter.
LOUD = {
    "gamma": 0.9,
    "divergence_samples": SAMPLES,
    "mmd_sigma": 0.7,
    "alpha": 0.6,
    "divergence_threshold": 0.2,
    "entropy_coef": 0.15,
    "behavior_updates": 2,
    "warm_start": 2,
    "tau": 0.1,
    "actor_lr": 0.02,
    "critic_lr": 0.01,
    "behavior_lr": 0.03,
    "alpha_lr": 0.05,
    "critic_hidden_dim": 6,
}
DIVERGENCES = ["kl", "mmd_laplacian", "mmd_gaussian"]
VARIANTS = [
    {"divergence": d, "value_penalty": v, "learn_alpha": a}
    for d, v, a in zip(DIVERGENCES * 2, [True, False] * 3, [True] * 3 + [False] * 3, strict=True)
]


def make_brac(**settings):
    """BRAC with loud weights: policies of many widths that saturate at times, other targets."""
    agent, g = make_agent("brac", "BRAC", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for i, p in enumerate(agent.parameters()):
            if p.dim() > 1:
                p.copy_(0.5 * torch.randn(p.shape, generator=g.manual_seed(i)))
    return agent


def make_noise(agent, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, (_, shape) in agent.noise_shapes.items()}
    return {k: torch.randn(SEEDS, *v, generator=g) for k, v in shapes.items()}


def edge(batch: dict) -> dict:
    """The batch with some actions at the bounds and beyond the clip of log b."""
    action = batch["action"].clone()
    action[:, :2, 0], action[:, 2, 1], action[:, 3, 2] = 1.0, -1.0, 0.9995
    return {**batch, "action": action}


class PlainBRAC:
    """One member: policies, two critics and their targets as lists of matrices, and alpha."""

    def __init__(self, agent, k: int):
        self.c = SimpleNamespace(**vars(agent.cfg))
        self.behavior, self.policy = matrices(agent.behavior.net, k), matrices(agent.actor.net, k)
        self.critics = [matrices(agent.critic, 2 * k + i) for i in range(2)]
        self.targets = [matrices(agent.target_critic, 2 * k + i) for i in range(2)]
        self.alpha = agent.alpha[k].detach().clone().requires_grad_()
        self.behavior_adam = PlainAdam(flat(self.behavior), self.c.behavior_lr)
        self.actor_adam = PlainAdam(flat(self.policy), self.c.actor_lr)
        both = flat(self.critics[0]) + flat(self.critics[1])
        self.critic_adam = PlainAdam(both, self.c.critic_lr)
        self.alpha_adam = PlainAdam([self.alpha], self.c.alpha_lr)

    def distribution(self, network, s):
        """The tanh-Gaussian at one state as a distribution, and mean and std before the tanh."""
        out = forward(s, network)
        mean, std = out[:ACT], torch.exp(-5 + 5 * (torch.tanh(out[ACT:]) + 1) / 2)
        normal = Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)
        tanh = TanhTransform(cache_size=1)  # keeps what each action was before the tanh
        return TransformedDistribution(normal, [tanh], validate_args=False), mean, std

    def kernel(self, x, y):
        if self.c.divergence == "mmd_laplacian":
            return torch.exp(-(x - y).abs().sum() / self.c.mmd_sigma)
        return torch.exp(-((x - y) ** 2).sum() / (2 * self.c.mmd_sigma))

    def terms(self, s, noise):
        """a ~ pi(s) and log pi(a|s) from the first noise, D(s) from the others."""
        pi, mean, std = self.distribution(self.policy, s)
        b, b_mean, b_std = self.distribution(
            [tuple(x.detach() for x in p) for p in self.behavior], s
        )
        tanh = pi.transforms[0]
        drawn = [tanh(mean + std * e) for e in noise[: 1 + SAMPLES]]
        log_pi = pi.log_prob(drawn[0])
        if self.c.divergence == "kl":
            each = []
            for e in noise[1 : 1 + SAMPLES]:
                raw = mean + std * e
                # The densities before the tanh: its Jacobian is the same for both.
                each.append(pi.base_dist.log_prob(raw) - b.base_dist.log_prob(raw))
            return drawn[0], log_pi, sum(each) / SAMPLES
        ours, theirs = drawn[1:], [torch.tanh(b_mean + b_std * e) for e in noise[1 + SAMPLES :]]
        assert len(ours) == len(theirs) == SAMPLES

        def mean_kernel(first, second):
            pairs = list(itertools.product(first, second))
            return sum(self.kernel(x, y) for x, y in pairs) / len(pairs)

        squared = mean_kernel(ours, ours) + mean_kernel(theirs, theirs)
        return drawn[0], log_pi, squared - 2 * mean_kernel(ours, theirs)

    def behavior_loss(self, batch):
        loss = 0
        for s, a in zip(batch["obs"], batch["action"], strict=True):
            b = self.distribution(self.behavior, s)[0]
            loss -= b.log_prob(torch.clip(a, -0.999, 0.999)) / BATCH
        return loss

    def target(self, batch, noise):
        y = []
        for row, s in enumerate(batch["next_obs"]):
            a, log_pi, divergence = self.terms(s, noise[:, row])
            v = min(forward(torch.cat([s, a]), network)[0] for network in self.targets)
            v = v - self.c.entropy_coef * log_pi
            v = v - self.alpha * divergence if self.c.value_penalty else v
            alive = 0.0 if batch["terminated"][row] else 1.0
            y.append((batch["reward"][row] + self.c.gamma * alive * v).detach())
        return torch.stack(y)

    def critic_loss(self, batch, y):
        pair = torch.cat([batch["obs"], batch["action"]], 1)
        q = [forward(pair, network)[:, 0] for network in self.critics]
        self.mean_q = (q[0].mean() + q[1].mean()) / 2
        return sum(((y - one) ** 2).mean() for one in q)

    def actor_loss(self, batch, noise, with_q: bool):
        loss = self.divergence = self.entropy = self.policy_q = 0
        for row, s in enumerate(batch["obs"]):
            a, log_pi, divergence = self.terms(s, noise[:, row])
            q = min(forward(torch.cat([s, a]), network)[0] for network in self.critics)
            cost = self.alpha.detach() * divergence + self.c.entropy_coef * log_pi
            loss = loss + (cost - q if with_q else cost) / BATCH
            self.divergence = self.divergence + divergence / BATCH
            self.entropy = self.entropy - log_pi / BATCH
            self.policy_q = self.policy_q + q / BATCH
        return loss

    def alpha_loss(self, batch, noise):
        gaps = [self.terms(s, noise[:, row])[2].detach() for row, s in enumerate(batch["obs"])]
        return -self.alpha * (sum(gaps) / BATCH - self.c.divergence_threshold)

    def update(self, batch, noise, step):
        if step < self.c.behavior_updates:
            loss = self.behavior_loss(batch)
            self.behavior_adam.step(loss)
            return {"behavior_loss": loss}
        y = self.target(batch, noise["target"])
        metrics = {"critic_loss": self.critic_loss(batch, y), "q": self.mean_q}
        self.critic_adam.step(metrics["critic_loss"])
        with_q = step >= self.c.behavior_updates + self.c.warm_start
        metrics["actor_loss"] = self.actor_loss(batch, noise["actor"], with_q)
        metrics |= {"divergence": self.divergence, "entropy": self.entropy}
        metrics["policy_q"] = self.policy_q
        self.actor_adam.step(metrics["actor_loss"])
        if self.c.learn_alpha:
            self.alpha_adam.step(self.alpha_loss(batch, noise["alpha"]))
            with torch.no_grad():
                self.alpha.copy_(min(max(float(self.alpha), 0.0), self.c.alpha_limit))
            metrics["alpha"] = self.alpha.clone()
        with torch.no_grad():
            for target, online in zip(self.targets, self.critics, strict=True):
                for old, new in zip(flat(target), flat(online), strict=True):
                    old.copy_(0.9 * old + 0.1 * new)
        return metrics


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_losses_and_gradients(settings):
    agent, batch = make_brac(**settings), edge(make_batch(21)[0])
    noise, obs, action = make_noise(agent, 22), batch["obs"], batch["action"]
    target = agent.target(batch, noise["target"]).detach()
    critic_loss, _ = agent.critic_loss(target, obs, action)
    cost, policy_q, _, _ = agent.actor_loss(obs, noise["actor"])
    behavior_loss = agent.behavior_loss(obs, action)
    for k in range(SEEDS):
        plain, one, draws = PlainBRAC(agent, k), member(batch, k), member(noise, k)
        y = plain.target(one, draws["target"])
        same(target[k], y, "target")
        actor, warm = (plain.actor_loss(one, draws["actor"], q) for q in (True, False))
        theirs = [
            ("behavior", behavior_loss, plain.behavior_loss(one), plain.behavior_adam),
            ("critic", critic_loss, plain.critic_loss(one, y), plain.critic_adam),
            ("actor", cost - policy_q, actor, plain.actor_adam),
            ("actor", cost, warm, plain.actor_adam),
        ]
        for name, loss, expected, adam in theirs:
            same_gradient(loss, getattr(agent, name), expected, adam.parameters, k, name)
        if agent.cfg.learn_alpha:
            loss, expected = (
                agent.alpha_loss(obs, noise["alpha"]),
                plain.alpha_loss(one, draws["alpha"]),
            )
            same(loss[k], expected, "alpha")
            (found,) = torch.autograd.grad(loss.sum(), [agent.alpha])
            same(found[k], torch.autograd.grad(expected, [plain.alpha])[0], "gradient of alpha")


@pytest.mark.parametrize(
    "settings", [*VARIANTS, {"learn_alpha": True, "alpha_limit": 0.61}], ids=str
)
def test_updates(settings):
    """Six updates: two that fit b, two without Q, two with it; b then stays as it is."""
    agent = make_brac(**settings)
    plain, alphas = [PlainBRAC(agent, k) for k in range(SEEDS)], []
    for step in range(6):
        batch, noise = edge(make_batch(30 + step)[0]), make_noise(agent, 40 + step)
        assert agent.variant(step) == (["behavior", "warm_start", "actor_critic"][step // 2],)
        metrics = updated(agent, batch, noise, *agent.variant(step))
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), member(noise, k), step)
            same_metrics(metrics, expected, k)
            check_weights(agent.behavior.net, k, one.behavior, "behaviour policy")
            check_weights(agent.actor.net, k, one.policy, "policy")
            check_critics(agent, k, one)
            same(agent.alpha[k], one.alpha, "alpha")
            alphas.append(float(one.alpha.detach()))
    for name in ("behavior", "actor", "critic"):
        adams = [getattr(one, f"{name}_adam") for one in plain]
        check_moments(getattr(agent, f"{name}_adam"), adams)
    if agent.cfg.learn_alpha:
        same(agent.alpha_adam.m0, torch.stack([one.alpha_adam.m[0] for one in plain]), "alpha")
        assert max(alphas) <= agent.cfg.alpha_limit and len(set(alphas)) > 1
    else:
        assert set(alphas) == {float(agent.alpha[0])}


def test_a_learned_alpha_stays_in_its_range():
    """It falls to 0 below the threshold, rises to its limit above it, and leaves both again."""
    agent = make_brac(
        learn_alpha=True, alpha=0.3, alpha_lr=0.2, alpha_limit=0.5, behavior_updates=0
    )
    seen = []
    for threshold in (1e3, -1e3, 1e3):
        agent.cfg.divergence_threshold = threshold
        agent.alpha_adam = load_script("brac").Adam([agent.alpha], 0.2)
        for step in range(3):
            batch, noise = make_batch(step)[0], make_noise(agent, step)
            seen.append(agent.update(batch, noise, "actor_critic")["alpha"][0].item())
    assert seen == pytest.approx([0.1, 0, 0, 0.2, 0.4, 0.5, 0.3, 0.1, 0], abs=1e-3)


def test_divergence_of_a_policy_from_itself():
    """0 for KL in every sample; for MMD the squared distance of two samples of one policy."""
    for divergence in DIVERGENCES:
        agent, (batch, _) = make_brac(divergence=divergence), make_batch(7)
        noise = make_noise(agent, 8)["actor"]
        agent.actor.load_state_dict(agent.behavior.state_dict())
        same_noise = torch.cat([noise[:, : 1 + SAMPLES], noise[:, 1 : 1 + SAMPLES]], 1)
        noise = noise if divergence == "kl" else same_noise
        found = agent.actor_terms(batch["obs"], noise)[2]
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_kl_is_that_of_the_gaussians_before_the_tanh():
    """With many samples: the divergence in closed form, which the tanh does not change."""
    agent, (batch, _) = make_brac(batch_size=2), make_batch(9)
    agent.cfg.divergence_samples = 20_000
    agent.noise_shapes = {"actor": ("normal", (20_001, 2, agent.act_dim))}
    obs, noise = batch["obs"][:, :2], make_noise(agent, 10)["actor"]
    found = agent.actor_terms(obs, noise)[2]
    for k, row in itertools.product(range(SEEDS), range(2)):
        plain, normals = PlainBRAC(agent, k), []
        for network in (plain.policy, plain.behavior):
            _, mean, std = plain.distribution(network, obs[k, row])
            normals.append(Normal(mean, std))
        exact = torch.distributions.kl_divergence(*normals).sum()
        assert float(found[k, row].detach()) == pytest.approx(float(exact.detach()), rel=0.05)


def test_acts_with_the_mean():
    agent, (batch, _) = make_brac(), make_batch(5)
    obs, action = 3 * batch["obs"], agent.act(3 * batch["obs"])
    low, high = torch.tensor([-2.0, -1.0, 0.0]), torch.tensor([2.0, 3.0, 0.5])
    for k in range(SEEDS):
        seen = (obs[k] - agent.obs_mean) / agent.obs_std
        policy = forward(seen, matrices(agent.actor.net, k))[:, :ACT].tanh()
        same(action[k], low + (high - low) * (policy + 1) / 2, "action")


def test_widths_are_the_settings():
    agent = make_agent("brac", "BRAC", hidden_layers=3, critic_hidden_dim=6)
    policy = [OBS, 7, 7, 7, 2 * ACT]
    shapes = {agent.actor.net: policy, agent.behavior.net: policy}
    shapes[agent.critic] = [OBS + ACT, 6, 6, 6, 1]
    for mlp, widths in shapes.items():
        found = [mlp.layers[0].weight.shape[1], *(layer.weight.shape[2] for layer in mlp.layers)]
        assert found == widths


def test_a_fixed_alpha_is_the_configs_not_the_checkpoints():
    old, new = (make_agent("brac", "BRAC", alpha=alpha) for alpha in (1.0, 0.1))
    new.load_state_dict(old.state_dict())
    assert (new.alpha == 0.1).all()


def test_defaults_are_the_authors():
    """But for behavior_updates, where theirs are 1M in a run of its own (D1)."""
    cfg = load_script("brac").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.batch_size) == (0.99, 0.005, 256)
    assert (cfg.actor_lr, cfg.critic_lr, cfg.behavior_lr, cfg.alpha_lr) == (3e-5, 1e-3, 5e-4, 1e-5)
    assert (cfg.alpha, cfg.alpha_limit, cfg.divergence_threshold) == (1.0, 500.0, 0.0)
    assert (cfg.divergence, cfg.divergence_samples, cfg.mmd_sigma) == ("kl", 4, 20.0)
    assert (cfg.hidden_dim, cfg.critic_hidden_dim, cfg.hidden_layers) == (200, 300, 2)
    assert (cfg.entropy_coef, cfg.warm_start) == (0.0, 20_000)
    assert cfg.value_penalty and not cfg.learn_alpha and not cfg.normalize_obs
