"""Runs: resume, non-finite losses, checkpoints, wandb, evaluation, data, warm starts."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
import yaml
from conftest import (
    REPOSITORY,
    TOY,
    contents,
    load_script,
    toy_episode,
    toy_episodes,
    words,
    write_dataset,
)

# Update 20: amid a log interval (7), a chunk of random numbers (32) and evaluations (9).
LONG = {
    "num_updates": 40,
    "log_every": 7,
    "eval_every": 9,
    "checkpoint_every": 20,
    "num_seeds": 2,
    "seed": 5,
    "normalize_obs": "true",
}


class Crash(Exception):
    """A power cut: nothing of the script handles it."""


def long(script, **settings) -> list[str]:
    """The command line of a run that is to be interrupted; with dropout and phases if any."""
    more = {"actor_dropout": 0.3, "behavior_updates": 8, "warm_start": 16}
    more = {k: v for k, v in more.items() if k in script.TrainConfig.__dataclass_fields__}
    return words(**{**LONG, **more, **settings})


def agent_of(script) -> type:
    (agent_class,) = (c for c in vars(script).values() if c in script.Agent.__subclasses__())
    return agent_class


def before_update(monkeypatch, script, action) -> None:
    """Call action(agent, number) before every update; numbers count from 1 in this process."""
    agent_class, calls = agent_of(script), []
    update = agent_class.update

    def patched(self, batch, noise, *variant):
        calls.append(None)
        action(self, len(calls))
        return update(self, batch, noise, *variant)

    monkeypatch.setattr(agent_class, "update", patched)


def crash_at(monkeypatch, script, argv, number: int) -> None:
    def action(_, at):
        if at == number:
            raise Crash

    with monkeypatch.context() as patch:
        before_update(patch, script, action)
        with pytest.raises(Crash):
            script.main(argv)


def strict(line: str):
    """JSON as the standard has it: no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} in {line}")

    return json.loads(line, parse_constant=refuse)


def rows(path) -> list[dict]:
    """The rows of a log, without the times."""
    every = [strict(line) for line in Path(path).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in every]


