"""tools/policy.py: exported policies act as the member does, where only torch is; evaluation."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import DISCRETE, REPOSITORY, SCRIPTS, contents, load_script, load_tool, words

policy = load_tool("tools/policy.py")

SIZES = [{"N": n, "T": t} for n, t in ((1, 1), (2, 3), (7, 2), (1, 20), (5, 20))]
KINDS = (torch.float64, torch.float16, torch.bfloat16)
# What acting needs, where it is more than the actor.
NETWORKS = {"bcq": {"actor", "vae", "critic", "eval_latents"}, "fql": {"actor", "waves"}}
ACTORS = {"dqn": "critic", "discrete_cql": "critic", "discrete_bcq": "critic"}
# ONNX's reference implementation cannot gather from more than 64 candidates.
SMALL = {"bcq": {"last_hidden_dim": 16, "vae_hidden_dim": 16, "eval_candidates": 32}}
SMALL |= {"spot": {"vae_updates": 2, "vae_hidden_dim": 16}}
# Long enough that two members choose otherwise somewhere.
SMALL |= {name: {"critic_lr": 0.03, "num_updates": 30} for name in ACTORS}
SMALL |= {"discrete_dt": {"actor_lr": 0.03, "num_updates": 30}}
SEQUENCE = {
    "obs": ("N", "T", 3),
    "action": ("N", "T", 1),
    "return_to_go": ("N", "T"),
    "timestep": ("T",),
}
ALONE = """
import sys
for name in ("gymnasium", "minari", "pyrallis", "numpy", "yaml", "h5py", "tqdm", "onnx"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
found = {}
for name, (cases, wrong) in torch.load("inputs.pt").items():
    policy = torch.export.load(f"{name}.pt2").module()
    found[name] = [policy(*case) for case in cases], dict(policy.state_dict())
    for case in wrong:
        try:
            policy(*case)
        except (AssertionError, RuntimeError):
            continue
        raise SystemExit(f"{name} takes {[x.shape for x in case]}")
torch.save(found, "found.pt")
"""


def trained(name: str, seeds: int = 2, **settings):
    """A short run of normalised observations in the folder `name`; returns its agent."""
    script, kept = load_script(name), []
    with pytest.MonkeyPatch.context() as patch:
        save = script.Run.save
        patch.setattr(script.Run, "save", lambda run: (kept.append(run.agent), save(run)))
        settings = {"env_id": "none", "normalize_obs": "true", **SMALL.get(name, {}), **settings}
        assert script.main(words(run_dir=name, num_seeds=seeds, **settings)) == 0
    assert not torch.equal(kept[-1].obs_std, torch.ones(kept[-1].obs_dim))
    return kept[-1]


def axes(agent) -> dict:
    """The inputs of an exported policy and their axes."""
    sequence = len(inspect.signature(agent.act).parameters) > 1
    own = SEQUENCE if sequence else {"obs": ("N", 3)}
    return {**own, "obs": (*own["obs"][:-1], agent.obs_dim)}


def inputs(agent, sizes: dict) -> list:
    """Inputs of an exported policy, in the environment's units."""
    g, made = torch.Generator().manual_seed(7), []
    for name, own in axes(agent).items():
        shape = [sizes.get(axis, axis) for axis in own]
        values = 5 * torch.randn(shape, generator=g)
        made.append(torch.arange(shape[0]) if name == "timestep" else values)
    return made


def floats(case: list, kind) -> list:
    return [x.to(kind) if x.is_floating_point() else x for x in case]


def wrong(case: list) -> list:
    """Inputs of a dimension too little, or of numbers of steps and episodes that do not fit."""
    obs, *others = case
    bad = [[obs[..., :2], *others]]
    if others:
        action, return_to_go, timestep = others
        bad += [[obs, action[:1], return_to_go, timestep]]
        bad += [[obs, action, return_to_go[:, :1], timestep]]
        bad += [[obs, action, return_to_go, timestep[:1]]]
    return bad


def actions(agent, case: list, member: int) -> torch.Tensor:
    """What a member of the population does."""
    seeds = agent.cfg.num_seeds
    spread = [x.expand(seeds, *x.shape) if x.dim() > 1 else x for x in case]  # timestep: of all
    return agent.act(*floats(spread, torch.float32))[member]


def inside(file: str) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def test_policies_act_the_same_where_only_torch_is(capfd, monkeypatch, toy_store, discrete_store):
    """All scripts, one fresh process: member 1 of 2, other weights than acting needs left out.

    Observations may be floats of any type, such as MuJoCo's float64: they count as float32.
    """
    cases, expected, actors, stores = {}, {}, {}, (toy_store, discrete_store)
    for name in SCRIPTS:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(stores[name in DISCRETE]))
        agent = trained(name)
        before = contents(name)
        capfd.readouterr()
        assert policy.main(["export", name, f"{name}.pt2", "--member", "1"]) == 0
        said = capfd.readouterr()
        assert (said.out, said.err) == (f"{name}.pt2: the policy of seed 1\n", "")
        assert contents(name) == before
        assert str(REPOSITORY).encode() not in inside(f"{name}.pt2")
        case = inputs(agent, SIZES[2])
        right = [inputs(agent, sizes) for sizes in SIZES] + [floats(case, kind) for kind in KINDS]
        cases[name] = right, wrong(case)
        expected[name] = [actions(agent, case, 1) for case in right]
        actor = getattr(agent, ACTORS.get(name, "actor"))
        actors[name] = sum(p.numel() for p in actor.parameters()) // 2
        every = [torch.cat([actions(agent, x, i) for x in right]) for i in (0, 1)]
        assert not torch.equal(*every), name
    Path("empty").mkdir()
    torch.save(cases, "empty/inputs.pt")
    for name in SCRIPTS:
        Path(f"{name}.pt2").rename(f"empty/{name}.pt2")
    argv = [sys.executable, "-I", "-c", ALONE]
    done = subprocess.run(argv, cwd="empty", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    units = {"obs_mean", "obs_std", "action_center", "action_half_range"}
    for name, (found, state) in torch.load("empty/found.pt").items():
        for ours, theirs in zip(found, expected[name], strict=True):
            kind = torch.int64 if name in DISCRETE else torch.float32
            assert ours.dtype == kind and not ours.requires_grad, name
            assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-6, name
        owners = {path.split(".")[1] for path in state}
        more = {"return_range"} if name.endswith("dt") else set()
        acting = NETWORKS.get(name, {ACTORS.get(name, "actor")})
        assert owners == acting | units | more, name
        stored = zipfile.ZipFile(f"empty/{name}.pt2").namelist()
        assert sum("/weight_" in path for path in stored) <= len(state), name
        if name not in NETWORKS:
            part = f".{ACTORS.get(name, 'actor')}."
            weights = sum(x.numel() for path, x in state.items() if part in path)
            assert 0 < weights <= actors[name], name


def test_a_run_of_one_seed_is_exported_and_an_old_file_replaced(capsys):
    agent = trained("iql", seeds=1, seed=3)
    Path("policy.pt2").write_bytes(b"old")
    assert policy.main(["export", "iql/checkpoint.pt", "policy.pt2"]) == 0
    assert "policy.pt2: the policy of seed 3" in capsys.readouterr().out
    assert sorted(str(path) for path in Path().iterdir()) == ["iql", "policy.pt2"]
    (obs,) = case = inputs(agent, SIZES[2])
    exported = torch.export.load("policy.pt2").module()
    torch.testing.assert_close(exported(obs), actions(agent, case, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in ("bcq", "cql", "dt", "iql") if n in SCRIPTS])
def test_onnx_acts_the_same(name, capfd):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    agent = trained(name)
    capfd.readouterr()
    assert policy.main(["export", name, "policy.onnx", "--member", "1"]) == 0
    said = capfd.readouterr()
    assert (said.out, said.err) == ("policy.onnx: the policy of seed 1\n", "")
    assert str(REPOSITORY).encode() not in Path("policy.onnx").read_bytes()
    session, names = reference.ReferenceEvaluator("policy.onnx"), list(axes(agent))
    assert session.input_names == names and session.output_names == ["next_action"]
    for kind, own in zip(session.input_types, axes(agent).values(), strict=True):
        dims = kind.tensor_type.shape.dim
        assert tuple(axis.dim_param or axis.dim_value for axis in dims) == own
    for sizes in SIZES:
        case = inputs(agent, sizes)
        feed = {key: x.numpy() for key, x in zip(names, case, strict=True)}
        (found,) = session.run(None, feed)
        expected = actions(agent, case, 1)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


# ---- evaluation


def evaluated(capsys, *argv: str) -> dict:
    """What `evaluate` prints: line -> {return or score: (mean, deviation)}."""
    before = contents()
    capsys.readouterr()
    assert policy.main(["evaluate", *argv]) == 0
    assert contents() == before
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line]
    number = r"(\w+) (-?[\d.]+) ± ([\d.]+)"
    pairs = [(name, re.findall(number, text)) for name, text in lines]
    return {name: {u: (float(m), float(s)) for u, m, s in own} for name, own in pairs}


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluation_is_that_of_the_run(name, capsys):
    trained(name, env_id="auto", seed=4)
    found, rows = evaluated(capsys, name), []
    found = {line.split(",")[0]: values for line, values in found.items()}  # but for the target
    for row in map(json.loads, Path(name, "episodes.jsonl").read_text().splitlines()):
        rows += [row] if row["final"] else []
    assert len(rows) == 6 and len(found) == 3
    means = {unit: [] for unit in ("return", "score")}
    for seed, unit in ((seed, unit) for seed in (4, 5) for unit in means):
        own = torch.tensor([row[unit] for row in rows if row["seed"] == seed])
        means[unit].append(own.mean())
        expected = (own.mean().item(), own.std(correction=0).item())
        assert found[f"seed {seed}"][unit] == pytest.approx(expected, abs=0.02)
    for unit, own in means.items():
        own = torch.stack(own)
        expected = (own.mean().item(), own.std(correction=0).item())
        assert found["2 seeds"][unit] == pytest.approx(expected, abs=0.02)


