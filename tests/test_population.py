"""Laws that hold for every script: seeds as a tensor axis, optimizers, targets, devices, compiling.

A short run on the toy data is recorded (what its agent is made of, what `update` is given); the
laws are then tried on agents made anew from the record, so no test knows an algorithm.
"""

import copy
import dataclasses
import inspect
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, load_script, words
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SEEDS = 3
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# Set where a script has the field, so that more of it runs: dropout draws noise, a large tau shows.
THOROUGH = {"actor_dropout": 0.3, "normalize_obs": "true", "tau": 0.1}
# Phases that a short run reaches, a learned multiplier, a small network beside hidden_dim's.
THOROUGH |= {"behavior_updates": 1, "warm_start": 2, "learn_alpha": "true", "vae_hidden_dim": 16}
METRIC = re.compile(r"(train|eval|time|online)/[a-z0-9_]+")


def agent_of(script) -> type:
    """The script's agent: its one class with an `update` and the frame's `Agent` as base."""
    classes = [c for c in vars(script).values() if inspect.isclass(c)]
    (found,) = [c for c in classes if issubclass(c, script.Agent) and c is not script.Agent]
    return found


def fields_of(script) -> set[str]:
    return {spec.name for spec in dataclasses.fields(script.TrainConfig)}


def train(script, run_dir: str, **settings) -> Path:
    """A short run without evaluation, unless `settings` want one."""
    more = {name: value for name, value in THOROUGH.items() if name in fields_of(script)}
    argv = words(**{"run_dir": run_dir, "env_id": "none", "compile": "false", **more, **settings})
    assert script.main(argv) == 0
    return Path(run_dir)


class Record:
    """A short run: its script, folder, agent, a maker of equal new ones, arguments of updates."""

    def __init__(self, script):
        self.script, self.calls, self.names = script, [], set()

    def new(self):
        return type(self.agent)(*copy.deepcopy(self.args))


def record(script, monkeypatch, run_dir: str = "recorded", **settings) -> Record:
    """Train, and keep what the agent was given."""
    agent_class, kept = agent_of(script), Record(script)

    def init(self, *args):
        kept.agent, kept.args = self, copy.deepcopy(args)
        original_init(self, *args)

    def update(self, *args):
        kept.calls.append(pytree.tree_map_only(torch.Tensor, torch.clone, args))
        metrics = original_update(self, *args)
        kept.names |= metrics.keys()
        return metrics

    original_init, original_update = agent_class.__init__, agent_class.update
    with monkeypatch.context() as patch:
        patch.setattr(agent_class, "__init__", init)
        patch.setattr(agent_class, "update", update)
        kept.folder = train(script, run_dir, **{"num_seeds": SEEDS, **settings})
    assert kept.calls
    return kept


@pytest.fixture
def recorded(script, monkeypatch):
    return record(script, monkeypatch)


def update_all(agent, calls) -> list[dict]:
    """The recorded updates, each on copies of its arguments."""
    return [agent.update(*pytree.tree_map_only(torch.Tensor, torch.clone, args)) for args in calls]


def of_members(tensors: dict) -> dict:
    """Tensors [S*E, ...] as [S, E, ...]; the scaler belongs to the data, not to a member."""
    own = {name: x for name, x in tensors.items() if not name.startswith("scaler.") and x.dim()}
    return {name: x.detach().unflatten(0, (SEEDS, -1)) for name, x in own.items()}


def everything(agent) -> dict:
    """All that training changes: weights, targets and the optimizers' state."""
    tensors = dict(agent.state_dict())
    for name, optimizer in vars(agent).items():
        if isinstance(optimizer, torch.optim.Optimizer):
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                for key, value in optimizer.state[p].items():
                    tensors[f"{name}.{i}.{key}"] = value
    return tensors


def saved_tensors(folder: Path) -> dict:
    """Every tensor of a checkpoint, named by its path."""
    saved = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    leaves = pytree.tree_flatten_with_path(saved)[0]
    return {pytree.keystr(path): x for path, x in leaves if isinstance(x, torch.Tensor)}


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


