"""Runs: folders, logs, resume, what ends a run early, checkpoints, wandb. All to the bit."""

import gc
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from conftest import SCRIPTS, TOY, contents, load_script, toy_episodes, words, write_dataset

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
RESUME = ["--run_dir", "run", "--resume", "true"]


class Crash(Exception):
    """A power cut: nothing of the script handles it."""


def long(script, **settings) -> list[str]:
    """The command line of a run that is to be interrupted; with dropout and phases if any."""
    more = {"actor_dropout": 0.3, "behavior_updates": 8, "warm_start": 16, "vae_hidden_dim": 16}
    more |= {"vae_updates": 8}
    more = {k: v for k, v in more.items() if k in script.TrainConfig.__dataclass_fields__}
    return words(**{**LONG, **more, **settings})


def without(argv: list[str], *names: str) -> list[str]:
    pairs = zip(argv[::2], argv[1::2], strict=True)
    return [part for flag, value in pairs if flag[2:] not in names for part in (flag, value)]


def agent_of(script) -> type:
    kinds = (c for c in vars(script).values() if isinstance(c, type))
    (agent_class,) = (c for c in kinds if issubclass(c, script.Agent) and "update" in vars(c))
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
    """Equal to the bit, apart from what a clock says and how the run was started."""
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert rows(Path(one, name)) == rows(Path(other, name)), name
    assert Path(one, "config.yaml").read_bytes() == Path(other, "config.yaml").read_bytes()
    contents = [saved(folder) for folder in (one, other)]
    contents += [json.loads(Path(folder, "result.json").read_text()) for folder in (one, other)]
    for each in contents:
        for name in ("seconds", "sizes"):  # the logs hold times of more digits or fewer
            each.pop(name, None)
        for name in ("id", "command"):
            del each.get("about", each)[name]
        for row in each.get("last", []):
            del row["time/evaluation_seconds"]
    for first, second in (map(dict, map(leaves, contents[i : i + 2])) for i in (0, 2)):
        assert first.keys() == second.keys()
        for path, value in first.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == second[path].dtype
                assert torch.equal(value, second[path]), path
            else:
                assert value == second[path], path


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> dict:
    return {"": tmp_path_factory.mktemp("whole")}


def whole_of(script, whole_runs) -> Path:
    folder = whole_runs[""] / script.__name__
    if script not in whole_runs:
        assert script.main(long(script, run_dir=folder)) == 0
        whole_runs[script] = contents(folder)
    assert contents(folder) == whole_runs[script]
    return folder


@pytest.fixture
def whole(script, whole_runs) -> Path:
    """The folder of the uninterrupted run of this script, made once."""
    return whole_of(script, whole_runs)


@pytest.fixture
def whole_iql(iql, whole_runs) -> Path:
    return whole_of(iql, whole_runs)


# ---- folders


def test_runs_of_one_second_get_folders_of_their_own(iql):
    argv = without(words(num_updates=1, env_id="none", label="Six of Them"), "run_dir")
    assert [iql.main(argv) for _ in range(6)] == [0] * 6
    folders = sorted(Path("runs/six-of-them/toy-pendulum-v0").iterdir())
    assert len(folders) == 6 and all((each / "result.json").is_file() for each in folders)
    assert all(re.fullmatch(r"\d{8}-\d{6}\.\d{6}-s0x1", each.name) for each in folders)


def test_no_two_runs_share_a_folder_though_the_clock_stands_still(iql, monkeypatch):
    still = types.SimpleNamespace(now=lambda: datetime(2030, 1, 2, 3, 4, 5, 678))
    monkeypatch.setattr(iql, "datetime", still)
    argv = without(words(num_updates=1, env_id="none"), "run_dir")
    assert iql.main(argv) == 0
    before = contents()
    iql.main(argv)  # takes another folder, or is refused
    assert contents().items() >= before.items()
    assert [path for path in contents() if path not in before and "-000678-" in path] == []


def test_the_command_line_that_made_a_run_shows_its_result_again(iql, monkeypatch, capsys):
    assert iql.main(long(iql)) == 0
    shown = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(":")[0] for line in shown[:2]] == ["seed 5", "seed 6"]
    assert "return" in shown[0] and "score" in shown[0] and "run" in shown[2]
    before = contents()
    before_update(monkeypatch, iql, lambda *_: pytest.fail("it trains"))
    for argv in (RESUME, long(iql), long(iql, resume="true")):
        assert iql.main(argv) == 0
        assert capsys.readouterr().out.splitlines()[-3:] == shown
        assert contents() == before


