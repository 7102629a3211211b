"""Images: convolutions of a population against torch's own, stacks against Gymnasium's."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load_script
from gymnasium.wrappers import FlattenObservation, FrameStackObservation

# The layers of the papers: of Nature's DQN, and of Young & Tian's for MinAtar.
LAYERS = {"nature": [(32, 8, 4), (64, 4, 2), (64, 3, 1)], "minatar": [(16, 3, 1)]}
SEEDS, BATCH = 3, 2


def make(encoder: str, shape: tuple, stack: int = 1, seeds=range(SEEDS)):
    """An encoder as the scripts of discrete actions have it, a member a seed, in float64."""
    script = load_script("dqn")
    cfg = script.TrainConfig(encoder=encoder, frame_stack=stack)
    generators = [script.generator(seed, "init") for seed in seeds]
    return script.Encoder(generators, cfg, shape).double()


def as_planes(stacked: np.ndarray, stack: int, shape: tuple) -> np.ndarray:
    """One observation [obs_dim] as the planes of all its frames [stack * C, H, W]."""
    planes = []
    for frame in stacked.reshape(stack, *shape):
        if len(shape) == 2:
            planes.append(frame)
        elif shape[-1] <= shape[0]:  # channels last
            planes += [frame[:, :, i] for i in range(shape[-1])]
        else:
            planes += list(frame)
    return np.stack(planes)


CASES = [("nature", (84, 84), 4), ("nature", (40, 36), 1), ("nature", (3, 40, 36), 2)]
CASES += [("nature", (36, 44, 3), 2), ("minatar", (10, 10, 4), 1), ("minatar", (10, 10, 7), 3)]
CASES += [("minatar", (4, 10, 12), 2), ("minatar", (5, 6), 3)]


@pytest.mark.parametrize("encoder, shape, stack", CASES)
def test_an_encoder_is_torchs_convolutions_member_by_member(encoder, shape, stack):
    """Values and the gradients of all weights, in float64."""
    net, g = make(encoder, shape, stack), torch.Generator().manual_seed(3)
    size = (SEEDS, BATCH, stack * int(np.prod(shape)))
    obs = torch.randn(size, generator=g, dtype=torch.float64)
    found = net(obs)
    found.square().sum().backward()
    for k in range(SEEDS):
        x = torch.tensor(np.stack([as_planes(one.numpy(), stack, shape) for one in obs[k]]))
        channels, members = x.shape[1], []
        for conv, (out, side, stride) in zip(net.convs, LAYERS[encoder], strict=True):
            own = torch.nn.Conv2d(channels, out, side, stride).double()
            own.load_state_dict({"weight": conv.weight[k].detach(), "bias": conv.bias[k].detach()})
            x, channels = own(x).relu(), out
            members.append((own, conv))
        features = x.flatten(1)
        assert net.dim == features.shape[1]
        torch.testing.assert_close(found[k].detach(), features.detach())
        features.square().sum().backward()
        for own, conv in members:
            torch.testing.assert_close(conv.weight.grad[k], own.weight.grad)
            torch.testing.assert_close(conv.bias.grad[k], own.bias.grad)


@pytest.mark.parametrize("encoder, shape", [("nature", (84, 84)), ("minatar", (10, 10, 4))])
def test_convolutions_start_within_the_bound_of_their_inputs(encoder, shape):
    """U(+-1/sqrt(fan_in)), drawn anew for each member, whoever is beside it."""
    net, alone = make(encoder, shape, 4), make(encoder, shape, 4, seeds=[2])
    for conv, single in zip(net.convs, alone.convs, strict=True):
        bound = conv.weight[0, 0].numel() ** -0.5
        for p, own in zip(conv.parameters(), single.parameters(), strict=True):
            assert 0.7 * bound < p.abs().max() <= bound * (1 + 1e-6)
            assert torch.equal(p[2], own[0]) and not torch.equal(p[0], p[1])


def test_vectors_stay_as_they_are():
    net, obs = make("mlp", (5,), 3), torch.rand(SEEDS, BATCH, 15)
    assert net(obs) is obs and net.dim == 15 and not list(net.parameters())


class Replay(gym.Env):
    """Shows recorded frames."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, frames: np.ndarray):
        kinds = {"u": (0, 255), "b": (0, 1), "f": (-np.inf, np.inf)}
        shape, bounds = frames.shape[1:], kinds[frames.dtype.kind]
        self.frames = frames
        self.observation_space = gym.spaces.Box(*bounds, shape, frames.dtype)

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        super().reset(seed=seed)
        self.time = 0
        return self.frames[0], {}

    def step(self, action):  # noqa: ARG002
        self.time += 1
        return self.frames[self.time], 0.0, False, False, {}