# ---- the two laws


@pytest.mark.parametrize("change", ["batch and noise", "weights", "not a number"])
def test_no_cross_talk(recorded, change):
    """What happens to member 1 changes nothing of members 0 and 2, to the bit."""
    plain, changed = recorded.new(), recorded.new()
    calls = copy.deepcopy(recorded.calls)
    g = torch.Generator().manual_seed(0)
    for batch, noise, *_ in calls if change != "weights" else ():
        for name, values in {**batch, **noise}.items():
            if name == "terminated":
                values[1] = 1 - values[1]
            elif change == "not a number" and name in batch and values.is_floating_point():
                values[1] = math.nan
            elif values.is_floating_point():
                values[1] = torch.rand(values[1].shape, generator=g)
    if change == "weights":
        for values in of_members(dict(changed.named_parameters())).values():
            values[1] += torch.rand(values[1].shape, generator=g)
    expected, found = update_all(plain, recorded.calls), update_all(changed, calls)
    for before, after in zip(expected, found, strict=True):
        for name in before:
            assert before[name].shape == (SEEDS,), f"metric {name} has no value per member"
            assert torch.equal(before[name][[0, 2]], after[name][[0, 2]]), name
        assert any(not torch.equal(before[name][1], after[name][1]) for name in before)
    expected, found = of_members(everything(plain)), of_members(everything(changed))
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name][[0, 2]], found[name][[0, 2]]), name
    assert any(not torch.equal(expected[name][1], found[name][1]) for name in expected)


def test_alone_or_together(script, monkeypatch):
    """Member k of a population is the solo run of its seed: start, weights, logs, evaluation."""
    run = {"num_updates": 40, "env_id": "auto", "eval_every": 20, "log_every": 10}
    together = record(script, monkeypatch, "together", seed=5, **run)
    start, end = of_members(everything(together.new())), of_members(everything(together.agent))
    for k in range(SEEDS):
        alone = record(script, monkeypatch, f"alone{k}", seed=5 + k, num_seeds=1, **run)
        for ours, theirs in zip(together.calls, alone.calls, strict=True):
            for name in (ours[0] | ours[1]).keys():
                member_, solo = (args[0].get(name, args[1].get(name)) for args in (ours, theirs))
                assert torch.equal(member_[k], solo[0]), f"{name} is drawn differently"
        solo_start, solo_end = everything(alone.new()), everything(alone.agent)
        for name in start:
            assert torch.equal(start[name][k], solo_start[name]), f"{name} starts differently"
        for name in end:
            close(end[name][k], solo_end[name], name)
        for file in ("metrics.jsonl", "episodes.jsonl"):
            ours = [row for row in rows("together", file) if row["seed"] == 5 + k]
            theirs = rows(f"alone{k}", file)
            assert len(ours) == len(theirs) > 0
            for a, b in zip(ours, theirs, strict=True):
                a, b = ({n: x for n, x in row.items() if n[:5] != "time/"} for row in (a, b))
                assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def close(actual, expected, what: str, rtol: float = 1e-4) -> None:
    """Equal relative to the tensor's largest entry: small ones carry the sums' rounding."""
    scale = max(float(expected.abs().max()), 1e-8)
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=rtol * scale, msg=lambda text: f"{what}: {text}"
    )


def test_members_differ(recorded):
    """Every weight matrix, and all that is drawn, differs between members and within ensembles."""
    for agent in (recorded.new(), recorded.agent):
        for name, p in agent.named_parameters():
            if p.dim() == 3 and p.shape[1] > 1:  # not biases and constants
                rows_of = p.detach().flatten(1)
                assert len(torch.unique(rows_of, dim=0)) == len(rows_of), name
    for batch, noise, *_ in recorded.calls:
        for values in (batch["obs"], *noise.values()):
            assert not any(torch.equal(values[i], values[i - 1]) for i in range(SEEDS))
    drawn = [args[0]["obs"] for args in recorded.calls]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(drawn))