def test_a_run_says_what_its_numbers_depend_on(iql):
    assert iql.main(long(iql, label="mine")) == 0
    about = json.loads(Path("run/environment.json").read_text())
    result = json.loads(Path("run/result.json").read_text())
    expected = {"script": "iql", "algorithm": "IQL", "label": "mine", "env_id": "Pendulum-v1"}
    expected |= {"ref_min_score": -160.0, "ref_max_score": -20.0, "command": sys.argv}
    assert about.items() >= expected.items() and json.loads(about["env_spec"])["id"]
    assert about["torch"] == torch.__version__ and about["gymnasium"] and about["minari"]
    assert re.fullmatch(r"[0-9a-f]{16}", about["fingerprint"])
    assert about["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", about["commit"])
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert {**result, **config, **about} == result and result["seconds"] > 0
    evaluations = [row for row in rows("run/metrics.jsonl") if row.get("final")]
    for row in result["last"]:
        del row["time/evaluation_seconds"]
        row["update"] = 40
    assert result["last"] == evaluations and [row["seed"] for row in evaluations] == [5, 6]


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


SIGNALS = [("iql", signal.SIGINT, 1), *((name, signal.SIGTERM, 18) for name in SCRIPTS)]


@pytest.mark.parametrize("name, number, at", SIGNALS)
def test_resume_after_a_signal(whole_runs, monkeypatch, capsys, name, number, at):
    script = load_script(name)

    def action(_, n):
        if n == at:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        before_update(patch, script, action)
        assert script.main(long(script)) == 130
    lines = capsys.readouterr().err.strip().splitlines()
    assert f"update {at};" in lines[-1] and lines[-1].endswith("--run_dir 'run' --resume true")
    assert signal.getsignal(number) == handler
    assert saved("run")["step"] == at
    assert not Path("run/result.json").exists()
    assert script.main(RESUME) == 0
    assert_same_run("run", whole_of(script, whole_runs))


@pytest.mark.parametrize("crashes", [[39], [22, 15], [12], [12, 12], [], [21, 1, 20]])
def test_resume_after_crashes_elsewhere(iql, whole_iql, monkeypatch, crashes):
    """Twice, with the whole command line, before the first checkpoint, without a run to resume."""
    for number in crashes:
        crash_at(monkeypatch, iql, long(iql, resume="true"), number)
    assert iql.main(long(iql, resume="true")) == 0
    assert_same_run("run", whole_iql)


def test_logs_that_were_cut_are_not_padded(iql, whole_iql, monkeypatch):
    """A file that is cut goes on saying its old size: a save before the next row would keep it."""
    crash_at(monkeypatch, iql, long(iql), 16)  # rows of 7 and 14, no checkpoint
    with monkeypatch.context() as patch:
        before_update(patch, iql, lambda _, n: n == 3 and os.kill(os.getpid(), signal.SIGTERM))
        assert iql.main(RESUME) == 130
    assert saved("run")["sizes"] == {"metrics": 0, "episodes": 0}
    assert iql.main(RESUME) == 0
    assert_same_run("run", whole_iql)


@pytest.mark.parametrize("final", [False, True])
def test_a_signal_ends_an_evaluation_at_once(iql, whole_iql, monkeypatch, capsys, final):
    """It is made up for."""
    real, calls = iql.env_step, []

    def patched(env, action=None, seed=None):
        calls.append(None)
        if len(calls) == (400 if final else 60):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(env, action, seed)

    with monkeypatch.context() as patch:
        patch.setattr(iql, "env_step", patched)
        assert iql.main(long(iql)) == 130
    assert "to go on" in capsys.readouterr().err.splitlines()[-1]
    assert saved("run")["step"] == (40 if final else 9)
    assert len(calls) == (400 if final else 60)
    assert iql.main(RESUME) == 0
    assert_same_run("run", whole_iql)


