"""The speed benchmark: what it counts, its table, its errors."""

import argparse
import json
import time

import gymnasium as gym
import pytest
import torch
from conftest import DISCRETE, SCRIPTS, load_script, load_tool

speed = load_tool("benchmarks/speed.py")

QUICK = ["--members", "2", "--modes", "eager", "--seconds", "0.02", "--rounds", "2"]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return speed.Training("bc", 2, "eager", "cpu", tmp_path_factory.mktemp("speed"))


def test_flops_are_those_of_the_matrix_products(training):
    """BC: 11-256-256-3 at batch 256; backward lacks the product for the first layer's input."""
    forward = 2 * 256 * (11 * 256 + 256 * 256 + 256 * 3)
    first = 2 * 256 * 11 * 256
    assert speed.count_flops(training) == 2 * (3 * forward - first)


def test_products_are_those_of_the_update(training):
    products = speed.Products(training)
    calls, again = products.updates
    names = [func.__name__.split(".")[0] for func, *_ in calls]
    assert names == ["baddbmm"] * 3 + ["bmm"] * 5 and len(again) == len(calls)
    shapes = [tuple(func(*args, **kwargs).shape) for func, args, kwargs in calls[:3]]
    assert shapes == [(2, 256, 256), (2, 256, 256), (2, 256, 3)]
    strides = {args[1].stride() for _, args, _ in calls[3:]}
    assert any(stride[-1] != 1 for stride in strides), "transposed products stay transposed"


def test_products_of_one_member(tmp_path):
    """Its critics read one batch, expanded without a copy."""
    products = speed.Products(speed.Training("iql", 1, "eager", "cpu", tmp_path))
    strides = [args[1].stride() for _, args, _ in products.updates[0]]
    assert any(0 in stride for stride in strides)
    products.window(0.01)
    assert products.speeds[0] > 0


def test_a_delayed_policy_counts_half(tmp_path):
    """TD3+BC's moves in every second update: products and FLOPs are the mean of the two."""
    training = speed.Training("td3_bc", 2, "eager", "cpu", tmp_path)
    products = speed.Products(training)
    critics, both = sorted(products.updates, key=len)
    assert len(critics) < len(both)
    made = []
    products.turns = map(lambda calls: made.append(calls) or calls, products.turns)
    for _ in range(4):
        products.update()
    assert made == 2 * products.updates
    counts = []
    for _ in range(2):
        with speed.FlopCounterMode(display=False) as counter:
            training.update()
        counts.append(counter.get_total_flops())
    assert speed.count_flops(training) == sum(counts) / 2 and counts[0] != counts[1]


def test_windows_run_whole_updates(training):
    before, weights = training.run.step, training.run.agent.actor.layers[0].weight.clone()
    training.window(0.05)
    assert training.run.step > before and training.speeds[-1] > 0
    assert not torch.equal(weights, training.run.agent.actor.layers[0].weight)


def test_shares_add_up(training):
    shares = speed.profile(training, 5)
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert shares["products"] > 0 and shares["optimizer"] > 0 and shares["sampling"] > 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_data_of_its_actions(name):
    """So that the command without names measures all."""
    script, data = load_script(name), speed.data_of(name)
    cfg = script.TrainConfig(dataset_id=data, download=False)
    metadata = json.loads((script.find_dataset(cfg) / "metadata.json").read_text())
    kind = json.loads(metadata["action_space"])["type"]
    assert kind == ("Discrete" if name in DISCRETE else "Box")