def test_runs_repeat_to_the_bit(script):
    first, second = (train(script, name, env_id="auto", num_seeds=2) for name in ("one", "two"))
    ours, theirs = saved_tensors(first), saved_tensors(second)
    assert ours.keys() == theirs.keys() and any("exp_avg" in name for name in ours)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    for file in ("metrics.jsonl", "episodes.jsonl"):
        for a, b in zip(rows(first, file), rows(second, file), strict=True):
            assert {n: x for n, x in a.items() if n[:5] != "time/"} == {
                n: x for n, x in b.items() if n[:5] != "time/"
            }


def test_metrics_are_finite_and_named_well(recorded, script):
    found = set()
    for row in rows(recorded.folder, "metrics.jsonl"):
        for name, value in row.items():
            assert name in ("update", "seed", "final") or METRIC.fullmatch(name), name
            assert math.isfinite(value), name
            found.add(name)
    logged = {f"train/{name}" for name in recorded.names}
    assert logged <= found
    missing = [name for name in logged if f"`{name}`" not in script.__doc__]
    assert not missing, f"the docstring does not say what these metrics mean: {missing}"


# ---- layers


def test_layers_start_within_one_over_the_root_of_fan_in(script):
    """Also in ensembles, and for each of their networks: the bound is not that of fan-out."""
    for in_dim, out_dim in ((200, 4), (4, 200)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
        layer, bound = script.Linear(generators, in_dim, out_dim, ensemble=2), in_dim**-0.5
        assert layer.weight.shape == (SEEDS * 2, in_dim, out_dim)
        assert layer.bias.shape == (SEEDS * 2, 1, out_dim)
        for weight in layer.weight.detach():
            assert 0.98 * bound < weight.abs().max() <= bound
            assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
            assert abs(weight.mean()) < 0.1 * bound
        for bias in layer.bias.detach():
            assert 0.1 * bound < bias.abs().max() <= bound
        alone = script.Linear([torch.Generator().manual_seed(2)], in_dim, out_dim, ensemble=2)
        assert torch.equal(alone.weight, layer.weight[4:])
        x = torch.randn(SEEDS * 2, 7, in_dim)
        for i, y in enumerate(layer(x)):
            torch.testing.assert_close(y, x[i] @ layer.weight[i] + layer.bias[i, 0])


def test_an_agents_layers_keep_that_bound(recorded, script):
    layers = [m for m in recorded.new().modules() if isinstance(m, script.Linear)]
    assert layers
    for layer in layers:
        bound = layer.weight.shape[1] ** -0.5
        assert layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound


# ---- optimizers and targets


def targets_of(agent) -> dict:
    """Target module -> the module it follows: `target_critic` follows `critic`."""
    modules = dict(agent.named_children())
    return {m: modules[n.removeprefix("target_")] for n, m in modules.items() if "target_" in n}


def check_optimizers(agent, script) -> None:
    optimizers = script.optimizers_of(agent).values()
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    names = {id(p): name for name, p in agent.named_parameters()}
    assert all(id(p) in names for p in held), "an optimizer moves what is not the agent's"
    for name, p in agent.named_parameters():
        times = sum(p is other for other in held)
        assert times == (1 if p.requires_grad else 0), f"{name} is in {times} optimizers"
    for target, online in targets_of(agent).items():
        assert not any(p.requires_grad for p in target.parameters())
        memory = {p.data_ptr() for p in target.parameters()}
        assert memory.isdisjoint(p.data_ptr() for p in online.parameters())


def test_optimizers_hold_each_parameter_once_and_no_target(recorded, script, monkeypatch):
    check_optimizers(recorded.new(), script)
    check_optimizers(recorded.agent, script)
    for p in [p for target in targets_of(recorded.agent) for p in target.parameters()]:
        assert p.grad is None
    for name, p in recorded.agent.named_parameters():
        moved = not torch.equal(p, dict(recorded.new().named_parameters())[name])
        assert moved, f"{name} never moved"
    # A new run from the checkpoint, and the same run after an interruption.
    again = record(script, monkeypatch, "again", checkpoint="recorded", num_updates=2)
    check_optimizers(again.agent, script)
    resumed = interrupted(script, monkeypatch)
    check_optimizers(resumed.agent, script)
    assert len(resumed.calls) == 3
    for a, b in zip(
        everything(resumed.agent).values(), everything(recorded.agent).values(), strict=True
    ):
        assert torch.equal(a, b)


def interrupted(script, monkeypatch) -> Record:
    """The recorded run again, stopped at update 3 and resumed."""
    save, count = script.Run.save, []

    def stop_after_saving(run):
        save(run)
        count.append(run.step)
        raise KeyboardInterrupt

    more = {name: value for name, value in THOROUGH.items() if name in fields_of(script)}
    argv = words(run_dir="cut", env_id="none", compile="false", num_seeds=SEEDS, **more)
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "save", stop_after_saving)
        assert script.main(argv) == 130
    assert count == [3]
    return record(script, monkeypatch, "cut", resume="true")


