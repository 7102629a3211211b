"""tools/sweep.py: what is planned, run, tried again, gone on with and told."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, TOY, contents, load_script, load_tool, words
from test_runs import rows

SMALL = {"dataset_id": TOY, "env_id": "auto", "batch_size": 8, "hidden_dim": 16}
SMALL |= {"ref_min_score": -160, "ref_max_score": -20, "eval_episodes": 1}
SMALL |= {"final_eval_episodes": 1, "compile": "false"}


@pytest.fixture
def sweep():
    module = load_tool("tools/sweep.py")
    yield module
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # main has a handler of its own


def line(*more, **settings) -> list[str]:
    pairs = [f"{name}={value}" for name, value in {**SMALL, **settings}.items()]
    start = "--algorithms bc --tasks hopper-medium --out out".split()
    return [*start, *more, "--set", *pairs]


def stand_in(sweep, name: str, code: str = ""):
    """A job that is no training: it notes that it ran, and ends."""
    folder = Path("out", name).resolve()
    lines = ["import json, os, pathlib, sys", f"folder = pathlib.Path({str(folder)!r})"]
    lines += ["folder.mkdir(parents=True, exist_ok=True)"]
    names = ("config.yaml", "environment.json")
    lines += [f"(folder / {name!r}).write_text('{{}}')" for name in names]
    lines += ["print('ran', flush=True)", code or "(folder / 'result.json').write_text('{}')"]
    config = {"dataset_id": "", "fallback_dataset_id": ""}
    command = [sys.executable, "-c", "\n".join(lines)]
    return sweep.Job("bc", folder, command, config, config, 10, os.getcwd())


def ran(job) -> int:
    return job.log.read_text().split("\n").count("ran")


# ---- the plan


def test_every_combination_has_a_folder_of_its_own(sweep):
    argv = ["--algorithms", "bc", "bc_10", "--tasks", "hopper-medium", "pen-human"]
    argv += ["--seeds", "0", "4", "--set", "actor_lr=1e-3,3e-4", "num_seeds=4", "--out", "out"]
    jobs = sweep.plan(sweep.parse(argv))
    assert len(jobs) == len({job.folder for job in jobs}) == 16
    first = jobs[0]
    assert first.folder == Path("out/bc/hopper-medium/actor_lr=1e-3/s0").resolve()
    assert first.config["actor_lr"] == 1e-3 and first.config["num_seeds"] == 4
    assert [first.command[i] for i in (0, 2, -2, -1)] == [
        sys.executable,
        "--config",
        "--resume",
        "true",
    ]
    assert {Path(job.command[1]).name for job in jobs} == {"bc.py"}
    assert {job.config["top_fraction"] for job in jobs if job.algorithm == "bc_10"} == {0.1}


def test_a_file_and_the_words_that_take_its_place(sweep):
    text = {"algorithms": ["bc"], "tasks": ["hopper-medium"], "seeds": [3], "out": "here"}
    text["settings"] = {"num_updates": 7, "actor_lr": [1e-3, 1e-4]}
    Path("s.yaml").write_text(yaml.safe_dump(text))
    (one, two) = sweep.plan(sweep.parse(["s.yaml", "--set", "num_updates=9", "--out", "there"]))
    assert (one.updates, two.updates) == (9, 9) and one.config["seed"] == 3
    assert one.folder == Path("there/bc/hopper-medium/actor_lr=0.001/s3").resolve()
    cal_ql = sweep.plan(sweep.parse([*"--algorithms cal_ql --tasks antmaze-umaze --out o".split()]))
    config = cal_ql[0].config
    assert config["online_steps"] and cal_ql[0].updates == config["num_updates"] + (
        config["online_steps"] * config["updates_per_step"]
    )


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--tasks", "hopper-medium", "--out", "o"], "algorithms"),
        (["--algorithms", "bc", "--out", "o"], "tasks"),
        (["--algorithms", "bc", "--tasks", "hopper-medium"], "out"),
        (["--algorithms", "sac", "--tasks", "hopper-medium", "--out", "o"], "sac"),
        (["--algorithms", "bc", "--tasks", "hoper", "--out", "o"], "hoper"),
        (line(actor_lr="fast"), "actor_lr"),
        (line(expectile=0.7), "expectile"),
        (line(actor_lr="1e-3,3"), "actor_lr"),
        ([*line(), "--seeds", "x"], "--seeds"),
        ([*line("--seeds", "1", "0"), "num_seeds=2"], "train seed 1"),
        (line("--algorithms", "bc"), "name all once"),
        ([*line(), "--set", "batch_size=9"], "twice"),
        (line(seed=1), "seed comes of seeds"),
        (line(run_dir="here"), "run_dir comes of out"),
        (line(config="other.yaml"), "config comes of"),
        (["nested.yaml"], "['bc']"),
        (["empty.yaml"], "num_updates has no value"),
        (["none_label.yaml"], "label"),
        (["again.yaml"], "num_updates more than once"),
        ([*line(), "alone"], "alone"),
        (line("--workers", "-1"), "--workers"),
        (["none.yaml"], "none.yaml"),
        (["list.yaml"], "list.yaml"),
        (["kinds.yaml"], "tasks"),
        (["more.yaml"], "task"),
        (["broken.yaml"], "broken.yaml"),
        (["deep.yaml"], "deep.yaml"),
        (["workers.yaml"], "there is no workers"),
        (["no_seeds.yaml"], "seeds: nothing is named"),
        (line("--tasks", "../iql/hopper-medium"), "is a path"),
        (line(actor_lr="1e-3,0.001"), "the same settings"),
        (line("--slurm", "sweep.yaml"), "the file goes before"),
    ],
)
def test_a_sweep_that_makes_no_sense(sweep, capsys, argv, named):
    Path("list.yaml").write_text("- a\n")
    Path("kinds.yaml").write_text("tasks: hopper-medium\n")
    Path("more.yaml").write_text("task: [hopper-medium]\n")
    Path("broken.yaml").write_text("a: [")
    start = "tasks: [hopper-medium]\nout: o\nalgorithms: "
    Path("nested.yaml").write_text(f"{start}[[bc]]\n")
    Path("empty.yaml").write_text(f"{start}[bc]\nsettings: {{num_updates: []}}\n")
    Path("none_label.yaml").write_text(f"{start}[bc]\nsettings: {{label: null}}\n")
    Path("deep.yaml").write_text("[" * 5000)
    Path("workers.yaml").write_text("workers: 4\n")
    Path("no_seeds.yaml").write_text(f"{start}[bc]\nseeds: []\n")
    Path("again.yaml").write_text(f"{start}[bc]\nsettings: {{num_updates: 2, num_updates: 3}}\n")
    before = contents()
    assert sweep.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert contents() == before


def test_values_with_slashes_stay_in_the_folder_and_a_mapping_is_one_value(sweep):
    argv = line(checkpoint="../../../a,../b", env_kwargs="{a: 1, b: 2}")
    jobs = sweep.plan(sweep.parse(argv))
    assert {job.folder.parents[1] for job in jobs} == {Path("out/bc/hopper-medium").resolve()}
    assert [job.config["checkpoint"] for job in jobs] == ["../../../a", "../b"]
    assert jobs[0].config["env_kwargs"] == {"a": 1, "b": 2}


def test_a_checkpoint_of_any_name_is_the_same_one(sweep):
    Path("environment.json").write_text(json.dumps({"checkpoint": "runs/\U0001f600"}))
    assert sweep.read(Path("environment.json")) == {"checkpoint": "runs/\U0001f600"}


@pytest.mark.parametrize(
    "package, words",
    [
        ("submitit", ["--slurm", "nonsense"]),
        ("submitit", ["slurm.yaml", "--slurm", "local"]),
        ("ray", ["--address", "nonsense"]),
    ],
)
def test_a_cluster_that_does_not_start_is_one_line(sweep, capsys, package, words):
    pytest.importorskip(package)
    Path("slurm.yaml").write_text("slurm: {timeout_min: abc}\n")
    assert sweep.main([*words[:-2], *line(*words[-2:])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and " ".join(words[-2:]) in error


def test_where_nobody_listens_any_more_the_runs_go_on():
    code = f"import sys; sys.path.append({str(REPOSITORY / 'tools')!r}); import sweep\n"
    code += "sys.stdin.read(); sweep.say('a'); sweep.say('b'); sys.exit(7)"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 7
    process.stderr.close()


@pytest.mark.parametrize("text", ["", "- a", "a: [", "\0"])
def test_a_finished_run_whose_config_is_broken(sweep, capsys, text):
    folder = Path("out/bc/hopper-medium/s0")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    (folder / "config.yaml").write_text(text)
    assert sweep.main(line()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.yaml" in error


def test_flags_that_are_given_again_add_to_the_first(sweep):
    argv = [*line("--tasks", "pen-human", "--seeds", "1"), "--seeds", "2", "--set", "tau_x=1"]
    args = sweep.parse(argv)
    assert (args.tasks, args.seeds) == (["hopper-medium", "pen-human"], [1, 2])
    assert {**SMALL, "tau_x": 1}.keys() == args.settings.keys()


def test_values_of_a_file_reach_the_script_as_they_are(sweep):
    values = {"env_kwargs": {"scale": 1e-5, "a": None, "b": "x\n{y"}, "label": "no, yes: 'it'"}
    values |= {"ref_min_score": None, "normalize_obs": True, "actor_lr": 1e-5}
    text = {"algorithms": ["bc"], "tasks": ["hopper-medium"], "out": "o", "settings": values}
    Path("s.yaml").write_text(yaml.safe_dump(text))
    (job,) = sweep.plan(sweep.parse(["s.yaml"]))
    assert values.items() <= job.config.items()
    assert load_script("bc").parse(load_script("bc").TrainConfig, job.command[2:]).label


def finished(folder, config: dict, checkpoint=None):
    """What a run leaves, of these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"checkpoint": checkpoint}))