def saved(folder) -> dict:
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def leaves(value, path=()):
    """(path, leaf) of nested dicts and lists; fails on anything that is no plain value."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from leaves(each, (*path, i))
    else:
        assert value is None or type(value) in (torch.Tensor, str, int, float, bool), path
        yield path, value


def assert_same_run(one, other) -> None:
    """Equal to the bit, apart from what a clock says."""
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert rows(Path(one, name)) == rows(Path(other, name)), name
    assert Path(one, "config.yaml").read_bytes() == Path(other, "config.yaml").read_bytes()
    first, second = dict(leaves(saved(one))), dict(leaves(saved(other)))
    assert first.keys() == second.keys()
    for path in first.keys() - {("seconds",)}:
        if isinstance(first[path], torch.Tensor):
            assert first[path].dtype == second[path].dtype
            assert torch.equal(first[path], second[path]), path
        else:
            assert first[path] == second[path], path
    results = [json.loads(Path(folder, "result.json").read_text()) for folder in (one, other)]
    for result in results:
        del result["seconds"]
        for row in result["last"] + result["best_oracle"]:
            del row["time/evaluation_seconds"]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> dict:
    return {"": tmp_path_factory.mktemp("whole")}


@pytest.fixture
def whole(script, whole_runs) -> Path:
    """The folder of the uninterrupted run of this script, made once."""
    folder = whole_runs[""] / script.__name__
    if script not in whole_runs:
        assert script.main(long(script, run_dir=folder)) == 0
        whole_runs[script] = contents(folder)
    assert contents(folder) == whole_runs[script]
    return folder


RESUME = ["--run_dir", "run", "--resume", "true"]

# ---- resume


def test_resume_after_a_crash(script, whole, monkeypatch):
    crash_at(monkeypatch, script, long(script), 23)
    assert saved("run")["step"] == 20
    assert rows("run/metrics.jsonl")[-1]["update"] == 21  # past the checkpoint
    for name in ("metrics.jsonl", "episodes.jsonl"):  # cut off while they were written
        with open(Path("run", name), "a") as file:
            file.write('{"update": 18, "seed": 5, "ret')
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def test_resume_with_the_whole_command_line(script, whole, monkeypatch):
    crash_at(monkeypatch, script, long(script), 39)
    assert script.main(long(script, resume="true")) == 0
    assert_same_run("run", whole)


@pytest.mark.parametrize(
    "number, at",
    [(signal.SIGINT, 1), (signal.SIGTERM, 16), (signal.SIGINT, 33), (signal.SIGINT, 40)],
)
def test_resume_after_a_signal(script, whole, monkeypatch, capsys, number, at):
    def action(_, n):
        if n == at:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        before_update(patch, script, action)
        assert script.main(long(script)) == 130
    lines = capsys.readouterr().err.strip().splitlines()
    assert f"update {at}" in lines[-1] and lines[-1].endswith("--run_dir run --resume true")
    assert signal.getsignal(number) == handler
    assert saved("run")["step"] == at
    assert not Path("run/result.json").exists()
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def failing_evaluation(monkeypatch, script, number: int) -> None:
    """Evaluation `number` of this process breaks off."""
    evaluate, calls = script.evaluate, []

    def fails(*args):
        calls.append(None)
        if len(calls) == number:
            raise script.RunError("a wheel came off", 1)
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", fails)


@pytest.mark.parametrize("number, at", [(2, 18), (5, 40)])
def test_an_evaluation_that_failed_is_made_up_for(script, whole, monkeypatch, capsys, number, at):
    """Nothing before it is lost, however rare checkpoints are; the last one is the final one."""
    with monkeypatch.context() as patch:
        failing_evaluation(patch, script, number)
        assert script.main(long(script)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: a wheel came off at update {at}: run keeps all before it")
    assert saved("run")["step"] == at
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def test_the_choice_to_compile_stands(iql, monkeypatch):
    crash_at(monkeypatch, iql, long(iql, compile="auto"), 23)
    about = json.loads(Path("run/environment.json").read_bytes())
    assert about["compile"] is False
    Path("run/environment.json").write_text(json.dumps({**about, "compile": True}))
    seen = []
    monkeypatch.setattr(iql, "compile_update", lambda _, cfg, *__: seen.append(cfg.compile))
    assert iql.main(RESUME) == 0 and seen == ["true"]


def test_interrupted_twice(script, whole, monkeypatch):
    crash_at(monkeypatch, script, long(script), 22)
    crash_at(monkeypatch, script, RESUME, 15)  # no further checkpoint: from 20 again
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def test_resume_after_the_last_update(script, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "finish", lambda _: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            script.main(long(script))
    assert saved("run")["step"] == 40
    assert rows("run/episodes.jsonl") == rows(whole / "episodes.jsonl")
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def test_resume_before_the_first_checkpoint(script, whole, monkeypatch):
    crash_at(monkeypatch, script, long(script), 12)
    assert rows("run/metrics.jsonl") and not Path("run/checkpoint.pt").exists()
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def test_resume_where_nothing_is_starts_a_run(script, whole):
    assert script.main(long(script, resume="true")) == 0
    assert_same_run("run", whole)


def test_a_finished_run_prints_its_result_and_changes_nothing(script, monkeypatch, capsys):
    assert script.main(long(script)) == 0
    shown = capsys.readouterr().out.splitlines()[-3:]
    assert shown[0].startswith("seed 5: return") and shown[1].startswith("seed 6: return")
    before = contents()
    before_update(monkeypatch, script, lambda *_: pytest.fail("it trains"))
    for argv in (RESUME, long(script), long(script, resume="true")):
        assert script.main(argv) == 0
        assert capsys.readouterr().out.splitlines()[-3:] == shown
        assert contents() == before


@pytest.mark.parametrize(
    "name, value", [("batch_size", 9), ("seed", 6), ("num_updates", 50), ("normalize_obs", "false")]
)
def test_a_changed_field_on_resume(script, refused, monkeypatch, name, value):
    crash_at(monkeypatch, script, long(script), 23)
    refused(script, [*RESUME, f"--{name}", str(value)], name, "run")
    refused(script, long(script, **{"resume": "true", name: value}), name, "run")


def test_other_data_on_resume(iql, refused, monkeypatch):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    crash_at(monkeypatch, iql, long(iql, dataset_id="store/own-v0"), 23)
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        file["episode_1/rewards"][3] += 1
    refused(iql, RESUME, "store/own-v0", "new run")


def test_optimizers_after_a_resume(script, monkeypatch):
    crash_at(monkeypatch, script, long(script), 23)
    seen = []

    def look(agent, number):
        optimizers, counts = script.optimizers_of(agent), []
        for name, optimizer in optimizers.items():
            assert all(group["fused"] for group in optimizer.param_groups), name
            steps = [int(state["step"]) for state in optimizer.state.values()]
            assert len(set(steps)) == 1, name
            counts.append(steps[0])
        first = getattr(agent.cfg, "behavior_updates", 0)  # then all other optimizers move
        assert max(counts) == 19 + number - first  # a delayed policy has moved less often
        seen.append({name: o.param_groups[0]["lr"] for name, o in optimizers.items()})

    before_update(monkeypatch, script, look)
    assert script.main(RESUME) == 0
    assert len(seen) == 20
    if "cosine_actor_lr" in script.TrainConfig.__dataclass_fields__:
        rates = [3e-4 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(20, 40)]
        assert [each["actor_optimizer"] for each in seen] == pytest.approx(rates)
        assert all(each["critic_optimizer"] == 3e-4 for each in seen)


def test_ctrl_c_in_a_process_of_its_own(iql):
    """The real thing: SIGINT to a process; it leaves a checkpoint and says how to go on."""
    rarely = dict.fromkeys(("num_updates", "eval_every", "checkpoint_every"), 10**6)
    argv = words(log_every=10, compile="false", **rarely)
    command = [sys.executable, iql.__file__, *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(1200):
            if Path("run/metrics.jsonl").is_file() and Path("run/metrics.jsonl").stat().st_size:
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.endswith(f"python {iql.__file__} --run_dir run --resume true")
    assert f"stopped at update {saved('run')['step']}," in line
    assert not Path("run/result.json").exists()


# ---- non-finite losses and weights


def spoil(monkeypatch, script, number: int, member: int) -> None:
    """The first metric of update `number` is NaN for one member."""
    agent_class, calls = agent_of(script), []
    update = agent_class.update

    def patched(self, batch, noise, *variant):
        metrics = update(self, batch, noise, *variant)
        calls.append(None)
        if len(calls) == number:
            next(iter(metrics.values()))[member] = math.nan
        return metrics

    monkeypatch.setattr(agent_class, "update", patched)


@pytest.mark.parametrize("number, good", [(1, None), (6, None), (7, None), (22, 20), (40, 20)])
def test_a_loss_that_is_not_finite(script, whole, monkeypatch, capsys, number, good):
    with monkeypatch.context() as patch:
        spoil(patch, script, number, member=1)
        assert script.main(long(script)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and f"update {number}, seed 6;" in line
    assert "_loss" in line and "run" in line
    assert not Path("run/result.json").exists()
    assert (saved("run")["step"] if Path("run/checkpoint.pt").exists() else None) == good
    for name in ("metrics.jsonl", "episodes.jsonl"):
        rows(Path("run", name))  # every row is valid JSON
    assert script.main(RESUME) == 0
    assert_same_run("run", whole)


def test_nan_after_a_checkpoint_in_the_same_log_interval(iql, monkeypatch, capsys):
    spoil(monkeypatch, iql, 6, member=0)
    assert iql.main(words(num_updates=20, log_every=20, checkpoint_every=4, eval_every=99)) == 1
    assert "update 6, seed 0;" in capsys.readouterr().err
    assert saved("run")["step"] == 4


def test_a_weight_that_is_not_finite(script, monkeypatch, capsys):
    def action(agent, number):
        if number == 6:  # the losses of the last update are still finite without this weight
            agent.register_buffer("extra", torch.tensor([math.inf]))

    before_update(monkeypatch, script, action)
    assert script.main(words()) == 1
    assert "not finite at update 6;" in capsys.readouterr().err
    assert saved("run")["step"] == 3 and "extra" not in saved("run")["agent"]


def test_a_policy_of_nan_is_not_evaluated(iql, monkeypatch, capsys):
    def action(agent, number):
        if number == 3:
            with torch.no_grad():
                next(agent.actor.parameters())[0] = math.nan

    before_update(monkeypatch, iql, action)
    assert iql.main(words(num_updates=20, log_every=20, checkpoint_every=20)) == 1
    assert "update 3, seed 0;" in capsys.readouterr().err
    assert rows("run/episodes.jsonl") == []


# ---- what is saved


def test_a_checkpoint_holds_tensors_and_plain_values(script):
    assert script.main(long(script)) == 0
    content = saved("run")
    found = dict(leaves(content))  # fails on anything else
    assert content["step"] == 40
    assert content["config"] == yaml.safe_load(Path("run/config.yaml").read_text())
    assert ("agent", "scaler.obs_mean") in found
    about = json.loads(Path("run/environment.json").read_text())
    assert about["fingerprint"] == content["fingerprint"]
    assert not [name for name in contents() if name.endswith(".part")]


def test_a_checkpoint_is_replaced_as_a_whole(iql, monkeypatch):
    """A crash in the middle of writing leaves the old checkpoint."""
    replaced, real = [], Path.replace

    def replace(self, target):
        if Path(target).name == "checkpoint.pt":
            replaced.append(target)
            if len(replaced) == 2:
                raise Crash
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Crash):
        iql.main(words())
    assert saved("run")["step"] == 3


def test_logs_have_one_row_for_each_update_and_seed(script):
    assert script.main(long(script)) == 0
    metrics, episodes = rows("run/metrics.jsonl"), rows("run/episodes.jsonl")
    train = [r for r in metrics if "eval/return" not in r]
    assert [(r["update"], r["seed"]) for r in train] == [
        (u, s) for u in (7, 14, 21, 28, 35, 40) for s in (5, 6)
    ]
    evaluated = [(r["update"], r["seed"], r["final"]) for r in metrics if "eval/return" in r]
    assert evaluated == [(u, s, u == 40) for u in (9, 18, 27, 36, 40) for s in (5, 6)]
    assert len(episodes) == 2 * (4 * 2 + 3)
    for row in metrics:
        own = [r for r in episodes if (r["update"], r["seed"]) == (row["update"], row["seed"])]
        if "eval/return" in row:
            assert row["eval/return"] == pytest.approx(np.mean([r["return"] for r in own]))
            assert row["eval/score"] == pytest.approx(np.mean([r["score"] for r in own]))


def test_logged_metrics_are_means_over_their_interval(script, monkeypatch):
    agent_class, seen = agent_of(script), []
    update = agent_class.update

    def patched(self, batch, noise, *variant):
        seen.append({k: v.numpy().copy() for k, v in update(self, batch, noise, *variant).items()})
        return {k: torch.as_tensor(v) for k, v in seen[-1].items()}

    monkeypatch.setattr(agent_class, "update", patched)
    assert script.main(long(script, eval_episodes=0, final_eval_episodes=0)) == 0
    start = 0
    for row in rows("run/metrics.jsonl"):
        interval = seen[start : row["update"]]
        for name in {name for each in interval for name in each}:  # some stand in some updates only
            values = [each[name][row["seed"] - 5] for each in interval if name in each]
            assert row[f"train/{name}"] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-7)
        if row["seed"] == 6:
            start = row["update"]


def test_the_result_has_the_last_policy_and_the_best_apart(iql):
    assert iql.main(long(iql)) == 0
    result = json.loads(Path("run/result.json").read_text())
    evaluations = [r for r in rows("run/metrics.jsonl") if "eval/return" in r]
    for member, seed in enumerate((5, 6)):
        own = [r for r in evaluations if r["seed"] == seed]
        assert result["last"][member]["eval/return"] == own[-1]["eval/return"]
        best = max(r["eval/return"] for r in own)
        assert result["best_oracle"][member]["eval/return"] == best


# ---- wandb


def clean_environment() -> dict:
    """No login, no home, and no way out."""
    dropped = ("WANDB", "NETRC", "HTTP", "HTTPS", "ALL_PROXY", "NO_PROXY", "PYTEST")
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(dropped)}
    dead = "http://127.0.0.1:9"
    return {**kept, "HOME": os.getcwd(), "HTTP_PROXY": dead, "HTTPS_PROXY": dead}


def test_wandb_offline_needs_no_login_and_no_network(iql):
    pytest.importorskip("wandb")
    argv = words(wandb="offline", eval_episodes=0, final_eval_episodes=0)
    done = subprocess.run(
        [sys.executable, iql.__file__, *argv],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(Path("run").glob("wandb/offline-run-*/*.wandb"))


def test_wandb_keeps_its_page_on_resume(iql, monkeypatch):
    """Against a stand-in that records what it is told."""
    inits, logged = [], []
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda v, step: logged.append((step, v)), finish=lambda: None)
    fake.init = lambda **settings: inits.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    crash_at(monkeypatch, iql, long(iql, wandb="offline"), 20)
    assert iql.main([*RESUME, "--wandb", "online"]) == 0
    assert [each["mode"] for each in inits] == ["offline", "online"]
    assert inits[0]["id"] == inits[1]["id"] and inits[1]["resume"] == "allow"
    assert all(Path(each["dir"]) == Path("run") for each in inits)
    metrics = rows("run/metrics.jsonl")
    for step, values in logged:
        own = [row for row in metrics if row["update"] == step]
        for name, value in values.items():
            if name.startswith("train/") and "/seed" not in name:
                each = [row[name] for row in own if name in row]
                assert len(each) == 2 and value == pytest.approx(np.mean(each), rel=1e-6)
    assert {step for step, _ in logged} == {row["update"] for row in metrics}


FRESH = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("script", sys.argv.pop(1))
sys.modules["script"] = script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
assert script.main(sys.argv.pop(1).split("|")) == 0
script.report = lambda result, _: open("fresh.json", "w").write(json.dumps(result["last"]))
assert script.main(sys.argv[1:]) == 0
assert "wandb" not in sys.modules
"""