def test_resume_after_the_last_update(iql, whole_iql, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(iql.Run, "evaluate", lambda *_, final=False: crash() if final else [])
        with pytest.raises(Crash):
            iql.main(long(iql, eval_every=40))
    assert saved("run")["step"] == 40
    assert iql.main(RESUME) == 0
    assert rows("run/metrics.jsonl")[-2:] == rows(whole_iql / "metrics.jsonl")[-2:]


def crash(*_):
    raise Crash


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_crash_in_a_write_leaves_what_can_be_gone_on_with(
    iql, whole_iql, refused, monkeypatch, call, number
):
    """The folder's first writes, then those of a checkpoint."""
    real, owner, calls = getattr(os, call), os, []
    if call == "replace":
        real, owner = Path.replace, Path

    def patched(*args):
        calls.append(None)
        if len(calls) == number:
            raise Crash
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, patched)
        with pytest.raises(Crash):
            iql.main(long(iql, checkpoint_every=5))
    refused(iql, long(iql, checkpoint_every=5), "run", "in use", "--resume true")
    assert iql.main(long(iql, checkpoint_every=5, resume="true")) == 0
    for name in ("metrics.jsonl", "episodes.jsonl"):
        assert rows(Path("run", name)) == rows(whole_iql / name)
    assert not [name for name in contents() if name.endswith(".part")]


def test_signals_to_processes(iql):
    """SIGTERM leaves a checkpoint, SIGKILL what there was; the lock goes with the process."""
    argv = {"num_updates": 600, "eval_every": 200, "checkpoint_every": 20}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number in (signal.SIGTERM, signal.SIGKILL):
        argv["run_dir"], log = number.name, Path(number.name, "metrics.jsonl")
        command = [sys.executable, iql.__file__, *long(iql, **argv, compile="false")]
        with subprocess.Popen(command, **options) as process:
            until = time.monotonic() + 120
            while not log.is_file() or len(log.read_bytes().splitlines()) < 12:  # update 42
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            resume = ["--run_dir", number.name, "--resume", "true"]
            assert iql.main(resume) == 2  # the other process goes on writing
            process.send_signal(number)
            err = process.communicate(timeout=120)[1]
        assert "Traceback" not in err
        if number == signal.SIGTERM:
            line = err.strip().splitlines()[-1]
            assert process.returncode == 130
            assert line.endswith(f"python {iql.__file__} --run_dir 'SIGTERM' --resume true")
            assert f"stopped at update {saved('SIGTERM')['step']};" in line
        else:
            assert process.returncode == -number and saved("SIGKILL")["step"] >= 40
        assert not Path(number.name, "result.json").exists()
        assert iql.main(resume) == 0
    assert iql.main(long(iql, **{**argv, "run_dir": "whole", "compile": "false"})) == 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        assert_same_run(number.name, "whole")


def test_a_second_process_is_refused(iql, monkeypatch, refused):
    """A lock belongs to an open file, so this process can be the second one, too."""

    def action(_, number):
        if number == 23:
            first = f"process {os.getpid()} on {platform.node()}"
            refused(iql, RESUME, "run", "another process", first)
            refused(iql, long(iql), "run", "in use")
            refused(iql, long(iql, resume="true"), "run", "another process")

    before_update(monkeypatch, iql, action)
    assert iql.main(long(iql)) == 0


def test_a_folder_that_was_taken_since_it_was_looked_at(iql, monkeypatch):
    """Two processes find it empty; one trains to the end before the other has read its data."""
    real, runs = iql.load_dataset, []

    def slow(cfg, *others):
        if not runs:
            runs.append(None)
            assert iql.main(words()) == 0
            runs.append(contents("run"))
        return real(cfg, *others)

    monkeypatch.setattr(iql, "load_dataset", slow)
    assert iql.main(words(seed=5)) == 2
    assert contents("run") == runs[1]


@pytest.mark.parametrize(
    "name, value", [("batch_size", 9), ("seed", 6), ("num_updates", 50), ("normalize_obs", "false")]
)
def test_a_changed_field_on_resume(iql, refused, monkeypatch, name, value):
    crash_at(monkeypatch, iql, long(iql), 23)
    refused(iql, [*RESUME, f"--{name}", str(value)], name, "run")
    refused(iql, long(iql, **{"resume": "true", name: value}), name, "run")