OTHER = {
    "a setting": ({"batch_size": 9}, None, "batch_size is 9 there, not 8"),
    "data": ({"dataset_id": "datasets/x-v0"}, None, "dataset_id"),
    "environment": ({"env_id": "Hopper-v5"}, None, "env_id is 'Hopper-v5' there, not 'auto'"),
    "whence it began": ({}, "runs/a", "checkpoint is 'runs/a' there, not ''"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(sweep, capsys, case):
    (job,) = sweep.plan(sweep.parse(line()))
    change, checkpoint, problem = OTHER[case]
    finished(job.folder, {**job.config, **change}, checkpoint)
    assert sweep.main(line()) == 2 and problem in capsys.readouterr().err
    assert problem in sweep.run(job)  # that another sweep has made since this one was planned


def test_a_run_on_the_fallback_or_of_an_older_script_is_finished(sweep, capsys):
    argv = line(dataset_id="D4RL/none/there-v0", fallback_dataset_id=TOY)
    (job,) = sweep.plan(sweep.parse(argv))
    own = {**job.config, "dataset_id": TOY, "fallback_dataset_id": "", "env_id": "auto"}
    own |= {"ref_min_score": None, "ref_max_score": None}
    finished(job.folder, {**own, "env_id": "Pendulum-v1"})  # chosen for those data
    assert sweep.main(argv) == 2
    del own["max_envs"]  # as what came later is usually set
    finished(job.folder, own)
    assert sweep.main([*argv, "max_envs=3"]) == 2
    assert "max_envs is 64 there, not 3" in capsys.readouterr().err
    assert sweep.main(argv) == 0 and not job.log.exists()
    out = capsys.readouterr().out
    assert "1 of them finished" in out and f"other data: 1 runs are of {TOY}, not of D4" in out


# ---- running


def test_a_run_that_fails_is_tried_twice_and_then_told(sweep, monkeypatch, capsys):
    fails = stand_in(sweep, "fails", "sys.exit('error: no such thing')")
    once = "(folder / 'tried').exists() or (sys.exit(2 * ((folder / 'tried').write_text('') + 1)))"
    second = stand_in(sweep, "second", f"{once}; (folder / 'result.json').write_text('')")
    jobs = [fails, second, stand_in(sweep, "good")]
    monkeypatch.setattr(sweep, "plan", lambda _: jobs)
    assert sweep.main(line()) == 1
    out, err = capsys.readouterr()
    assert "3 runs in out, 0 of them finished" in out and "2 of 3 done, 0 running, 1 failed" in out
    assert err.count("\n") == 1 and str(fails.folder) in err and "no such thing" in err
    assert [ran(job) for job in jobs] == [2, 2, 1]
    assert sweep.main(line()) == 1  # what is finished is not run again
    assert [ran(job) for job in jobs] == [4, 2, 1]


def test_a_run_that_an_earlier_sweep_left_behind_is_waited_for(sweep):
    job = stand_in(sweep, "held")
    job.folder.mkdir(parents=True)
    with open(job.folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=sweep.run, args=(job,))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not job.log.exists()
        for name in ("config.yaml", "environment.json", "result.json"):  # its process ends
            (job.folder / name).write_text("{}")
    thread.join(10)
    assert not thread.is_alive() and not job.log.exists()


def test_killed_and_started_again_it_loses_and_repeats_nothing(sweep, capsys):
    """Its runs outlive it: the next sweep waits for them, and goes on with what was stopped."""
    settings = {"num_updates": 900, "eval_every": 300, "log_every": 100, "checkpoint_every": 100}
    argv = line("--seeds", "0", "1", "2", "--workers", "2", **settings)
    command = [sys.executable, REPOSITORY / "tools" / "sweep.py", *argv]
    folders = [Path("out/bc/hopper-medium", f"s{seed}") for seed in range(3)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not (folders[0] / "checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    owner = (folders[0] / "lock").read_text().split()[1]
    os.kill(int(owner), signal.SIGKILL)  # one of its runs is gone, the other goes on
    assert sweep.main(argv) == 0
    assert "3 of 3 done" in capsys.readouterr().out
    bc = load_script("bc")
    for seed, folder in enumerate(folders):
        assert bc.main(words(**{**SMALL, **settings, "seed": seed, "run_dir": f"alone{seed}"})) == 0
        for name in ("metrics.jsonl", "episodes.jsonl"):
            logs = [rows(place / name) for place in (folder, Path(f"alone{seed}"))]
            assert logs[0] == logs[1]
    before = contents("out")
    assert sweep.main(argv) == 0 and contents("out") == before
    other = [word.replace("batch_size=8", "batch_size=9") for word in argv]
    assert sweep.main(other) == 2
    assert "batch_size is 8 there, not 9" in capsys.readouterr().err
    assert contents("out") == before


def test_interrupted_it_stops_its_runs(sweep, monkeypatch, capsys):
    code = "import time, signal; signal.signal(15, lambda *_: sys.exit(130)); time.sleep(60)"
    jobs = [stand_in(sweep, name, code) for name in "abc"]
    monkeypatch.setattr(sweep, "plan", lambda _: jobs)

    def interrupt():
        while not all(job.log.exists() and ran(job) for job in jobs[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    assert sweep.main(line("--workers", "2")) == 130 and time.monotonic() - began < 20
    assert capsys.readouterr().err == "interrupted: the same command goes on\n"
    until = time.monotonic() + 20
    while sweep.CHILDREN:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert [ran(job) for job in jobs[:2]] == [1, 1] and not jobs[2].log.exists()


def test_interrupted_no_other_run_begins_and_none_is_waited_for(sweep):
    """Neither a second attempt of what a signal ended at once, nor a run that has an owner."""
    job, held = stand_in(sweep, "a", "os.kill(os.getpid(), 15)"), stand_in(sweep, "held")
    assert sweep.run(job) == "ran" and ran(job) == 1
    held.folder.mkdir(parents=True)
    with open(held.folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=sweep.run, args=(held,))
        thread.start()
        sweep.STOPPED.add("now")
        thread.join(10)
        assert not thread.is_alive() and not held.log.exists()


def test_a_run_that_begins_as_a_signal_comes_is_stopped(sweep, monkeypatch):
    begin = sweep.subprocess.Popen

    def signalled(*args, **options):
        sweep.STOPPED.add("now")
        return begin(*args, **options)

    monkeypatch.setattr(sweep.subprocess, "Popen", signalled)
    began = time.monotonic()
    assert sweep.run(stand_in(sweep, "a", "import time; time.sleep(60)"))
    assert time.monotonic() - began < 20


def test_relative_paths_start_where_the_user_is(sweep):
    code = "print(os.getcwd()); (folder / 'result.json').write_text('{}')"
    job = stand_in(sweep, "a", code)
    assert sweep.run(job) == "" and str(Path.cwd()) in job.log.read_text().split("\n")


def test_on_a_ray_cluster_of_two_workers(sweep, monkeypatch, capsys):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    import ray

    jobs = [stand_in(sweep, name) for name in "abc"]
    jobs += [stand_in(sweep, "fails", "sys.exit('error: no such thing')")]
    monkeypatch.setattr(sweep, "plan", lambda _: jobs)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        assert sweep.main(line("--address", cluster.address)) == 1
        out, err = capsys.readouterr()
        assert "3 of 4 done, 0 running, 1 failed" in out and "no such thing" in err
        assert [ran(job) for job in jobs] == [1, 1, 1, 2]
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_through_submitit(sweep, monkeypatch, capsys):
    pytest.importorskip("submitit")
    jobs = [stand_in(sweep, "a"), stand_in(sweep, "fails", "sys.exit('error: no such thing')")]
    monkeypatch.setattr(sweep, "plan", lambda _: jobs)
    assert sweep.main(line("--slurm", "local")) == 1
    out, err = capsys.readouterr()
    assert "1 of 2 done, 0 running, 1 failed" in out and "no such thing" in err
    assert [ran(job) for job in jobs] == [1, 2]


# ---- what it tells


def test_the_time_that_is_left(sweep, monkeypatch):
    """bc takes 100 s a run, of which two are half done; of iql nothing is known yet: 100 s, too.

    What went by before their first rows, 1,000 s here, is no pace.
    """
    jobs = [stand_in(sweep, name) for name in "abcd"]
    jobs[3].algorithm = "iql"
    for job, update in zip(jobs, (None, 2, None, None), strict=True):
        job.folder.mkdir(parents=True)
        if update:
            (job.folder / "metrics.jsonl").write_text(json.dumps({"update": update}) + "\n")
    now = time.time()
    monkeypatch.setattr(sweep.time, "time", lambda: now)
    watch = sweep.Watch(jobs, [Future() for _ in jobs], 0)
    assert not watch.look() and watch.seconds_left() is None
    for job in jobs[:2]:
        job.log.write_text("")
        os.utime(job.log, (now, now))
    assert not watch.look() and len(watch.began) == 2 and not watch.first
    now += 1000
    for updates in ((1, 3), (6, 8)):
        now += 50
        for job, update in zip(jobs, updates, strict=False):
            (job.folder / "metrics.jsonl").write_text(f'{{"update": {update}}}\n')
        assert not watch.look()
    assert watch.seconds_left() == pytest.approx((40 + 20 + 100 + 100) / 2)


def test_a_run_that_is_cut_back_to_its_checkpoint_is_timed_from_there(sweep, monkeypatch):
    """Killed at 90 %, it goes on at 30 %; then it fails at 60 % and is tried again: 10 s a row."""
    job, now = stand_in(sweep, "a"), time.time()
    monkeypatch.setattr(sweep.time, "time", lambda: now)
    job.folder.mkdir(parents=True)
    rows = job.folder / "metrics.jsonl"
    rows.write_text('{"update": 9}\n')
    watch = sweep.Watch([job], [Future()], 0)
    job.log.write_text("")
    os.utime(job.log, (now, now))
    for update, left in ((3, None), (4, None), (5, 50), (6, 40), (0, None), (1, None), (2, 80)):
        rows.write_text(f'{{"update": {update}}}\n')
        assert not watch.look()
        if left:
            assert watch.seconds_left() == pytest.approx(left)
        now += 10


def test_a_row_that_is_being_written_is_no_progress_yet(sweep):
    job = stand_in(sweep, "a")
    assert job.done() == 0
    job.folder.mkdir(parents=True)
    for text in ("", '{"upda', '{"update": 5}', "[]\n"):
        (job.folder / "metrics.jsonl").write_text(text)
        assert job.done() == 0
    (job.folder / "metrics.jsonl").write_text('{"update": 4}\n{"up')
    assert job.done() == 0.4
    (job.folder / "metrics.jsonl").write_text('{"update": 4}\n{"update": 5}\n')
    assert job.done() == 0.5
