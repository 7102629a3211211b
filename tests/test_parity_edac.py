"""EDAC and SAC-N: losses, gradients and updates against float64 computations from the paper."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from plain import (
    ACT,
    BATCH,
    OBS,
    SEEDS,
    UNIT,
    PlainAdam,
    check_act,
    check_moments,
    check_weights,
    flat,
    forward,
    make_agent,
    make_batch,
    make_units,
    matrices,
    member,
    of_member,
    same,
    same_gradient,
    same_metrics,
    updated,
)

pytestmark = pytest.mark.usefixtures("float64")
# Rates of their own, a tau that shows, a deep enough way back from Q to the action.
LOUD = {"num_critics": 4, "eta": 1.7, "gamma": 0.9, "tau": 0.1, "actor_lr": 0.02}
LOUD |= {"critic_lr": 0.01, "hidden_layers": 3}
VARIANTS = [{}, {"eta": 0.0}, {"num_critics": 2}, {"layer_norm": True}]
VARIANTS += [{"layer_norm": True, "eta": 0.0, "num_critics": 3}]
each_variant = pytest.mark.parametrize("settings", VARIANTS, ids=str)


def make_edac(**settings):
    """EDAC with loud critics, other targets, a policy at both bounds of log_std at times."""
    agent, g = make_agent("edac", "EDAC", **{**LOUD, **settings}), torch.Generator()
    with torch.no_grad():
        for i, module in enumerate((agent.critic, agent.target_critic)):
            for p in module.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=g.manual_seed(p.numel() + i)))
            module.layers[-1].bias *= 0.1  # or one of them is always the least
        last = agent.actor.net.layers[-1]
        last.weight[..., ACT:] *= 60
        last.bias[..., ACT:] -= 1.5
        agent.log_entropy_coef += torch.tensor([0.1, -0.4, 0.3])
    return agent


def make_inputs(seed: int):
    """A batch, and what `update` needs of noise; actions keep within +-tanh(10) (softplus)."""
    batch, g = make_batch(seed)[0], torch.Generator().manual_seed(seed + 500)
    noise = {k: torch.randn(SEEDS, BATCH, ACT, generator=g) for k in ("target", "actor")}
    return batch, {name: values.clamp(-1.2, 1.2) for name, values in noise.items()}


class PlainCritic:
    """One critic: linear maps as matrices, gain and shift of the norm before each ReLU."""

    def __init__(self, mlp, index: int):
        self.layers, self.norms = matrices(mlp, index), []
        for norm in mlp.norms:
            pair = (norm.weight[index, 0], norm.bias[index, 0])
            self.norms.append(tuple(x.detach().clone().requires_grad_() for x in pair))

    def parameters(self) -> list[torch.Tensor]:
        return flat(self.layers) + flat(self.norms)

    def hidden(self, x, i: int):
        """The units of a layer, before the ReLU."""
        weight, bias = self.layers[i]
        x = x @ weight + bias
        if not self.norms:
            return x
        gain, shift = self.norms[i]
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
        return gain * (x - mean) / (variance + 1e-5) ** 0.5 + shift

    def __call__(self, obs, action):
        x = torch.cat([obs, action], -1)
        for i in range(len(self.layers) - 1):
            x = self.hidden(x, i).clip(min=0)
        weight, bias = self.layers[-1]
        return (x @ weight + bias)[..., 0]

    def by_action(self, obs, action):
        """dQ/da [B, ACT], by hand for ReLUs alone: the Jacobians of the layers, last one first."""
        if self.norms:
            action = action.clone().requires_grad_()
            return torch.autograd.grad(self(obs, action).sum(), action, create_graph=True)[0]
        x, active = torch.cat([obs, action], -1), []
        for i in range(len(self.layers) - 1):
            x = self.hidden(x, i)
            active.append((x > 0).double())
            x = x * active[-1]
        rows = self.layers[-1][0].T.expand(len(obs), -1)
        for mask, (weight, _) in zip(active[::-1], self.layers[-2::-1], strict=True):
            rows = (rows * mask) @ weight.T
        return rows[:, OBS:]


class PlainEDAC:
    """One member: a policy, its critics and their targets."""

    def __init__(self, agent, k: int):
        self.c, n = SimpleNamespace(**vars(agent.cfg)), agent.cfg.num_critics
        self.policy = matrices(agent.actor.net, k)
        self.critics = [PlainCritic(agent.critic, n * k + i) for i in range(n)]
        self.targets = [PlainCritic(agent.target_critic, n * k + i) for i in range(n)]
        self.log_coef = agent.log_entropy_coef[k].detach().clone().requires_grad_()
        self.actor_adam = PlainAdam(flat(self.policy), self.c.actor_lr)
        every = [x for critic in self.critics for x in critic.parameters()]
        self.critic_adam = PlainAdam(every, self.c.critic_lr)
        self.coef_adam = PlainAdam([self.log_coef], self.c.actor_lr)
        self.bounds, self.least = torch.zeros(2), []

    def draw(self, obs, noise):
        """a = tanh(raw), da/draw = cosh(raw)^-2."""
        out = forward(obs, self.policy)
        mean, log_std = out[..., :ACT], out[..., ACT:]
        self.bounds += torch.stack([(log_std < -5).sum(), (log_std > 2).sum()])
        std = torch.clip(log_std, -5, 2).exp()
        raw = mean + std * noise
        size = torch.where(raw < 0, -raw, raw)
        log_cosh = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
        log_normal = -(noise**2) / 2 - torch.log(std * math.sqrt(2 * math.pi))
        return torch.tanh(raw), (log_normal + 2 * log_cosh).sum(-1)

    def target(self, batch, noise):
        """y, a row at a time."""
        y, coef = [], math.exp(self.log_coef.detach())
        action, log_prob = self.draw(batch["next_obs"], noise["target"])
        for row in range(BATCH):
            pair = batch["next_obs"][row], action[row]
            values = [float(q(*pair).detach()) for q in self.targets]
            self.least.append(values.index(min(values)))
            alive = 0.0 if batch["terminated"][row] else 1.0
            value = min(values) - coef * float(log_prob[row].detach())
            y.append(float(batch["reward"][row]) + self.c.gamma * alive * value)
        return torch.tensor(y)

    def similarity(self, batch):
        """Equation 4: the cosine of every ordered pair, over N - 1; 1e-10 as the authors have.

        0 where no ReLU is active and a critic has no slope.
        """
        slopes = [critic.by_action(batch["obs"], batch["action"]) for critic in self.critics]
        total = 0
        for i, one in enumerate(slopes):
            for j, other in enumerate(slopes):
                if i != j:
                    sloped = (one != 0).any(-1) & (other != 0).any(-1)
                    pair = one[sloped], other[sloped]
                    a, b = ((x**2).sum(-1).sqrt() + 1e-10 for x in pair)
                    total = total + ((pair[0] * pair[1]).sum(-1) / a / b).sum() / BATCH
        return total / (len(slopes) - 1)

    def critic_loss(self, batch, y):
        each = torch.stack([q(batch["obs"], batch["action"]) for q in self.critics])
        loss = sum(((y - q) ** 2).mean() for q in each)
        means = {"q": each.mean(), "q_std": deviation(each)}
        if self.c.eta:
            similarity = self.similarity(batch)
            loss = loss + self.c.eta * similarity
            means["similarity"] = similarity / len(each)
        self.means = {name: value.detach() for name, value in means.items()}
        return loss

    def actor_loss(self, batch, noise):
        action, log_prob = self.draw(batch["obs"], noise["actor"])
        each = torch.stack([q(batch["obs"], action) for q in self.critics])
        least, self.log_prob = each.min(0).values, log_prob.detach().mean()
        self.of_policy = {"policy_q": least.mean(), "policy_q_std": deviation(each)}
        self.of_policy["entropy"] = -self.log_prob
        return (math.exp(self.log_coef.detach()) * log_prob - least).mean()

    def update(self, batch, noise):
        """Critics, policy, entropy_coef, targets."""
        y = self.target(batch, noise)
        loss = self.critic_loss(batch, y)
        metrics = {**self.means, "critic_loss": loss.detach()}
        self.critic_adam.step(loss)
        loss = self.actor_loss(batch, noise)
        metrics |= {**self.of_policy, "actor_loss": loss.detach()}
        metrics["entropy_coef"] = self.log_coef.detach().exp()
        self.actor_adam.step(loss)
        self.coef_adam.step(-self.log_coef * (self.log_prob - ACT))
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics, strict=True):
                for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                    old.copy_(0.9 * old + 0.1 * new)
        return metrics


def deviation(each):
    """Mean over the batch of the critics' deviation, as a sample's [N, B]."""
    mean = each.sum(0) / len(each)
    return (((each - mean) ** 2).sum(0) / (len(each) - 1)).sqrt().mean()


def check_critics(agent, k: int, one: PlainEDAC) -> None:
    n = agent.cfg.num_critics
    for i in range(n):
        pairs = ((agent.critic, one.critics[i]), (agent.target_critic, one.targets[i]))
        for (mlp, critic), what in zip(pairs, (f"critic {i}", f"target {i}"), strict=True):
            check_weights(mlp, n * k + i, critic.layers, what)
            assert len(mlp.norms) == len(critic.norms)
            for norm, (gain, shift) in zip(mlp.norms, critic.norms, strict=True):
                same(norm.weight[n * k + i, 0], gain, what)
                same(norm.bias[n * k + i, 0], shift, what)


@each_variant
def test_losses_and_gradients(settings):
    agent, (batch, noise) = make_edac(**settings), make_inputs(21)
    y = agent.target(batch, noise["target"]).detach()
    critic_loss, metrics = agent.critic_loss(y, batch["obs"], batch["action"])
    actor_loss, of_policy = agent.actor_loss(batch["obs"], noise["actor"])
    assert not batch["action"].requires_grad
    least, bounds = set(), torch.zeros(2)
    for k in range(SEEDS):
        plain, one, of_one = PlainEDAC(agent, k), member(batch, k), member(noise, k)
        same(y[k], plain.target(one, of_one), "target")
        expected = plain.critic_loss(one, y[k])
        same_gradient(critic_loss, agent.critic, expected, plain.critic_adam.parameters, k, "L_Q")
        same_metrics(metrics, plain.means, k)
        expected = plain.actor_loss(one, of_one)
        same_gradient(actor_loss, agent.actor, expected, plain.actor_adam.parameters, k, "L_pi")
        same_metrics(of_policy, plain.of_policy, k)
        least, bounds = least | set(plain.least), bounds + plain.bounds
    assert len(least) > 1, "the least is always the same critic"
    assert (bounds > 0).all() and bounds.sum() < SEEDS * 2 * BATCH * ACT, f"log_std: {bounds}"


@each_variant
def test_updates(settings):
    """Three updates: all that training changes."""
    agent = make_edac(**settings)
    plain = [PlainEDAC(agent, k) for k in range(SEEDS)]
    for step in range(3):
        batch, noise = make_inputs(30 + step)
        assert agent.variant(step) == ()
        metrics = updated(agent, batch, noise)
        for k, one in enumerate(plain):
            expected = one.update(member(batch, k), member(noise, k))
            same_metrics(metrics, expected, k)
            check_weights(agent.actor.net, k, one.policy, "policy")
            same(agent.log_entropy_coef[k], one.log_coef, "entropy_coef")
            check_critics(agent, k, one)
    check_moments(agent.actor_adam, [one.actor_adam for one in plain])
    check_moments(agent.critic_adam, [one.critic_adam for one in plain])
    check_moments(agent.entropy_adam, [one.coef_adam for one in plain])


def test_similarity_of_known_gradients():
    """Linear critics Q_i = w_i a: cosines known; the longer one counts no more."""
    agent = make_edac(hidden_layers=1, num_critics=3)
    slopes = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0], [-9.0, 0.0, 0.0]])
    with torch.no_grad():
        for p in agent.critic.parameters():
            p.zero_()
        first, last = agent.critic.layers
        first.bias += 50  # every ReLU is active
        for k, i in ((k, i) for k in range(SEEDS) for i in range(3)):
            first.weight[3 * k + i, OBS:, 0] = slopes[i]
            last.weight[3 * k + i, 0] = 1
    batch, _ = make_inputs(4)
    y = torch.zeros(SEEDS, BATCH)
    loss, metrics = agent.critic_loss(y, batch["obs"], batch["action"])
    same(metrics["similarity"], torch.full((SEEDS,), -1 / 3), "similarity")  # (0 + 0 - 1) / 3
    agent.cfg.eta = 0.0
    same(loss - agent.critic_loss(y, batch["obs"], batch["action"])[0], torch.full((3,), -1.7))


def test_critics_without_a_slope_have_finite_gradients():
    agent, (batch, noise) = make_edac(), make_inputs(5)
    with torch.no_grad():
        agent.critic.layers[0].bias -= 100  # no ReLU is active
    metrics = agent.update(batch, noise)
    assert (metrics["similarity"] == 0).all()
    assert all(p.isfinite().all() for p in agent.parameters())


def test_eta_turns_the_gradients_away_from_each_other():
    """All critics learn one slope, r = 2 sum_k a_k; with eta they agree on it less."""
    cosine = {}
    for eta in (1e-9, 1.0):
        agent = make_agent("edac", "EDAC", **{**LOUD, "eta": eta, "hidden_layers": 1})
        batch, noise = make_inputs(0)
        batch |= {"reward": 2 * batch["action"].sum(-1), "terminated": torch.ones(SEEDS, BATCH)}
        for _ in range(150):
            metrics = agent.update(batch, noise)
        cosine[eta] = metrics["similarity"]
    assert (cosine[1e-9] > 0.5).all() and (cosine[1.0] < cosine[1e-9] - 0.3).all(), cosine


def test_the_policys_loss_leaves_the_critics_alone():
    """And that of the critics the policy; a gradient is each network's own."""
    agent, (batch, noise) = make_edac(critic_lr=0.0), make_inputs(6)
    before = [p.clone() for p in agent.critic.parameters()]
    agent.update(batch, noise)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.critic.parameters(), strict=True))
    agent = make_edac(actor_lr=0.0)
    before = [p.clone() for p in agent.actor.parameters()]
    agent.update(batch, noise)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.actor.parameters(), strict=True))