def test_json_table_and_readme(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{speed.BEGIN}\nold\n{speed.END}\nafter\n")
    argv = ["bc", *QUICK, "--out", str(tmp_path / "speed.json"), "--readme", str(readme)]
    assert speed.main(argv) == 0
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert (row["algorithm"], row["members"], row["mode"]) == ("bc", 2, "eager")
    assert row["in_all"] == 2 * row["updates_per_second"] and 0 < row["host_share"] < 1
    assert row["flops"] > 0
    table = readme.read_text()
    assert table.startswith(f"before\n{speed.BEGIN}\n| script |")
    assert f"| bc | 2 | {row['updates_per_second']:.1f} |" in table and "old" not in table
    assert f"{row['updates_per_second']:.1f}" in capsys.readouterr().out
    argv = ["discrete_bcq", *QUICK, "--out", str(tmp_path / "numbered.json")]
    assert speed.main(argv) == 0


@pytest.mark.parametrize("case", ["script", "readme"])
def test_errors_are_one_line(case, tmp_path, capsys):
    argv = ["nothing" if case == "script" else "bc", *QUICK, "--out", str(tmp_path / "s.json")]
    if case == "readme":
        (tmp_path / "README.md").write_text("nothing here\n")
        argv += ["--readme", str(tmp_path / "README.md")]
    assert speed.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    if case == "readme":
        assert (tmp_path / "README.md").read_text() == "nothing here\n"


def test_a_device_that_is_not_there(tmp_path, capsys):
    argv = ["bc", *QUICK, "--device", "cuda:77", "--out", str(tmp_path / "s.json")]
    assert speed.main(argv) == 2
    assert (
        capsys.readouterr().err
        == "error: device 'cuda:77' is not to be had here: use cpu or cuda\n"
    )


def test_cuda_graphs_on_a_cpu(tmp_path, capsys):
    argv = ["bc", "--modes", "graphs", "--device", "cpu", "--out", str(tmp_path / "s.json")]
    assert speed.main(argv) == 2
    told = "error: --modes graphs is for cuda: leave it out, or add --device\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("words", [("--members", "0"), ("--rounds", "0"), ("--seconds", "-1")])
def test_numbers_below_one(words, capsys):
    with pytest.raises(SystemExit) as ending:
        speed.main(["bc", *words])
    assert ending.value.code == 2
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_host_time_is_the_loop_without_the_update(training, monkeypatch):
    monkeypatch.setattr(training.run.cfg, "log_every", 20)
    called = []
    monkeypatch.setattr(training.run, "log_metrics", lambda *given: called.append(given))
    before = training.run.agent.actor.layers[0].weight.clone()
    assert 0 < speed.host_seconds(training) < 0.1
    assert called and torch.equal(before, training.run.agent.actor.layers[0].weight)
    training.update()
    assert not torch.equal(before, training.run.agent.actor.layers[0].weight)


def test_peak_memory_is_the_process_s_own():
    """Not that of the benchmark, which holds many trainings."""
    run = {"num_updates": 1, "compile": "false", "num_seeds": 1}
    first, seconds, before = speed.process("bc", **run)
    assert 0 < first < seconds
    held = torch.ones(2**28)  # 1 GiB
    after = speed.process("bc", **run)[2]
    assert held.all() and 100 < before and abs(after - before) < 300


def test_online_bookkeeping_is_what_update_policy_and_environment_leave(tmp_path, monkeypatch):
    """Slowing the environment down lowers its share; a script without the phase has none."""
    args = argparse.Namespace(device="cpu", seconds=0.05)
    share = speed.online_share("td3_bc", args, tmp_path / "a")
    step = gym.wrappers.TimeLimit.step
    monkeypatch.setattr(
        gym.wrappers.TimeLimit, "step", lambda self, action: time.sleep(0.1) or step(self, action)
    )
    slowed = speed.online_share("td3_bc", args, tmp_path / "b")
    assert 0 < slowed < 0.7 * share < 0.5
    assert speed.online_share("bc", args, tmp_path) is None


def test_the_table_of_processes():
    found = {"first_update_seconds": 4.44, "run_of_100_updates_and_10_episodes_seconds": 12.0}
    found |= {"peak_memory_mib": {1: 300, 4: 400}, "online_share": 0.0321}
    evaluation = {"episodes": 40, "evaluation_seconds": 7.0, "steps_per_second": 5750.0}
    evaluation["loading_seconds"] = 0.84
    text = speed.whole_table({"whole": {"iql": found}, "evaluation": evaluation})
    assert "| iql | 4.4 |  |  | 12.0 | 0.032 | 300 | 400 |" in text
    assert "40 whole Hopper episodes of four members together in 7.0 s, 5,750 steps/s" in text


def test_a_process_that_fails():
    with pytest.raises(speed.SpeedError, match=r"bc ended with 2: .*batch_size"):
        speed.process("bc", batch_size=0)