def test_a_fresh_process_evaluates_alike_and_imports_no_wandb(iql):
    assert iql.main(long(iql)) == 0
    first = "|".join(words(run_dir="other", wandb="disabled"))
    argv = [iql.__file__, first, "--checkpoint", "run", "--eval_only", "true"]
    before = contents("run")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *argv],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(Path("run/result.json").read_text())["last"]
    for row, again in zip(last, json.loads(Path("fresh.json").read_text()), strict=True):
        names = ("seed", "eval/return", "eval/score", "eval/length")
        assert {k: row[k] for k in names} == {k: again[k] for k in names}
    assert contents("run") == before


# ---- evaluation


class Ends(gym.Env):
    """Episodes of 1 to 7 steps, by seed; an action counts; playing on after the end fails."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
    seeds = ()

    def look(self):
        return np.array([math.sin(self.start), self.time, self.state])

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        self.start, self.time, self.state, self.over = seed, 0, 0.0, False
        Ends.seeds = (*Ends.seeds, seed)
        return self.look(), {}

    def step(self, action):
        assert not self.over, "stepped after the end"
        assert action.shape == (1,) and action.dtype == np.float32 and abs(action[0]) <= 2
        self.time, self.state = self.time + 1, self.state + float(action[0])
        ended = self.time == 1 + self.start % 7
        self.over = ended
        by_time = ended and self.start % 2 == 1
        return self.look(), self.state + self.start, ended and not by_time, by_time, {}


gym.register("Ends-v0", Ends, disable_env_checker=True)


def plain_loop(agent, env, eval_seed: int, episodes: int, member: int) -> list[tuple]:
    """The reference: one episode after the other, one environment, one observation at a time."""
    found = []
    for i in range(episodes):
        obs, total, length, over = env.reset(seed=eval_seed + i)[0], 0.0, 0, False
        while not over:
            batch = torch.as_tensor(obs, dtype=torch.float32).expand(len(agent), 1, -1)
            action = agent.module.act(batch)[member, 0].numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, over = total + reward, length + 1, terminated or truncated
        found.append((total, length))
    return found


class Population:
    """The agent of a checkpoint."""

    def __init__(self, script, folder):
        content = saved(folder)
        cfg = script.parse_config(script.TrainConfig, ["--config", f"{folder}/config.yaml"])
        scaler = script.Scaler(torch.zeros(3), torch.ones(3), -torch.ones(1), torch.ones(1))
        self.module = agent_of(script)(cfg, scaler)
        self.module.load_state_dict(content["agent"])
        self.seeds = cfg.num_seeds

    def __len__(self):
        return self.seeds


@pytest.mark.parametrize(
    "seeds, env_id", [(1, "auto"), (3, "auto"), (3, "Ends-v0"), (22, "Ends-v0")]
)
def test_evaluation_equals_a_plain_loop(script, seeds, env_id):
    """With 22 members two episodes of each fit into a wave of 64."""
    if "context" in script.TrainConfig.__dataclass_fields__:
        pytest.skip("acts by the whole history: such scripts have their own plain loop")
    Ends.seeds = ()
    argv = words(
        num_seeds=seeds,
        seed=7,
        env_id=env_id,
        eval_seed=123,
        final_eval_episodes=5,
        eval_episodes=0,
        normalize_obs="true",
        hidden_dim=4,
        env_kwargs="{g: 9.0}" if env_id == "auto" else "{}",
    )
    assert script.main(argv) == 0
    if env_id == "Ends-v0":
        assert {s for s in Ends.seeds if s} == {123, 124, 125, 126, 127}
    agent = Population(script, "run")
    spec = minari.load_dataset(TOY).spec.env_spec
    env = gym.make(spec, g=9.0) if env_id == "auto" else gym.make(env_id)
    episodes = rows("run/episodes.jsonl")
    assert [(r["seed"], r["episode"]) for r in episodes] == [
        (s, i) for s in range(7, 7 + seeds) for i in range(5)
    ]
    for member in {0, seeds - 1}:
        played = [r for r in episodes if r["seed"] == 7 + member]
        expected = plain_loop(agent, env, 123, 5, member)
        assert [r["length"] for r in played] == [length for _, length in expected]
        returns = np.array([r["return"] for r in played])
        np.testing.assert_allclose(returns, [value for value, _ in expected], rtol=1e-4, atol=1e-4)
        assert len(set(returns)) == 5
        if env_id == "auto":
            scores = 100 * (returns + 160) / (-20 + 160)
            np.testing.assert_allclose([r["score"] for r in played], scores)
        else:
            assert {r["score"] for r in played} == {None}


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


forks = pytest.mark.skipif(sys.platform != "linux", reason="other systems play in one process")


@forks
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("name", ["iql", "dt"])
def test_processes_play_the_same_episodes(name):
    """Episodes of different lengths, in waves of different sizes."""
    script = load_script(name)
    settings = {"env_id": "Ends-v0", "num_seeds": 3, "eval_episodes": 2, "final_eval_episodes": 23}
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert script.main(words(run_dir=f"run{threads}", **settings)) == 0
        found.append(rows(f"run{threads}/episodes.jsonl"))
    assert len({row["length"] for row in found[0]}) > 3
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys() and one["length"] == other["length"]
        assert one["return"] == pytest.approx(other["return"], rel=1e-5)


@forks
@pytest.mark.usefixtures("three_threads")
def test_shares_of_the_processes(iql):
    """Four copies or more for each; those that rest are left alone."""
    environment = iql.Environment(gym.spec("Ends-v0"), {}, (None, None))
    assert environment.processes == 3
    for count, processes in ((3, 1), (8, 2), (12, 3), (64, 3), (8, 2)):
        starts = environment.play(list(range(100, 100 + count)))
        expected = [gym.make("Ends-v0").reset(seed=100 + i)[0] for i in range(count)]
        expected = list(map(iql.flatten_obs, expected))
        assert all(np.array_equal(obs, e) for (obs, *_), e in zip(starts, expected, strict=True))
        assert len(environment.workers) >= processes - 1
        tasks = [np.zeros(1, np.float32) if i % 2 else None for i in range(count)]
        results = environment.play(tasks)
        assert [result is None for result in results] == [task is None for task in tasks]
        assert [r[1] for r in results if r] == [100 + i for i in range(1, count, 2)]
    assert len(environment.workers) == 2


class Breaks(Ends):
    def step(self, action):
        if self.start == 12:
            raise ValueError("a wheel came off")
        return super().step(action)


class Vague(Ends):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, math.nan, *rest


class Blind(Ends):
    def step(self, action):
        obs, *rest = super().step(action)
        return obs * math.nan, *rest


gym.register("Breaks-v0", Breaks, disable_env_checker=True)
gym.register("Vague-v0", Vague, disable_env_checker=True)
gym.register("Blind-v0", Blind, disable_env_checker=True)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=forks)])
@pytest.mark.parametrize(
    "env_id, reason",
    [("Breaks-v0", "a wheel came off"), ("Vague-v0", "not finite"), ("Blind-v0", "not finite")],
)
def test_an_environment_that_fails_in_evaluation(iql, capsys, env_id, reason, threads):
    torch.set_num_threads(threads)
    argv = words(env_id=env_id, eval_seed=0, eval_episodes=0, final_eval_episodes=16)
    assert iql.main(argv) == 1
    error = capsys.readouterr().err.strip()
    assert reason in error and len(error.splitlines()) == 1 and "--resume true" in error
    assert "of seed 0 (" in error and "at update 6" in error
    assert saved("run")["step"] == 6 and not Path("run/result.json").exists()


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=forks)])
def test_the_failing_member_is_named(iql, threads):
    torch.set_num_threads(threads)
    environment = iql.Environment(gym.spec("Breaks-v0"), {}, (None, None))
    environment.play([12 if i == 17 else 0 for i in range(24)])
    with pytest.raises(iql.RunError, match=r"of seed 7 \(a wheel came off\)"):
        environment.play([np.zeros(1, np.float32)] * 24, [5, 6, 7, 8])


@forks
def test_processes_end_with_the_script(tmp_path):
    """Even when it is killed."""
    code = f"""
