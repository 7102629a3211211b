"""For the parity tests: agents, batches and networks as plain float64 matrices.

Nothing of a script takes part in the expected numbers but its initial weights: networks are plain
matrices, one member and one critic at a time, Adam is written out, gradients are autograd's.
"""

import copy

import torch
from conftest import load_script

OBS, ACT, BATCH, HIDDEN, LAYERS, SEEDS = 5, 3, 12, 7, 2, 3
LOW, HIGH = [-2.0, -1.0, 0.0], [2.0, 3.0, 0.5]  # bounds of the actions
NUM_ACTIONS, FIRST = 4, 2  # where actions are numbers: how many, and the environment's first one
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def make_agent(name: str, agent_class: str, bounds=(LOW, HIGH), **settings):
    """An agent in float64 with small networks and a scaler that does something."""
    script, g = load_script(name), torch.Generator().manual_seed(1)
    size = {"hidden_dim": HIDDEN, "hidden_layers": LAYERS, "batch_size": BATCH}
    cfg = script.TrainConfig(**{**size, "num_seeds": SEEDS, "num_updates": 1000, **settings})
    units = make_units(torch.randn(OBS, generator=g), torch.rand(OBS, generator=g) + 0.5, *bounds)
    return getattr(script, agent_class)(cfg, units).double()


def make_discrete(name: str, agent_class: str, **settings):
    """One whose actions are numbers; its network and its target are loud and differ."""
    bounds = [float(FIRST)], [FIRST + NUM_ACTIONS - 1.0]
    agent, g = make_agent(name, agent_class, bounds, **settings), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (*agent.critic.parameters(), *agent.target_critic.parameters()):
            p.copy_(0.8 * torch.randn(p.shape, generator=g))
    return agent


def make_units(mean, std, low, high) -> dict:
    """What an agent is told of its data."""
    low, high = torch.as_tensor(low), torch.as_tensor(high)
    units = {"obs_mean": mean, "obs_std": std, "return_range": [0.0, 1.0], "frame_shape": [OBS]}
    return {**units, "action_center": (low + high) / 2, "action_half_range": (high - low) / 2}


UNIT = ([0.0], [1.0], [-1.0], [1.0])  # of one observation and one action in the agent's own units


def make_batch(seed: int, dropout: float = 0.0) -> tuple[dict, dict]:
    g = torch.Generator().manual_seed(seed)
    batch = {
        "obs": torch.randn(SEEDS, BATCH, OBS, generator=g),
        "action": 2 * torch.rand(SEEDS, BATCH, ACT, generator=g) - 1,
        "reward": torch.randn(SEEDS, BATCH, generator=g),
        "next_obs": torch.randn(SEEDS, BATCH, OBS, generator=g),
        "terminated": (torch.rand(SEEDS, BATCH, generator=g) < 0.4).double(),
    }
    assert 0 < batch["terminated"].mean() < 1
    kept = torch.rand(SEEDS, LAYERS, BATCH, HIDDEN, generator=g) >= dropout
    return batch, {"kept": kept} if dropout else {}


def make_discrete_batch(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed + 500)
    action = torch.randint(NUM_ACTIONS, (SEEDS, BATCH), generator=g)
    return {**make_batch(seed)[0], "action": action}


# ---- the plain computation