def test_other_data_on_resume(iql, refused, monkeypatch):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    crash_at(monkeypatch, iql, long(iql, dataset_id="store/own-v0"), 23)
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        file["episode_1/rewards"][3] += 1
    refused(iql, RESUME, "store/own-v0")


def test_what_was_started_from_a_checkpoint_goes_on_from_it(iql, monkeypatch):
    """Also where it was interrupted before a checkpoint of its own."""
    assert iql.main(words()) == 0
    argv = words(num_updates=12, checkpoint="run")
    assert iql.main([*argv, "--run_dir", "whole"]) == 0
    crash_at(monkeypatch, iql, [*argv, "--run_dir", "cut"], 2)
    for folder, start in (
        ("run", None),
        ("whole", "run"),
        ("cut", "run"),
    ):  # the report tells them apart
        assert json.loads(Path(folder, "environment.json").read_text())["checkpoint"] == start
    assert iql.main(["--run_dir", "cut", "--resume", "true"]) == 0
    assert_same_run("cut", "whole")


@pytest.mark.parametrize("name", ["iql", "td3_bc", "bc"])
@pytest.mark.parametrize("file", ["", "/checkpoint.pt"])
def test_going_on_from_a_checkpoint_is_going_on(name, file):
    """In another folder: the same updates as in one run."""
    script, settings = load_script(name), {"num_seeds": 2, "normalize_obs": "true"}
    if name == "iql":
        settings["cosine_actor_lr"] = "false"  # it depends on the number of updates
    assert script.main(words(**settings)) == 0
    settings["num_updates"] = 12
    assert script.main(words(run_dir="more", checkpoint=f"run{file}", **settings)) == 0
    assert script.main(words(run_dir="whole", **settings)) == 0
    ours, theirs = saved("more"), saved("whole")
    assert ours["step"] == theirs["step"] == 12
    assert all(torch.equal(ours["agent"][k], v) for k, v in theirs["agent"].items())
    for log in ("metrics.jsonl", "episodes.jsonl"):
        after = [row for row in rows(f"whole/{log}") if row["update"] > 6]
        assert [row for row in rows(f"more/{log}") if row["update"] > 6] == after


# ---- what ends a run early


def failing_evaluation(monkeypatch, script, number: int) -> None:
    """Evaluation `number` of this process breaks off."""
    evaluate, calls = script.evaluate, []

    def fails(*args):
        calls.append(None)
        if len(calls) == number:
            raise script.RunError("a wheel came off")
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", fails)


@pytest.mark.parametrize("name", ["iql", "dt"])
@pytest.mark.parametrize("number, at", [(2, 18), (5, 40)])
def test_an_evaluation_that_failed_is_made_up_for(
    whole_runs, monkeypatch, capsys, name, number, at
):
    """Nothing before it is lost, however rare checkpoints are; the last one is the final one."""
    script = load_script(name)
    with monkeypatch.context() as patch:
        failing_evaluation(patch, script, number)
        assert script.main(long(script)) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: a wheel came off"
    assert saved("run")["step"] == at
    assert script.main(RESUME) == 0
    assert_same_run("run", whole_of(script, whole_runs))


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


LOSSES = [("iql", 1, None), ("iql", 6, None), ("iql", 40, 20)]
LOSSES += [(name, 22, 20) for name in SCRIPTS]