import importlib.util, sys, gymnasium as gym, torch
spec = importlib.util.spec_from_file_location("iql", {str(REPOSITORY / "algorithms" / "iql.py")!r})
sys.modules["iql"] = iql = importlib.util.module_from_spec(spec)
spec.loader.exec_module(iql)
torch.set_num_threads(3)
environment = iql.Environment(gym.spec("Pendulum-v1"), {{}}, (None, None))
environment.play(list(range(12)))
import multiprocessing
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
input()
"""
    script = tmp_path / "plays.py"
    script.write_text(code)
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script], **options) as process:
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert len(children) == 2
        process.kill()
    until = time.monotonic() + 20
    while any(alive(pid) for pid in children):
        assert time.monotonic() < until, "a process goes on without its script"
        time.sleep(0.05)


@forks
@pytest.mark.parametrize("stop", [False, True])
def test_an_online_run_ends_with_its_processes(stop):
    """A process of its own with three threads, to its end or to SIGTERM."""
    settings = {"online_steps": 10**6 if stop else 5, "eval_episodes": 12, "log_every": 10**6}
    settings |= {"final_eval_episodes": 12, "eval_every": 20, "checkpoint_every": 10**6}
    settings["compile"] = "false"
    argv = [sys.executable, REPOSITORY / "algorithms" / "iql.py", *words(**settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    with subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while stop and len(rows_so_far("run/episodes.jsonl")) < 24:  # the switch, and once more
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        if stop:
            process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == (130 if stop else 0)
        finally:
            process.kill()
    assert saved("run")["step"] >= 6


def rows_so_far(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


@forks
@pytest.mark.usefixtures("three_threads")
def test_a_process_that_dies_in_evaluation(iql):
    import multiprocessing

    environment = iql.Environment(gym.spec("Ends-v0"), {}, (None, None))
    before = set(multiprocessing.active_children())
    environment.play(list(range(12)))
    for child in set(multiprocessing.active_children()) - before:
        child.kill()
        child.join()
    with pytest.raises(iql.RunError, match="ended") as stop:
        environment.play(list(range(12)))
    assert stop.value.code == 1


def test_a_warm_start_is_kept_before_its_first_update(iql, monkeypatch):
    """A resume would otherwise begin with other weights."""
    assert iql.main(words()) == 0
    crash_at(monkeypatch, iql, [*words(run_dir="warm"), "--checkpoint", "run"][:], 1)
    ours, theirs = saved("warm"), saved("run")
    assert ours["step"] == 0
    assert all(torch.equal(ours["agent"][name], theirs["agent"][name]) for name in theirs["agent"])


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_episodes_do_not_depend_on_the_training_seed(iql):
    """The same policy under another name of its seed plays the same episodes."""
    assert iql.main(words(num_seeds=2, seed=3, final_eval_episodes=4)) == 0
    agent = Population(iql, "run").module
    metadata = json.loads(
        Path(os.environ["MINARI_DATASETS_PATH"], TOY, "data/metadata.json").read_text()
    )
    played = []
    for seed in (3, 400):
        cfg = iql.TrainConfig(num_seeds=2, seed=seed)
        rows_ = iql.evaluate(agent, iql.find_environment(cfg, metadata, agent.scaler), cfg, 4)
        assert [row["seed"] for row in rows_] == [seed] * 4 + [seed + 1] * 4
        played.append([row["return"] for row in rows_])
    assert played[0] == played[1]
    assert len(set(played[0])) == 8


def test_actions_and_statistics_by_hand(iql):
    """IQL's policy from the tensors of its checkpoint, in NumPy."""
    assert iql.main(long(iql, num_seeds=3)) == 0
    weights = {
        name: value.numpy().astype(np.float64) for name, value in saved("run")["agent"].items()
    }
    obs = np.concatenate([e.observations[:-1] for e in toy_episodes()]).astype(np.float64)
    np.testing.assert_allclose(weights["scaler.obs_mean"], obs.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights["scaler.obs_std"], obs.std(0) + 1e-3, rtol=1e-5)
    x = np.stack([(obs - obs.mean(0)) / (obs.std(0) + 1e-3)] * 3)
    for i in range(3):
        x = x @ weights[f"actor.mean.layers.{i}.weight"] + weights[f"actor.mean.layers.{i}.bias"]
        x = np.maximum(x, 0) if i < 2 else np.tanh(x)
    batch = torch.as_tensor(obs, dtype=torch.float32).expand(3, -1, -1)
    actions = Population(iql, "run").module.act(batch).numpy()
    np.testing.assert_allclose(actions, 2 * x, rtol=1e-4, atol=1e-5)