def test_targets_move_by_tau_towards_the_new_weights(recorded, script):
    agent = recorded.new()
    targets = targets_of(agent)
    assert bool(targets) == ("tau" in fields_of(script))
    for target in targets:
        for p in target.parameters():
            p.data.add_(torch.rand_like(p))
    moves = 0
    for args in recorded.calls:
        before = [copy.deepcopy(target) for target in targets]
        agent.update(*args)
        for old, (target, online) in zip(before, targets.items(), strict=True):
            sides = (old.parameters(), target.parameters(), online.parameters())
            moved = [not torch.equal(a, b) for a, b, _ in zip(*sides, strict=True)]
            sides = (old.parameters(), target.parameters(), online.parameters())
            assert all(moved) or not any(moved), "only a part of a target moved"
            moves += any(moved)
            for was, now, new in zip(*sides, strict=True) if any(moved) else ():
                expected = was.double() + agent.cfg.tau * (new.double() - was.double())
                torch.testing.assert_close(now.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert moves or not targets


# ---- fresh process


FRESH = """
import importlib.util, sys, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("fresh", sys.argv[1])
script = sys.modules["fresh"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
evaluate = script.evaluate
def spy(agent, *rest):
    torch.save(agent.act(torch.load("obs.pt")), "action.pt")
    return evaluate(agent, *rest)
script.evaluate = spy
sys.exit(script.main(["--checkpoint", "saved", "--eval_only", "true"]))
"""


def test_a_saved_policy_acts_the_same_in_a_fresh_process(script, monkeypatch):
    """Through `--eval_only`: the same actions to the bit, and the same returns."""
    saved = record(script, monkeypatch, "saved", env_id="auto", num_updates=40)
    obs_std = saved.agent.scaler.obs_std
    assert not torch.equal(obs_std, torch.ones_like(obs_std)), "nothing would be normalised"
    g = torch.Generator().manual_seed(3)
    obs = 5 * torch.randn(SEEDS, 11, len(obs_std), generator=g)
    torch.save(obs, "obs.pt")
    argv = [sys.executable, "-c", FRESH, script.__file__]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    action = saved.agent.act(obs)
    assert action.abs().max() <= 2 and len(torch.unique(action)) > 10
    assert torch.equal(torch.load("action.pt"), action)
    for row in json.loads(Path("saved/result.json").read_text())["last"]:
        assert f"seed {row['seed']}: return {row['eval/return']:.1f}" in done.stdout


# ---- devices and compiling


class OneDevice(TorchDispatchMode):
    """Fails where an operation sees, makes or copies to a tensor outside of `device`, or waits."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select")

    def __init__(self, device: str):
        super().__init__()
        self.device, self.seen = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} makes the host wait for the device"
        result = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor):
                assert x.device.type == self.device, f"{name} with a tensor on {x.device}"
        self.seen += 1
        return result


def on_device(recorded, device: str):
    """An agent on another device. Adam on meta would ask a step counter for its value: SGD."""
    agent = recorded.new()
    old = {id(p): name for name, p in agent.named_parameters()}
    agent = agent.to(device)
    new = dict(agent.named_parameters())
    for name, optimizer in recorded.script.optimizers_of(agent).items():
        groups = [[new[old[id(p)]] for p in g["params"]] for g in optimizer.param_groups]
        setattr(agent, name, torch.optim.SGD([{"params": g} for g in groups], lr=0.1))
    return agent


def test_updates_stay_on_the_device(recorded):
    """On meta, where no value exists: nothing can be read by the host, nothing comes from it."""
    agent = on_device(recorded, "meta")
    calls = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), recorded.calls)
    obs = torch.empty(SEEDS, 4, len(agent.scaler.obs_mean), device="meta")
    with OneDevice("meta") as mode:
        for args in calls:
            metrics = agent.update(*args)
            for name, value in metrics.items():
                assert value.shape == (SEEDS,) and not value.requires_grad, name
        assert agent.act(obs).shape[:2] == (SEEDS, 4)
    assert mode.seen > 10


def test_weights_are_sliced_only_where_a_part_is_meant():
    """The gradient of a slice is a copy of the whole weight, which took a tenth of an update."""

    def slices(**call):
        seen, nodes = [], [mlp(torch.ones(2, 4, 3), **call).sum().grad_fn]
        while nodes:
            nodes += [node for node, _ in nodes[0].next_functions if node]
            seen.append(nodes.pop(0).name())
        return seen.count("SliceBackward0")

    iql = load_script("iql")
    generators = [iql.generator(seed, "init") for seed in range(2)]
    mlp = iql.MLP(generators, 3, [5, 5], 1, ensemble=2, layer_norm=True)
    assert slices() == 0 and slices(first=True) > 0


@pytest.mark.parametrize(
    "trap",
    [
        "x.sum().item()",
        "x + torch.ones(3)",
        "x + torch.tensor(1.0)",
        "float(x[0])",
        "bool(x.any())",
        "x[torch.tensor([0])]",
        "x[x > 0]",
        "x.cpu()",
        "x * torch.zeros(())",
    ],
)
def test_the_device_test_has_teeth(trap):
    x = torch.empty(3, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OneDevice("meta"):
        eval(trap, {"x": x, "torch": torch})


def same_compiled(script, monkeypatch, backend: str, device="cpu", wish="true") -> None:
    """20 updates, compiled as the frame does it: one graph for each variant of the update."""
    kept = record(script, monkeypatch, num_updates=20, num_seeds=SEEDS, device=device)
    eager, compiled = kept.new().to(device), kept.new().to(device)
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, **{**kw, "backend": backend}))
    cfg = dataclasses.replace(compiled.cfg, compile=wish)
    done = script.compile_update(compiled, cfg, torch.device(device), 20)
    assert done == (True if wish == "true" else wish)
    torch._dynamo.utils.counters.clear()
    found = update_all(compiled, kept.calls)
    told = [[x for x in variant if not torch.is_tensor(x)] for _, _, *variant in kept.calls]
    variants = set(map(tuple, told))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(variants)
    for ours, theirs in zip(found, update_all(eager, kept.calls), strict=True):
        for name in ours:
            close(ours[name], theirs[name], name)
    ours, theirs = everything(compiled), everything(eager)
    for name in theirs:
        close(ours[name], theirs[name], name)


def test_compiled_equals_eager(script, monkeypatch):
    same_compiled(script, monkeypatch, "aot_eager")


def compiler_works() -> bool:
    try:
        torch.compile(torch.sin)(torch.ones(2))
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in ("bc", "iql", "dt") if name in SCRIPTS])
def test_compiled_by_inductor_equals_eager(name, monkeypatch):
    """The slow one: `-k 'not inductor'` leaves it out."""
    if not compiler_works():
        pytest.skip("torch.compile finds no C++ compiler here")
    same_compiled(load_script(name), monkeypatch, "inductor")


@pytest.mark.parametrize("updates, chosen", [(19_999, "off"), (20_000, "on")])
def test_auto_says_what_it_chose(updates, chosen, capsys, monkeypatch):
    iql = load_script("iql")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    cfg = iql.TrainConfig()
    agent = iql.IQL(cfg, iql.Scaler(torch.zeros(3), torch.ones(3), -torch.ones(1), torch.ones(1)))
    assert iql.compile_update(agent, cfg, torch.device("cpu"), updates) == (chosen == "on")
    assert capsys.readouterr().out.splitlines() == [
        f"compile: auto is {chosen} (on from 20,000 updates, on cpu)"
    ]


@pytest.mark.parametrize("wish", ["auto", "true"])
def test_without_a_compiler_a_run_goes_on(wish, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    iql = load_script("iql")
    monkeypatch.setattr(torch, "compile", broken)
    cfg = iql.TrainConfig(compile=wish)
    agent = iql.IQL(cfg, iql.Scaler(torch.zeros(3), torch.ones(3), -torch.ones(1), torch.ones(1)))
    assert not iql.compile_update(agent, cfg, torch.device("cpu"), 100_000)
    assert "compile: not possible here (RuntimeError)" in capsys.readouterr().out


# ---- with a GPU


@cuda
def test_updates_are_equal_on_cuda(recorded):
    """To the CPU's, and without the host waiting for the GPU."""
    cpu, gpu = recorded.new(), recorded.new().to("cuda")
    calls = pytree.tree_map_only(torch.Tensor, lambda x: x.cuda(), recorded.calls)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with OneDevice("cuda"):
            found = [gpu.update(*args) for args in calls]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, update_all(cpu, recorded.calls), strict=True):
        for name in ours:
            close(ours[name].cpu(), theirs[name], name, 1e-3)