@pytest.mark.parametrize("name, number, good", LOSSES)
def test_a_loss_that_is_not_finite(whole_runs, monkeypatch, capsys, name, number, good):
    """Metric and seed are named; the last good checkpoint stays, and leads to the same end."""
    script = load_script(name)
    with monkeypatch.context() as patch:
        spoil(patch, script, number, member=1)
        assert script.main(long(script)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "_loss" in line and "seed 6" in line and "run" in line
    assert "seed 5" not in line and not Path("run/result.json").exists()
    assert (saved("run")["step"] if Path("run/checkpoint.pt").exists() else None) == good
    for name in ("metrics.jsonl", "episodes.jsonl"):
        rows(Path("run", name))  # every row is valid JSON
    assert script.main(RESUME) == 0
    assert_same_run("run", whole_of(script, whole_runs))


def test_weights_that_are_not_finite(script, monkeypatch, capsys):
    """They make the losses of their member NaN: that is what is told, and nothing is saved."""

    def action(agent, number):
        if number == 5:
            with torch.no_grad():
                for parameter in agent.parameters():
                    parameter[len(parameter) // 2 :] = math.nan  # of the second member

    before_update(monkeypatch, script, action)
    assert script.main(words(num_seeds=2, checkpoint_every=4)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "_loss" in line and "seed 1" in line and "seed 0" not in line
    assert saved("run")["step"] == 4


def test_nothing_that_is_not_finite_is_saved(iql, monkeypatch, capsys):
    """Neither weights beside finite losses nor metrics that wait for their log row."""

    def action(agent, number):
        if number == 6:
            agent.register_buffer("extra", torch.tensor([math.inf]))

    with monkeypatch.context() as patch:
        before_update(patch, iql, action)
        assert iql.main(words()) == 2
    assert "extra not finite" in capsys.readouterr().err
    assert saved("run")["step"] == 3 and "extra" not in saved("run")["agent"]
    spoil(monkeypatch, iql, 6, member=0)
    more = {"num_updates": 20, "log_every": 20, "checkpoint_every": 4, "eval_every": 99}
    assert iql.main(words(run_dir="other", **more)) == 2
    assert "seed 0" in capsys.readouterr().err.splitlines()[-1]
    assert saved("other")["step"] == 4


# ---- what is saved


def test_a_checkpoint_holds_tensors_and_plain_values(script, whole):
    content = saved(whole)
    found = dict(leaves(content))  # fails on anything else
    assert content["step"] == 40 and ("agent", "obs_mean") in found
    assert content["config"] == yaml.safe_load((whole / "config.yaml").read_text())
    assert content["about"] == json.loads((whole / "environment.json").read_text())
    adams = [name for name in content["agent"] if name.endswith("_adam.steps")]
    assert adams and all(content["agent"][name].max() > 0 for name in adams)
    names = {"config", "environment", "metrics", "episodes", "checkpoint", "result", "lock"}
    assert {path.stem for path in whole.iterdir()} == names
    assert agent_of(script).__name__ == content["about"]["algorithm"]


def test_logs_have_one_row_for_each_update_and_seed(script, whole):
    assert script
    metrics, episodes = rows(whole / "metrics.jsonl"), rows(whole / "episodes.jsonl")
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
            for name in ("return", "score", "length"):
                assert row[f"eval/{name}"] == pytest.approx(np.mean([r[name] for r in own]))


def test_logged_metrics_are_means_over_their_interval(script, monkeypatch):
    agent_class, seen = agent_of(script), []
    update = agent_class.update

    def patched(self, batch, noise, *variant):
        seen.append({k: v.numpy().copy() for k, v in update(self, batch, noise, *variant).items()})
        return {k: torch.as_tensor(v) for k, v in seen[-1].items()}

    monkeypatch.setattr(agent_class, "update", patched)
    assert script.main(long(script, env_id="none")) == 0
    start = 0
    for row in rows("run/metrics.jsonl"):
        interval = seen[start : row["update"]]
        for name in {name for each in interval for name in each}:  # some stand in some updates only
            values = [each[name][row["seed"] - 5] for each in interval if name in each]
            assert row[f"train/{name}"] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-7)
        if row["seed"] == 6:
            start = row["update"]


def test_an_update_leaves_no_tensor_behind(script, monkeypatch):
    """A tensor kept of each update splits the memory that the next needs (14 MiB, in Cal-QL)."""
    alive = {}

    def count(_, at):
        if at in (25, 31):  # amid the same interval, of the same chunk of random numbers
            gc.collect()  # whatever other tests left
            alive[at] = sum(type(each) is torch.Tensor for each in gc.get_objects())

    before_update(monkeypatch, script, count)
    assert script.main(long(script, env_id="none", log_every=1000)) == 0
    assert alive[25] == alive[31]


def test_progress_is_plain_lines_without_a_terminal(iql, capsys, monkeypatch):
    """One every half a minute, with updates a second and the time left."""
    moments = iter(range(0, 10**6, 10))  # a clock that leaps
    monkeypatch.setattr("tqdm.std.time", lambda: next(moments))
    assert iql.main(long(iql, env_id="none")) == 0
    lines = re.findall(r"\S.* left", capsys.readouterr().out)  # all but carriage returns
    shape = r"\d+/40 updates, .*updates.*, .* left"
    assert len(lines) > 5 and all(re.fullmatch(shape, line) for line in lines), lines


# ---- wandb


def test_wandb_keeps_its_page_on_resume(iql, monkeypatch):
    """Against a stand-in that records what it is told; the page is that of metrics.jsonl."""
    inits, logged = [], {}

    def log(values, step):
        logged.update({(step, name): value for name, value in values.items()})

    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=log, finish=lambda: inits.append("finished"))
    fake.init = lambda **settings: inits.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    crash_at(monkeypatch, iql, long(iql, wandb="offline"), 23)
    assert iql.main([*RESUME, "--wandb", "online"]) == 0
    first, second, end = inits
    assert (first["mode"], second["mode"], end) == ("offline", "online", "finished")
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert Path(first["dir"]) == Path("run") and first["project"] == "stitch"
    assert first["config"] == yaml.safe_load(Path("run/config.yaml").read_text())
    expected = {
        (row["update"], f"{name}/seed{row['seed']}"): value
        for row in rows("run/metrics.jsonl")
        for name, value in row.items()
        if "/" in name
    }
    assert {k: v for k, v in logged.items() if not k[1].startswith("time/")} == expected


def test_a_start_without_wandb_is_made_again_from_the_same_checkpoint(iql, monkeypatch, capsys):
    """No run is left there that would go on without it, from its first update."""
    assert iql.main(words(run_dir="first", num_seeds=2)) == 0
    argv = words(run_dir="run", checkpoint="first", num_updates=9, num_seeds=2)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert iql.main([*argv, "--wandb", "online"]) == 2
    assert "use offline or disabled" in capsys.readouterr().err
    assert iql.main(["--run_dir", "run", "--resume", "true"]) == 2
    assert iql.main([*argv, "--resume", "true"]) == 0
    assert json.loads(Path("run/environment.json").read_text())["checkpoint"] == "first"
    assert min(row["update"] for row in rows("run/metrics.jsonl")) >= 6


def test_the_command_to_go_on_is_one_that_a_shell_reads(iql, monkeypatch, capsys):
    real, calls = iql.env_step, []

    def patched(env, action=None, seed=None):
        calls.append(None)
        if len(calls) == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(env, action, seed)

    monkeypatch.setattr(iql, "env_step", patched)
    assert iql.main(long(iql, run_dir="my  run's")) == 130
    told = capsys.readouterr().err.splitlines()[-1].partition("to go on: ")[2]
    assert shlex.split(told)[2:] == ["--run_dir", "my  run's", "--resume", "true"]


def test_a_signal_before_the_run_says_that_it_stopped(iql, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(iql, "load_dataset", interrupted)
    assert iql.main(long(iql)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: stopped"


def test_wandb_offline_needs_no_login_and_no_network(iql):
    pytest.importorskip("wandb")
    dropped = ("WANDB", "NETRC", "HTTP", "HTTPS", "ALL_PROXY", "NO_PROXY", "PYTEST")
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(dropped)}
    dead = "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, iql.__file__, *words(wandb="offline", env_id="none")],
        env={**kept, "HOME": os.getcwd(), "HTTP_PROXY": dead, "HTTPS_PROXY": dead},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(Path("run").glob("wandb/offline-run-*/*.wandb"))


def test_scripts_and_their_runs_are_told_apart(iql, refused):
    """A folder or a checkpoint of another algorithm is refused, whatever fields they share.

    By its fields; no data is for both the Decision Transformer and its discrete kind.
    """
    fields = {n: set(load_script(n).TrainConfig.__dataclass_fields__) for n in SCRIPTS}
    alike = [(a, b) for a in SCRIPTS for b in SCRIPTS if a != b and fields[a] <= fields[b]]
    assert alike == [("dt", "discrete_dt")]
    bc = load_script("bc")
    assert bc.main(words()) == 0
    refused(iql, words(run_dir="warm", checkpoint="run"), "checkpoint")
    refused(iql, words(), "run")
    refused(iql, RESUME, "run")
    Path("run/result.json").unlink()
    refused(iql, words(resume="true"), "run")
    assert json.loads(Path("run/environment.json").read_text())["script"] == "bc"
    assert yaml.safe_load(Path("run/config.yaml").read_text())["dataset_id"] == TOY