def test_scores_are_of_the_runs_own_environment(capsys):
    trained("iql", env_id="auto", ref_min_score=-1000, ref_max_score=0)
    own = evaluated(capsys, "iql", "--env_id", "auto")
    value, _ = own["seed 0"]["return"]
    assert own["seed 0"]["score"][0] == pytest.approx(100 + value / 10, abs=0.02)
    assert own["seed 0"]["return"][1] > 0
    gym.register("OtherPendulum-v0", gym.spec("Pendulum-v1").entry_point, max_episode_steps=200)
    other = evaluated(capsys, "iql", "--env_id", "OtherPendulum-v0", "--episodes", "1")
    assert other["seed 0"]["return"][1] == 0  # the deviation of a single one
    assert set(other["seed 0"]) == {"return"} and other["seed 0"]["return"][0] < value


def test_a_transformer_is_asked_for_each_target(capsys):
    trained("dt", env_id="auto", target_returns="-100, -900")
    found = evaluated(capsys, "dt")
    first = [f"{name}, target -100.0" for name in ("seed 0", "seed 1", "2 seeds")]
    assert list(found) == first + [line.replace("-100", "-900") for line in first]
    last = json.loads(Path("dt/result.json").read_text())["last"]
    for row, target in ((row, i) for row in last for i in (1, 2)):
        line = f"seed {row['seed']}, target {'-100.0' if target == 1 else '-900.0'}"
        expected = row[f"eval/return{'_target_2' if target == 2 else ''}"]
        assert found[line]["return"][0] == pytest.approx(expected, abs=0.006)