def test_action_spaces_that_are_not_symmetric(iql):
    scaler = iql.Scaler([0.0], [1.0], np.array([-1.0, 2.0]), np.array([3.0, 4.0]))
    ends = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [5.0, -7.0]])
    expected = torch.tensor([[-1.0, 2.0], [1.0, 3.0], [3.0, 4.0], [3.0, 2.0]])
    assert torch.equal(scaler.env_action(ends), expected)
    assert torch.equal(scaler.action(expected), ends.clamp(-1, 1))


def test_no_environment_no_evaluation(script):
    assert script.main(words(env_id="none")) == 0
    assert rows("run/episodes.jsonl") == []
    assert not [row for row in rows("run/metrics.jsonl") if "eval/return" in row]
    assert json.loads(Path("run/result.json").read_text())["last"] == []


def test_environments_as_older_gymnasiums_wrote_them(iql):
    """Sets on Minari's hub still have fields that Gymnasium 1.0 dropped."""
    write_dataset(Path("store"), "old-v0", toy_episodes())
    path = Path("store/old-v0/data/metadata.json")
    metadata = json.loads(path.read_text())
    old = '"autoreset": false, "disable_env_checker"'
    metadata["env_spec"] = metadata["env_spec"].replace('"disable_env_checker"', old)
    assert "autoreset" in json.loads(metadata["env_spec"])
    path.write_text(json.dumps(metadata))
    assert iql.main(words(dataset_id="store/old-v0")) == 0
    assert json.loads(Path("run/result.json").read_text())["env_id"] == "ToyPendulum-v0"