def matrices(mlp, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of the weights of network number `index` of a population of networks."""
    pairs = [(layer.weight[index], layer.bias[index, 0]) for layer in mlp.layers]
    return [tuple(x.detach().clone().requires_grad_() for x in pair) for pair in pairs]


def forward(x, network, masks=None):
    """ReLU between the layers; masks [layers, B, width] multiply the hidden units."""
    for i, (weight, bias) in enumerate(network):
        x = x @ weight + bias
        if i < len(network) - 1:
            x = torch.maximum(x, torch.zeros(()))
            x = x if masks is None else x * masks[i]
    return x


def huber(u):
    """Of threshold 1."""
    return u * u / 2 if abs(u) <= 1 else abs(u) - 0.5


def moved(target, network, tau: float) -> None:
    """target <- (1 - tau) target + tau network."""
    with torch.no_grad():
        for old, new in zip(flat(target), flat(network), strict=True):
            old.copy_((1 - tau) * old + tau * new)


def flat(network) -> list[torch.Tensor]:
    return [x for pair in network for x in pair]


def of_member(tensors, k: int) -> list[torch.Tensor]:
    """Member k's part of tensors [S*E, ...]: all of its first network, then of its second."""
    each = len(tensors[0]) // SEEDS
    return [x[k * each + i] for i in range(each) for x in tensors]


class PlainAdam:
    """Kingma and Ba (arXiv 1412.6980), algorithm 1, with the paper's constants."""

    def __init__(self, parameters, lr: float, eps: float = 1e-8):
        self.parameters, self.lr, self.eps, self.t = parameters, lr, eps, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    def step(self, loss: torch.Tensor) -> None:
        self.t += 1
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
                self.m[i] = 0.9 * self.m[i] + 0.1 * g
                self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
                m, v = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
                p -= self.lr * m / (v.sqrt() + self.eps)


def check_weights(mlp, index: int, network, what: str) -> None:
    for layer, (weight, bias) in zip(mlp.layers, network, strict=True):
        same(layer.weight[index], weight, what)
        same(layer.bias[index, 0], bias, what)


def same(actual, expected, what: str = "") -> None:
    close = TIGHT if actual.dtype == torch.float64 else {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(
        actual.detach().double(), expected.detach(), **close, msg=lambda text: f"{what}: {text}"
    )


def same_gradient(ours, module, theirs, parameters, k: int, what: str = "") -> None:
    """Member k's loss, and the gradients of all parameters."""
    assert ours.shape == (SEEDS,)
    same(ours[k], theirs, what)
    options = {"retain_graph": True, "materialize_grads": True}
    found = torch.autograd.grad(ours.sum(), list(module.parameters()), **options)
    wanted = torch.autograd.grad(theirs, parameters, **options)
    for a, b in zip(of_member(found, k), wanted, strict=True):
        same(a.reshape(b.shape), b, f"gradient of {what}")


def updated(agent, batch: dict, noise: dict, *variant) -> dict:
    """The metrics of one update, which must leave its input as it was."""
    given = copy.deepcopy((batch, noise))
    metrics = agent.update(batch, noise, *variant)
    for new, old in zip((batch, noise), given, strict=True):
        assert new.keys() == old.keys()
        assert all(torch.equal(new[name], old[name]) for name in old), "it changed its input"
    return metrics


def descended(agent, batch: dict, noise: dict) -> torch.Tensor:
    """The loss [S] that an update would descend, with its graph."""
    losses = []
    agent.critic_adam.descend = losses.append
    agent.update(batch, noise, False)
    del agent.critic_adam.descend
    return losses[0]


def same_metrics(metrics: dict, expected: dict, k: int) -> None:
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        same(metrics[name][k], value, name)


def check_critics(agent, k: int, one, check=check_weights) -> None:
    """Member k's two critics and their targets."""
    for i in range(2):
        check(agent.critic, 2 * k + i, one.critics[i], f"critic {i}")
        check(agent.target_critic, 2 * k + i, one.targets[i], f"target {i}")


def check_moments(ours, adams) -> None:
    """Adam's moments and its count; `adams` are the members' plain ones."""
    count = len(ours.params)
    for k, adam in enumerate(adams):
        assert ours.steps.tolist() == [adam.t] * count
        for name, expected in (("m", adam.m), ("v", adam.v)):
            moments = [getattr(ours, f"{name}{i}") for i in range(count)]
            for a, b in zip(of_member(moments, k), expected, strict=True):
                same(a.reshape(b.shape), b, name)


def check_act(agent, mlp, obs) -> None:
    """a = center + half_range tanh(network((s - mean) / std)) within the bounds."""
    action, low, high = agent.act(obs), torch.tensor(LOW), torch.tensor(HIGH)
    for k in range(SEEDS):
        seen = (obs[k] - agent.obs_mean) / agent.obs_std
        policy = forward(seen, matrices(mlp, k)).tanh()
        same(action[k], low + (high - low) * (policy + 1) / 2, "action")


def check_best(agent, obs, best) -> None:
    """What `best(k, seen)` says of every observation [B, OBS], in the environment's numbers."""
    action = agent.act(obs)
    assert action.shape == (SEEDS, BATCH, 1) and action.dtype == torch.int64
    for k in range(SEEDS):
        seen = (obs[k] - agent.obs_mean) / agent.obs_std
        assert action[k, :, 0].tolist() == [FIRST + int(a) for a in best(k, seen)]
    assert len(action.unique()) > 1, "it always acts in the same way"


def member(batch: dict, k: int) -> dict:
    return {name: values[k] for name, values in batch.items()}