@cuda
@pytest.mark.parametrize("wish", ["true", "graphs"])
def test_compiled_equals_eager_on_cuda(script, monkeypatch, wish):
    same_compiled(script, monkeypatch, "inductor", "cuda", wish)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert not skipped, "it ran, but not as CUDA graphs"


@cuda
@pytest.mark.parametrize("members", [1, 4, 32])
def test_first_member_of_any_population_on_cuda(script, members, monkeypatch):
    run = {"device": "cuda", "num_updates": 20}
    kept = record(script, monkeypatch, "together", num_seeds=members, **run)
    alone = record(script, monkeypatch, "alone", num_seeds=1, **run)
    ours, theirs = everything(kept.agent), everything(alone.agent)
    for name in theirs:
        if not name.startswith("scaler.") and theirs[name].dim():
            close(ours[name][: len(theirs[name])], theirs[name], name, 1e-3)


@cuda
def test_a_run_on_cuda_goes_on_and_moves_to_the_cpu(script, monkeypatch):
    run = {"device": "cuda", "num_updates": 40, "checkpoint_every": 20, "env_id": "auto"}
    whole = record(script, monkeypatch, "whole", **run)
    update = script.Run.update

    def stop_at_30(self):
        if self.step == 30:
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "update", stop_at_30)
        more = {name: value for name, value in THOROUGH.items() if name in fields_of(script)}
        stopped = {"run_dir": "parts", "compile": "false", "num_seeds": SEEDS, **more, **run}
        assert script.main(words(**stopped)) == 130
    assert script.main(["--run_dir", "parts", "--resume", "true"]) == 0
    found, expected = saved_tensors("parts"), saved_tensors(whole.folder)
    for name in expected:
        close(found[name].float(), expected[name].float(), name, 1e-3)
    agent = whole.new()
    script.load_agent(agent, script.read_checkpoint("whole"))
    obs = torch.randn(SEEDS, 5, len(agent.scaler.obs_mean))
    close(whole.agent.act(obs.cuda()).cpu(), agent.act(obs), "actions", 1e-3)


@cuda
def test_updates_keep_no_memory_on_cuda(script, monkeypatch):
    kept = record(script, monkeypatch, device="cuda", num_updates=20)
    agent = kept.new().to("cuda")
    update_all(agent, kept.calls)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        update_all(agent, kept.calls)
    assert torch.cuda.memory_allocated() <= before