def test_scores_are_null_without_references(iql):
    write_dataset(Path("store"), "bare-v0", toy_episodes(), ref_min_score=None, ref_max_score=None)
    assert iql.main(words(dataset_id="store/bare-v0")) == 0
    assert {row["score"] for row in rows("run/episodes.jsonl")} == {None}
    assert not [row for row in rows("run/metrics.jsonl") if "eval/score" in row]
    assert iql.main(words(dataset_id="store/bare-v0", run_dir="half", ref_min_score=3)) == 0
    assert {row["score"] for row in rows("half/episodes.jsonl")} == {None}


def test_references_and_environment_of_a_config_hold_for_its_own_dataset_only(iql, capsys):
    own = {"ref_min_score": 0.0, "ref_max_score": 100.0, "env_kwargs": {"g": 0.1}}
    settings = {**own, "fallback_dataset_id": TOY}
    Path("own.yaml").write_text(yaml.safe_dump({**settings, "dataset_id": TOY}))
    Path("other.yaml").write_text(yaml.safe_dump({**settings, "dataset_id": "D4RL/nowhere-v2"}))
    argv = words()[2:]  # without the dataset
    assert iql.main([*argv, "--config", "own.yaml"]) == 0
    assert "WARNING" not in capsys.readouterr().err
    for row in rows("run/episodes.jsonl"):
        assert row["score"] == pytest.approx(row["return"])

    assert iql.main([*argv, "--config", "other.yaml", "--run_dir", "other"]) == 0
    warning = capsys.readouterr().err
    assert "WARNING" in warning and "NOT comparable" in warning
    assert TOY in warning and "D4RL/nowhere-v2" in warning
    config = yaml.safe_load(Path("other/config.yaml").read_text())
    assert (config["dataset_id"], config["fallback_dataset_id"]) == (TOY, "")
    assert (config["ref_min_score"], config["env_kwargs"]) == (None, {})
    assert json.loads(Path("other/result.json").read_text())["dataset_id"] == TOY
    assert iql.main(words(run_dir="plain")) == 0
    assert rows("other/episodes.jsonl") == rows("plain/episodes.jsonl")
    assert rows("run/episodes.jsonl") != rows("plain/episodes.jsonl")
    assert iql.main([*argv, "--config", "other.yaml", "--run_dir", "other"]) == 0  # finished


# ---- data


def load(script, dataset_id=TOY):
    return script.load_dataset(dataset_id, script.find_dataset(dataset_id, False))


def test_transitions_as_built_by_hand(script):
    dataset, expected = load(script), []
    for episode in toy_episodes():
        for t in range(len(episode.rewards)):
            expected.append(
                (
                    episode.observations[t],
                    episode.actions[t],
                    episode.rewards[t],
                    episode.observations[t + 1],
                    float(episode.terminations[t]),
                )
            )
    names = ("obs", "action", "reward", "next_obs", "terminated")
    assert dataset.transitions.keys() == set(names)
    for i, name in enumerate(names):
        np.testing.assert_array_equal(dataset.transitions[name], np.stack([e[i] for e in expected]))
        assert dataset.transitions[name].dtype == np.float32
    assert list(dataset.starts) == [0, 30, 70, 71]
    assert list(np.flatnonzero(dataset.transitions["terminated"])) == [29, 70]
    returns = [np.sum(e.rewards, dtype=np.float64) for e in toy_episodes()]
    np.testing.assert_allclose(dataset.returns, returns)


def dict_episodes(order):
    """Observations as (nested) dicts whose keys come in any order, and what they flatten to."""
    rng, episodes, flat = np.random.default_rng(0), [], []
    for steps in (4, 6):
        parts = {
            "observation": rng.normal(size=(steps + 1, 3)),
            "achieved_goal": rng.normal(size=(steps + 1, 2)),
            "more": {key: rng.normal(size=(steps + 1, 1)) for key in ("z", "a")},
        }
        episodes.append(toy_episode(rng, steps, True, observations={k: parts[k] for k in order}))
        nested = [parts["more"]["a"], parts["more"]["z"]]
        flat.append(np.concatenate([parts["achieved_goal"], *nested, parts["observation"]], 1))
    return episodes, flat


@pytest.mark.parametrize("reverse", [False, True])
def test_dict_observations_are_flattened_in_the_order_of_their_keys(iql, reverse):
    order = sorted(["observation", "achieved_goal", "more"], reverse=reverse)
    episodes, flat = dict_episodes(order)
    box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    sizes = {
        "observation": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        "achieved_goal": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "more": gym.spaces.Dict({"z": box, "a": box}),
    }
    spaces = {
        "observation_space": gym.spaces.Dict({k: sizes[k] for k in order}),
        "action_space": gym.spaces.Box(-2, 2, (1,)),
    }
    write_dataset(Path("store"), "maze-v0", episodes, env=None, **spaces)
    obs = load(iql, "store/maze-v0").transitions["obs"]
    np.testing.assert_array_equal(obs, np.concatenate([f[:-1] for f in flat]).astype(np.float32))
    live = {k: {"z": [1.0], "a": [2.0]} if k == "more" else [3.0] for k in order}
    assert iql.flatten_obs(live).tolist() == [3.0, 2.0, 1.0, 3.0]


def test_float64_data_is_the_same_data(iql):
    names = ("observations", "actions", "rewards")
    episodes = [
        dataclasses.replace(e, **{name: getattr(e, name).astype(np.float64) for name in names})
        for e in toy_episodes()
    ]
    box = {"low": -np.inf, "high": np.inf, "shape": (3,), "dtype": np.float64}
    spaces = {
        "observation_space": gym.spaces.Box(**box),
        "action_space": gym.spaces.Box(-2, 2, (1,), np.float64),
    }
    write_dataset(Path("store"), "wide-v0", episodes, **spaces)
    one, other = load(iql), load(iql, "store/wide-v0")
    assert one.fingerprint == other.fingerprint
    for name, values in other.transitions.items():
        assert values.dtype == np.float32, name
    assert iql.main(words(dataset_id="store/wide-v0")) == 0