def test_compiles_as_one_graph(monkeypatch):
    """With the gradients of gradients in it."""
    small = {"hidden_layers": 1, "num_critics": 2}
    eager, compiled = make_edac(**small), make_edac(**small)
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for step in range(2):
        expected, found = eager.update(*make_inputs(step)), update(*make_inputs(step))
        for name in expected:
            same(found[name], expected[name], name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        same(ours, theirs)


def test_acts_with_the_mean():
    agent, (batch, _) = make_edac(), make_batch(5)
    with torch.no_grad():
        agent.actor.net.layers[-1].weight[..., ACT:] = 0  # log_std does not matter
    last = agent.actor.net.layers[-1]
    mean = SimpleNamespace(weight=last.weight[..., :ACT], bias=last.bias[..., :ACT])
    net = SimpleNamespace(layers=[*agent.actor.net.layers[:-1], mean])
    check_act(agent, net, 3 * batch["obs"])


def test_critics_of_a_member_start_apart():
    agent = make_agent("edac", "EDAC", **LOUD)
    for layer in agent.critic.layers:
        for weights in of_member([layer.weight], 0):
            others = sum(torch.equal(weights, x) for x in layer.weight)
            assert others == 1
    for p, target in zip(agent.critic.parameters(), agent.target_critic.parameters(), strict=True):
        assert torch.equal(p, target) and not target.requires_grad


def test_defaults_are_the_authors():
    cfg = load_script("edac").TrainConfig()
    assert (cfg.gamma, cfg.tau, cfg.batch_size, cfg.num_updates) == (0.99, 0.005, 256, 3_000_000)
    assert (cfg.num_critics, cfg.eta, cfg.layer_norm) == (10, 1.0, False)
    assert (cfg.actor_lr, cfg.critic_lr) == (3e-4, 3e-4)
    assert (cfg.hidden_dim, cfg.hidden_layers, cfg.normalize_obs) == (256, 3, False)
    agent = load_script("edac").EDAC(cfg, make_units(*UNIT))
    assert agent.log_entropy_coef.tolist() == [0.0]
    assert agent.noise_shapes == dict.fromkeys(("target", "actor"), ("normal", (256, 1)))