# ---- critics


@pytest.mark.parametrize("name", ["td3_bc", "cql", "fql", "rebrac", "edac"])
def test_a_promise_is_the_critics_and_what_is_earned_the_returns(name, capsys):
    """Of gamma 0.9 and rewards of 2 r + 1: computed here by hand, step by step."""
    agent = trained(name, env_id="auto", reward_scale=2, reward_shift=1, gamma=0.9)
    capsys.readouterr()
    assert policy.main(["values", name, "--episodes", "2"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    number = r"-?\d+\.\d\d"
    found = [re.findall(number, line) for line in lines]
    assert [line.split(":")[0] for line in lines] == ["seed 0", "seed 1", "2 seeds"]
    assert "2 episodes" in last and "Pendulum-v1" in last
    expected = torch.zeros(2, 2)
    for member, number in ((i, k) for i in range(2) for k in range(2)):
        env, steps, ended = gym.make("Pendulum-v1", max_episode_steps=20), 0, False
        obs = torch.tensor(env.reset(seed=agent.cfg.eval_seed + number)[0])
        while not ended:
            action = agent.act(obs.expand(2, 1, -1))
            if not steps:
                unit = (action / 2)[:, None] if name == "cql" else action / 2  # of -2 to 2
                q = agent.q(agent.critic, agent.normalize(obs).expand(2, 1, -1), unit)
                expected[member, 0] += q[member].mean().item() / 2
            obs, reward, *ends, _ = env.step(action[member, 0].numpy())
            expected[member, 1] += 0.9**steps * (2 * reward + 1) / 2
            obs, steps, ended = torch.tensor(obs), steps + 1, any(ends)
    for own, values in zip(found, [*expected, expected.mean(0)], strict=True):
        promised, earned, apart = map(float, own)
        assert [promised, earned] == pytest.approx(values.tolist(), abs=0.02)
        assert apart == pytest.approx(promised - earned, abs=0.02)


def test_what_is_earned_is_discounted_as_critics_are_by_then():
    script = load_script("spot")
    for online_gamma, last in ((0.0, 0.0), (0.995, 0.995), (None, 0.9)):
        cfg = script.TrainConfig(gamma=0.9, online_gamma=online_gamma, num_updates=5)
        assert [policy.discount(cfg, {"step": n}) for n in (5, 6)] == [0.9, last]
    assert policy.discount(load_script("iql").TrainConfig(num_updates=5), {"step": 6}) == 0.99


def test_what_has_no_critic_is_told_so(refused):
    trained("bc", env_id="auto")
    refused(policy, ["values", "bc", "--episodes", "1"], "bc.py has no Q(s, a)")


# ---- bad input


def test_bad_input_is_one_line(refused, monkeypatch):
    trained("iql")
    Path("taken.pt2").mkdir()
    saved = torch.load("iql/checkpoint.pt")
    changes = {
        "path": {"about": {**saved["about"], "script": "../algorithms/iql"}},
        "outside": {"about": {**saved["about"], "script": "os"}},
        "list": {"about": {**saved["about"], "script": ["iql"]}},
        "algorithm": {"about": {**saved["about"], "algorithm": "Run"}},
        "word": {"about": {**saved["about"], "algorithm": "SCRIPT"}},
        "other": {"about": {**saved["about"], "script": "bc", "algorithm": "BC"}},
        "size": {"config": {**saved["config"], "hidden_dim": 8}},
        "setting": {"config": {**saved["config"], "success_reward": 1}},
        "value": {"config": {**saved["config"], "gamma": 2}},
        "weights": {"agent": {"obs_mean": torch.zeros(3)}},
    }
    for name, change in changes.items():
        torch.save({**saved, **change}, f"{name}.pt")
        for command in (["evaluate", f"{name}.pt"], ["export", f"{name}.pt", "policy.pt2"]):
            refused(policy, command)
    Path("half.pt").write_bytes(Path("iql/checkpoint.pt").read_bytes()[:1000])
    refused(policy, [], "evaluate", "export")
    refused(policy, ["train", "iql"], "train")
    refused(policy, ["evaluate", "iql", "--episode", "3"], "--episode")
    refused(policy, ["evaluate", "nowhere"], "nowhere")
    refused(policy, ["evaluate", "half.pt"], "half.pt")
    refused(policy, ["evaluate", "iql"], "--env_id")
    refused(policy, ["evaluate", "iql", "--env_id", "Nothing-v0"], "Nothing-v0")
    refused(policy, ["evaluate", "iql", "--env_id", "CartPole-v1"], "CartPole-v1")
    refused(policy, ["evaluate", "iql", "--env_id", "auto", "--episodes", "0"], "--episodes")
    refused(policy, ["evaluate", "iql", "--env_id", "auto", "--episodes", "x"], "--episodes")
    refused(policy, ["evaluate", "iql", "--env_id", "auto", "--device", "tpu"], "--device tpu")
    refused(policy, ["export", "iql"], "FILE")
    refused(policy, ["export", "iql", "policy.pt"], "policy.pt", ".pt2", ".onnx")
    refused(policy, ["export", "iql", "policy"], "policy", ".pt2", ".onnx")
    refused(policy, ["export", "iql", "policy.pt2", "--member", "2"], "--member", "[0, 1]")
    refused(policy, ["export", "iql", "policy.pt2", "--member", "-1"], "--member")
    refused(policy, ["export", "iql", "nowhere/policy.pt2"], "nowhere/policy.pt2")
    refused(policy, ["export", "iql", "taken.pt2"], "taken.pt2")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: importlib.import_module("no_onnx"))
    refused(policy, ["export", "iql", "policy.onnx"], "pip install onnx onnxscript")