def test_the_fingerprint_is_of_the_content_alone(script):
    data = write_dataset(Path("store"), "own-v0", toy_episodes(), ref_max_score=-3.0)
    known = load(script).fingerprint
    assert known == load(script, "store/own-v0").fingerprint
    assert known == load(load_script("iql")).fingerprint
    found = {known}
    for array in ("observations", "actions", "rewards", "terminations", "truncations"):
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            values = file[f"episode_1/{array}"]
            values[3] = ~values[3] if values.dtype == bool else values[3] / 2
        found.add(load(script, "store/own-v0").fingerprint)
    assert len(found) == 6
    episodes = toy_episodes()
    write_dataset(Path("store"), "order-v0", [episodes[1], episodes[0], episodes[2]])
    assert load(script, "store/order-v0").fingerprint not in found


def prepared(script, **settings):
    cfg = script.TrainConfig(**settings)
    dataset = load(script)
    return dataset, script.prepare(dataset, cfg, script.fit_scaler(dataset, cfg))


def test_reward_transforms(script):
    plain = {"normalize_obs": False}
    dataset, data = prepared(script, **plain)
    stored = dataset.transitions["reward"]
    np.testing.assert_array_equal(data["reward"], stored)
    _, data = prepared(script, reward_scale=3.0, reward_shift=-1.0, **plain)
    np.testing.assert_allclose(data["reward"], 3 * stored - 1, rtol=1e-6)
    spread = dataset.returns.max() - dataset.returns.min()
    options = {"reward_by_return_range": True, "reward_scale": 2.0, "reward_shift": -1.0}
    _, data = prepared(script, **options, **plain)
    np.testing.assert_allclose(data["reward"], 2000 * stored / spread - 1, rtol=1e-5)
    np.testing.assert_array_equal(dataset.transitions["reward"], stored)
    assert data["reward"].dtype == torch.float32


def test_observation_normalisation(script):
    dataset, data = prepared(script, normalize_obs=True)
    obs = dataset.transitions["obs"].astype(np.float64)
    for name in ("obs", "next_obs"):
        expected = (dataset.transitions[name] - obs.mean(0)) / (obs.std(0) + 1e-3)
        np.testing.assert_allclose(data[name], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data["obs"].mean(0), 0, atol=1e-5)
    _, data = prepared(script, normalize_obs=False)
    np.testing.assert_array_equal(data["obs"], dataset.transitions["obs"])
    np.testing.assert_allclose(data["action"], dataset.transitions["action"] / 2)


def test_actions_beside_a_bound_by_rounding_are_clipped(iql):
    rng, edge = np.random.default_rng(0), np.float32(2 + 5e-6)
    actions = np.full((5, 1), edge)
    actions[3:] = -edge
    assert abs(actions).min() > 2
    episode = toy_episode(rng, 5, True, actions=actions)
    write_dataset(Path("store"), "edge-v0", [episode])
    assert load(iql, "store/edge-v0").transitions["action"][:, 0].tolist() == [2, 2, 2, -2, -2]


def test_bc_keeps_the_best_episodes():
    bc, rng = load_script("bc"), np.random.default_rng(0)
    totals = [3.0, 9.0, 1.0, 9.0, 5.0, 9.0, -2.0, 4.0, 0.0, 2.0]
    episodes = []
    for number, total in enumerate(totals):
        rewards = np.zeros(number + 1, np.float32)
        rewards[-1] = total
        episodes.append(toy_episode(rng, number + 1, number % 2 == 0, rewards=rewards))
    write_dataset(Path("store"), "ten-v0", episodes)
    dataset = load(bc, "store/ten-v0")
    for fraction, kept in [
        (0.0, [1]),
        (0.1, [1]),
        (0.2, [1, 3]),
        (0.3, [1, 3, 5]),
        (0.4, [1, 3, 4, 5]),
        (0.7, [0, 1, 3, 4, 5, 7, 9]),
        (1.0, list(range(10))),
    ]:
        best = bc.best_episodes(dataset, bc.TrainConfig(top_fraction=fraction))
        obs = np.concatenate([episodes[i].observations[:-1] for i in kept])
        next_obs = np.concatenate([episodes[i].observations[1:] for i in kept])
        np.testing.assert_array_equal(best.transitions["obs"], obs)
        np.testing.assert_array_equal(best.transitions["next_obs"], next_obs)
        assert list(best.returns) == [totals[i] for i in kept]
        assert list(np.diff(best.starts)) == [i + 1 for i in kept]
    assert bc.main(words(dataset_id="store/ten-v0", top_fraction=0.1)) == 0


def test_bc_keeps_a_share_without_an_error_of_rounding():
    bc = load_script("bc")
    empty = {"transitions": {}, "metadata": {}, "action_bounds": (), "fingerprint": ""}
    dataset = bc.Dataset(starts=np.arange(101), returns=np.arange(100.0), **empty)
    for percent in range(1, 101):
        best = bc.best_episodes(dataset, bc.TrainConfig(top_fraction=percent / 100))
        assert len(best.returns) == percent


# ---- warm starts


def without(argv: list[str], *names: str) -> list[str]:
    pairs = zip(argv[::2], argv[1::2], strict=True)
    return [part for flag, value in pairs if flag[2:] not in names for part in (flag, value)]


def test_a_warm_start_takes_its_networks_from_the_checkpoint(script, monkeypatch):
    assert script.main(words(num_seeds=2, normalize_obs="true", hidden_layers=3)) == 0
    rng = np.random.default_rng(1)
    wide = (5 + 3 * rng.normal(size=(31, 3))).astype(np.float32)
    write_dataset(Path("store"), "other-v0", [toy_episode(rng, 30, True, observations=wide)])
    weights, first = saved("run")["agent"], {}

    def look(agent, number):
        if number == 1:
            first.update({k: v.clone() for k, v in agent.state_dict().items()})

    before_update(monkeypatch, script, look)
    argv = without(words(dataset_id="store/other-v0", run_dir="warm"), "hidden_dim")
    assert script.main([*argv, "--checkpoint", "run"]) == 0
    assert first.keys() == weights.keys()
    for name, values in weights.items():  # the scaler's statistics among them
        # what DT's targets are shares of belongs to the data at hand
        assert torch.equal(first[name], values) != (name == "best_return"), name
    config = yaml.safe_load(Path("warm/config.yaml").read_text())
    expected = {"num_seeds": 2, "normalize_obs": True, "hidden_layers": 3, "hidden_dim": 16}
    assert {name: config[name] for name in expected} == expected
    assert config["dataset_id"] == "store/other-v0"
    same = words(run_dir="same", num_seeds=2, normalize_obs="true", hidden_layers=3)
    assert script.main([*same, "--checkpoint", "run/checkpoint.pt"]) == 0