def stacks(frames: np.ndarray, stack: int) -> np.ndarray:
    """What Gymnasium shows at each step of an episode [T + 1, stack * D]."""
    env = FrameStackObservation(FlattenObservation(Replay(frames)), stack, padding_type="zero")
    shown = [env.reset()[0]] + [env.step(0)[0] for _ in frames[1:]]
    return np.stack(shown).reshape(len(frames), -1).astype(np.float32)


def recorded(dtype, shape: tuple, lengths=(6, 1, 9)) -> list[dict]:
    """Episodes whose frames are all different and nowhere 0, as the frame reads them."""
    rng, episodes = np.random.default_rng(0), []
    for steps in lengths:
        frames = rng.integers(1, 256, (steps + 1, *shape)).astype(dtype)
        ends = np.arange(steps) == steps - 1
        episode = {"obs": frames.reshape(steps + 1, -1), "action": rng.integers(3, size=(steps, 1))}
        episodes.append({**episode, "reward": rng.normal(size=steps), "terminated": ends})
    return episodes


@pytest.mark.parametrize("stack", [1, 2, 4, 12])
@pytest.mark.parametrize(
    "dtype, encoder, shape",
    [(np.uint8, "nature", (36, 36)), (bool, "minatar", (5, 5, 2)), (np.float32, "mlp", (3,))],
)
def test_stacks_are_those_that_the_environment_shows(dtype, encoder, shape, stack):
    """Before and after each step, across no episode's start, which has zeros before it."""
    script, episodes = load_script("dqn"), recorded(dtype, shape)
    cfg = script.TrainConfig(encoder=encoder, frame_stack=stack, hidden_dim=2, heads=1)
    size, zeros = int(np.prod(shape)), [0.0, 0.0]
    units = ([0.0] * size, [1.0] * size, [1.0], [1.0], zeros, torch.tensor(shape))
    agent = script.DQN(cfg, dict(zip(script.DQN.units, units, strict=True)))
    table = agent.table([{**each} for each in episodes])  # which empties them
    small = torch.float32 if dtype == np.float32 else torch.uint8
    assert table["frames"].dtype == small and table["frames"].shape == (6 + 1 + 9 + 3, size)
    rows = torch.arange(6 + 1 + 9)
    batch = agent.gather(table, torch.stack([rows, rows.flip(0)]))
    shown = [stacks(each["obs"].reshape(-1, *shape), stack) for each in episodes]
    scale = 255 if encoder == "nature" else 1
    for name, cut in {"obs": slice(None, -1), "next_obs": slice(1, None)}.items():
        expected = torch.tensor(np.concatenate([each[cut] for each in shown])) / scale
        torch.testing.assert_close(batch[name], torch.stack([expected, expected.flip(0)]))
    actions = np.concatenate([each["action"][:, 0] for each in episodes])
    assert batch["action"].tolist() == [actions.tolist(), actions[::-1].tolist()]
    ends = list(itertools.accumulate((6, 1, 9)))
    assert batch["terminated"][0].nonzero().flatten().tolist() == [end - 1 for end in ends]