@pytest.mark.parametrize(
    "name, value", [("hidden_dim", 32), ("hidden_layers", 1), ("num_seeds", 2)]
)
def test_a_warm_start_refuses_other_networks(script, refused, name, value):
    assert script.main(words()) == 0
    argv = words(run_dir="warm", checkpoint="run", **{name: value})
    refused(script, argv, name, "checkpoint")
    Path("some.yaml").write_text(f"{name}: {value}\n")
    argv = without(words(run_dir="warm", checkpoint="run"), name)
    refused(script, [*argv, "--config", "some.yaml"], name, "checkpoint")
    refused(script, ["--checkpoint", "run", "--eval_only", "true", f"--{name}", str(value)], name)
    refused(script, ["--checkpoint", "run", "--eval_only", "true", "--seed", "9"], "seed is 0")


def test_evaluation_of_a_checkpoint_takes_the_settings_of_its_run(iql, capsys):
    assert iql.main(long(iql, eval_seed=77)) == 0
    shown = capsys.readouterr().out.splitlines()[-3:-1]
    before = contents()
    for path in ("run", "run/checkpoint.pt"):
        assert iql.main(["--eval_only", "true", "--checkpoint", path]) == 0
        assert capsys.readouterr().out.splitlines()[-3:-1] == shown
    assert iql.main(["--eval_only", "true", "--checkpoint", "run", "--eval_seed", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:-1] != shown
    assert contents() == before


def test_a_config_is_found_from_anywhere():
    """Folders of datasets are also looked for beside the scripts."""
    iql = load_script("iql")
    assert iql.REPOSITORY == REPOSITORY
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    assert iql.find_dataset("store/own-v0", False).resolve() == data.resolve()
    assert iql.find_dataset(str(data.parent.resolve()), False).resolve() == data.resolve()
    assert iql.find_dataset(str(data.resolve()), False).resolve() == data.resolve()


def test_a_stored_reward_can_end_the_task(iql):
    """`success_reward` stops the bootstrap where it is reached, whatever the rewards become."""
    dataset, data = prepared(iql, success_reward=0.5, reward_scale=-3.0)
    stored = dataset.transitions
    expected = (stored["reward"] >= 0.5) | (stored["terminated"] == 1)
    assert stored["terminated"].sum() < expected.sum() < len(expected)
    np.testing.assert_array_equal(data["terminated"], expected)
    _, data = prepared(iql)
    np.testing.assert_array_equal(data["terminated"], stored["terminated"])


def test_random_numbers_that_take_much_memory_are_drawn_in_shorter_chunks(iql):
    """32 updates at once, at most 2^24 numbers a member, one update at least."""

    class Agent(iql.Agent):
        def noise_shapes(self):
            return self.shapes

    for count, length in ((0, 32), (2**19, 32), (2**19 + 1, 31), (2**22, 4), (2**25, 1)):
        agent = Agent()
        agent.shapes = {"a": ("normal", (count // 2,)), "b": ("uniform", (count - count // 2,))}
        assert iql.chunk_length(agent) == length


def test_random_booleans_are_independent_and_as_probable_as_asked(iql):
    """Four of them come from one number: none repeats its neighbours."""
    values = torch.empty(1001, 401, dtype=torch.bool)  # no multiple of four
    iql.fill(values, 0.9, torch.Generator().manual_seed(0))
    flat, noise = values.flatten().double(), 5 / values.numel() ** 0.5
    assert abs(flat.mean() - 0.9) < 0.3 * noise
    for lag in range(1, 9):
        both = torch.stack([flat[:-lag], flat[lag:]])
        assert abs(torch.corrcoef(both)[0, 1]) < noise
    lanes = flat[:-1].unflatten(0, (-1, 4)).mean(0)
    assert (lanes - 0.9).abs().max() < 0.6 * noise
    for kind, share in ((1 - 1e-9, 1.0), (1.0, 1.0)):
        iql.fill(values, kind, torch.Generator().manual_seed(0))
        assert values.double().mean() == share
    again = torch.empty_like(values)
    for each in (values, again):
        iql.fill(each, 0.3, torch.Generator().manual_seed(1))
    assert torch.equal(values, again) and abs(values.double().mean() - 0.3) < 0.5 * noise


def test_runs_with_short_chunks_resume_to_the_bit(iql, monkeypatch):
    monkeypatch.setattr(iql, "chunk_length", lambda _: 4)
    settings = {"num_updates": 11, "checkpoint_every": 6, "env_id": "none", "actor_dropout": 0.3}
    assert iql.main(words(run_dir="whole", **settings)) == 0
    with monkeypatch.context() as patch:
        save = iql.Run.save

        def stop(run):
            save(run)
            raise KeyboardInterrupt

        patch.setattr(iql.Run, "save", stop)
        assert iql.main(words(run_dir="cut", **settings)) == 130
    assert iql.main(["--run_dir", "cut", "--resume", "true"]) == 0
    ours, theirs = saved("cut"), saved("whole")
    for name, value in theirs["agent"].items():
        assert torch.equal(ours["agent"][name], value), name


def test_scores_of_another_environment_say_so(iql, capsys):
    """What D4RL's environment had and today's lacks stands beside the score, also later."""
    folder = write_dataset(Path("store"), "other-v0", toy_episodes())
    about = json.loads((folder / "metadata.json").read_text())
    sentence, source = "the pen may be dropped", {"source": "d4rl-hdf5 0123"}
    about |= {"environment_differs": sentence, **source}
    (folder / "metadata.json").write_text(json.dumps(about))
    given = {"dataset_id": "store/other-v0"}
    assert iql.main(words(**given)) == 0
    assert f"the environment differs: {sentence}\n" in capsys.readouterr().out
    assert json.loads(Path("run/result.json").read_text())["environment_differs"] == sentence
    assert json.loads(Path("run/environment.json").read_text()).items() >= source.items()
    assert iql.main(["--checkpoint", "run", "--eval_only", "true"]) == 0
    assert sentence in capsys.readouterr().out
    named = {"env_id": "Pendulum-v1", "env_kwargs": "{max_episode_steps: 5}", "run_dir": "named"}
    assert iql.main(words(**given, **named)) == 0  # whoever names another knows what it is
    assert json.loads(Path("named/result.json").read_text())["environment_differs"] is None
    assert sentence not in capsys.readouterr().out
