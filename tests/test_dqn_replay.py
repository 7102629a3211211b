"""DQN's replay logs: their layout, padding, stale rows, cuts and limits, files that are broken."""

import gzip
import http.server
import pickle
import re
import threading

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import load_script, load_tool

replay = load_tool("datasets/dqn_replay.py")
TABLE = replay.read_table()
ROWS = 40


def write_array(folder, name, shard, values):
    with gzip.open(folder / replay.file_name(name, shard), "wb") as file:
        np.save(file, values)


def write_shard(folder, shard=0, ends=(9, 24), rows=ROWS, count=ROWS - 1, padding=3, **changes):
    """A shard as Dopamine writes it: `padding` rows of zeros before each episode but the first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(shard)
    arrays = {"observation": rng.integers(1, 256, (rows, 84, 84), np.uint8)}
    arrays["action"] = rng.integers(1, 4, rows).astype(np.int32)
    arrays["reward"] = rng.choice(np.float32([-1, 0, 1]), rows)
    arrays["terminal"] = np.isin(np.arange(rows), ends).astype(np.uint8)
    for end in ends:
        for name in ("observation", "action", "reward"):
            arrays[name][end + 1 : end + 1 + padding] = 0
    arrays["add_count"] = np.array(count)
    for name, values in {**arrays, **changes}.items():
        if values is not None:
            write_array(folder, name, shard, values)
    return arrays


@pytest.fixture
def logs(tmp_path):
    return tmp_path / "logs" / "Breakout" / "1" / "replay_logs"


def convert(folder, *options):
    """(episodes, metadata) of what the command writes."""
    words = ["breakout", "--folder", str(folder), "--shards", "0", "--force", *options]
    assert replay.main(words) == 0
    (file,) = minari.storage.get_dataset_path().rglob("metadata.json")
    dataset = minari.MinariDataset(file.parent)
    return list(dataset.iterate_episodes()), dataset.storage.metadata


def check_error(capsys, *argv, **kwargs):
    """Run a bad command: exit code 2, one line on stderr, which is returned, nothing stored."""
    assert replay.main([str(word) for word in argv], **kwargs) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not list(minari.storage.get_dataset_path().rglob("*.json"))
    return error


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch, own_store):  # noqa: ARG001 (which it follows)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))


# ---- episodes


def test_episodes_have_no_padding_no_stale_row_and_true_next_frames(logs):
    arrays = write_shard(logs)
    episodes, metadata = convert(logs)
    rows = [(0, 10, True), (13, 25, True), (28, 39, False)]
    assert len(episodes) == 3
    for episode, (start, stop, terminated) in zip(episodes, rows, strict=True):
        frames, steps = arrays["observation"][start:stop], slice(start, stop - (not terminated))
        last = [np.zeros((1, 84, 84), np.uint8)] if terminated else []
        np.testing.assert_array_equal(episode.observations, np.concatenate([frames, *last]))
        np.testing.assert_array_equal(episode.actions, arrays["action"][steps])
        np.testing.assert_array_equal(episode.rewards, arrays["reward"][steps])
        assert (episode.observations.dtype, episode.actions.dtype) == (np.uint8, np.int64)
        assert len(episode.observations) == len(episode.rewards) + 1
        ends = episode.terminations, episode.truncations
        assert not any(end[:-1].any() for end in ends)
        assert (ends[0][-1], ends[1][-1]) == (terminated, False)  # a cut is no end
    counts = {"source_rows": 39, "stale_rows": 1, "padding": 6, "episodes": 3, "steps": 32}
    assert metadata["counts"] == {**counts, "terminated": 2, "cut": 1, "timed_out": 0}
    assert metadata["total_steps"] == 32


def test_frames_are_compressed_a_chunk_each(logs):
    write_shard(logs)
    convert(logs)
    path = minari.storage.get_dataset_path("dqn-replay/breakout/run1-shards-0-v0")
    with replay.d4rl.h5py.File(path / "data" / "main_data.hdf5") as file:
        frames = file["episode_0/observations"]
        assert frames.compression == "gzip" and frames.chunks == frames.shape == (11, 84, 84)


def test_padding_is_zeros_only_and_three_rows_at_most(logs):
    """A played action or a black frame deeper in the episode is no padding."""
    arrays = write_shard(logs, ends=(9,), padding=5)
    episodes, metadata = convert(logs)
    assert metadata["counts"]["padding"] == 3 and len(episodes[1].rewards) == 38 - 13
    arrays["action"][10] = 2
    write_array(logs, "action", 0, arrays["action"])
    episodes, metadata = convert(logs)
    assert metadata["counts"]["padding"] == 0 and len(episodes[1].rewards) == 38 - 10


@pytest.mark.parametrize("count, fresh", [(99, 19), (17, 17), (80, 40), (None, 39)])
def test_rows_of_the_round_before_are_left_out(logs, count, fresh):
    """add_count says where the round ends; without it the last row is of the round before."""
    changes = {"add_count": None} if count is None else {"count": count}
    write_shard(logs, ends=(), **changes)
    (episode,), metadata = convert(logs)
    assert len(episode.observations) == metadata["counts"]["source_rows"] == fresh


def test_time_limits_are_truncations(logs, monkeypatch):
    """Dopamine stores its limit as a terminal; the last step's next frame is unknown."""
    monkeypatch.setattr(replay, "LIMIT", 12)
    write_shard(logs)
    episodes, metadata = convert(logs)
    assert [len(e.rewards) for e in episodes] == [10, 11, 10]
    assert [bool(e.truncations[-1]) for e in episodes] == [False, True, False]
    assert not episodes[1].terminations.any()
    assert (metadata["counts"]["timed_out"], metadata["counts"]["cut"]) == (1, 1)


def test_rows_without_an_end_come_in_pieces(logs, monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 7)
    arrays = write_shard(logs, ends=())
    episodes, _ = convert(logs)
    assert [len(e.observations) for e in episodes] == [10, 10, 10, 9]
    joined = np.concatenate([e.observations for e in episodes])
    np.testing.assert_array_equal(joined, arrays["observation"][:39])


def test_share_and_shards_take_the_first_rows_of_each(logs):
    for shard in range(3):
        write_shard(logs, shard)
    episodes, metadata = convert(logs, "--shards", "2", "0", "--share", "0.25")
    assert [len(e.rewards) for e in episodes] == [10, 10]
    assert (metadata["shards"], metadata["share"]) == ([0, 2], 0.25)
    assert metadata["dataset_id"] == "dqn-replay/breakout/run1-shards-0-2-25pct-v0"
    assert metadata["counts"]["source_rows"] == 20


def test_folder_may_lie_above_the_run(logs, tmp_path):
    write_shard(logs)
    episodes, metadata = convert(tmp_path / "logs")
    assert len(episodes) == 3 and metadata["source"] == "dqn-replay Breakout/1/replay_logs"


# ---- the environment and the table


def test_metadata_name_the_environment_of_the_logs(logs):
    write_shard(logs)
    _, metadata = convert(logs)
    spec = gym.envs.registration.EnvSpec.from_json(metadata["env_spec"])
    assert (spec.id, spec.max_episode_steps) == ("ALE/Breakout-v5", 108_000)
    assert spec.kwargs["frameskip"] == 1 and spec.kwargs["repeat_action_probability"] == 0.25
    (wrapper,) = spec.additional_wrappers
    assert wrapper.name == "AtariPreprocessing" and wrapper.kwargs["frame_skip"] == 4
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (1.7, 30.5)
    assert metadata["action_space"] == gym.spaces.Discrete(4)
    assert "clipped" in metadata["environment_differs"]


def test_games_are_those_of_ale():
    ale_py = pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    assert len(TABLE) == 62 and sum(log.ref_max_score is None for log in TABLE.values()) == 5
    for name, log in TABLE.items():
        assert gym.spec(f"ALE/{name}-v5").kwargs["game"] == log.rom
    for name in ("Breakout", "Pong", "SpaceInvaders"):
        with gym.make(f"ALE/{name}-v5") as env:
            assert env.action_space.n == TABLE[name].actions


def test_stored_environment_gives_the_logs_frames():
    pytest.importorskip("cv2")
    gym.register_envs(pytest.importorskip("ale_py"))
    with gym.make(TABLE["Breakout"].env_spec) as env:
        assert env.observation_space == gym.spaces.Box(0, 255, (84, 84), np.uint8)
        env.reset(seed=0)
        assert env.step(1)[0].dtype == np.uint8


@pytest.mark.parametrize("name", ["space-invaders", "SpaceInvaders", "space_invaders"])
def test_names_of_games_in_any_spelling(name):
    log = replay.find_game(name, TABLE)
    assert (log.game, log.rom) == ("SpaceInvaders", "space_invaders")
    assert log.minari_id == "dqn-replay/space-invaders/run1-v0"
    small = replay.dataclasses.replace(log, share=0.005, run=2)
    assert small.minari_id == "dqn-replay/space-invaders/run2-0_5pct-v0"
    for each in (log, small):
        minari.dataset.minari_dataset.parse_dataset_id(each.minari_id)


# ---- what is broken


def broken_files(arrays):
    """What to write in place of an array, and what the error must name."""
    obs, frames = arrays["observation"], "$store$_observation_ckpt.0.gz"
    yield "action", np.full(ROWS, 9, np.int32), ["action 9 in row 0 of 4 actions"]
    yield "action", np.zeros(ROWS - 1, np.int32), [f"{ROWS} rows", f"{ROWS - 1}"]
    yield "action", np.zeros(ROWS, np.float32), ["float32", "action_ckpt.0.gz"]
    yield "reward", np.full(ROWS, np.nan, np.float32), ["reward nan in row 0"]
    yield "terminal", np.full(ROWS, 7, np.uint8), ["terminal 7 in row 0"]
    yield "observation", obs[:, :42], ["shape (40, 42, 84)", frames]
    yield "observation", obs.astype(np.uint16), ["uint16", frames]
    yield "observation", obs[:0], ["shape (0, 84, 84)", frames]
    yield "add_count", np.zeros(3, int), ["add_count_ckpt.0.gz"]


@pytest.mark.parametrize("case", range(9))
def test_arrays_of_another_kind_are_named(logs, capsys, case):
    arrays = write_shard(logs)
    name, values, words = list(broken_files(arrays))[case]
    write_array(logs, name, 0, values)
    error = check_error(capsys, "breakout", "--folder", logs, "--shards", "0")
    assert all(word in error for word in words), error


@pytest.mark.parametrize("name", ["observation", "reward"])
@pytest.mark.parametrize("fault", ["cut", "text", "pickle", "flipped", "missing"])
def test_files_that_are_cut_short_or_no_arrays(logs, capsys, name, fault):
    write_shard(logs)
    path = logs / replay.file_name(name, 0)
    content = path.read_bytes()
    objects = np.array([{}, []], object)
    if fault == "missing":
        path.unlink()
    elif fault == "pickle":
        path.write_bytes(gzip.compress(pickle.dumps(objects)))
    elif fault == "text":
        path.write_bytes(b"<html>not here</html>")
    elif fault == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    error = check_error(capsys, "breakout", "--folder", logs, "--shards", "0")
    assert path.name in error and "fetch" in error


def test_a_failure_keeps_the_set_that_was_there(logs, capsys):
    write_shard(logs)
    episodes, _ = convert(logs)
    write_array(logs, "reward", 0, np.full(ROWS, np.inf, np.float32))
    words = ["breakout", "--folder", str(logs), "--shards", "0"]
    assert replay.main(words) == 0 and "already" in capsys.readouterr().out
    assert replay.main([*words, "--force"]) == 2
    path = minari.storage.get_dataset_path("dqn-replay/breakout")
    assert [each.name for each in path.iterdir()] == ["run1-shards-0-v0"]
    kept = minari.load_dataset("dqn-replay/breakout/run1-shards-0-v0")
    assert kept.total_steps == sum(len(e.rewards) for e in episodes)


def test_a_part_with_no_step_is_told(logs, capsys):
    write_shard(logs, ends=(), count=1)
    error = check_error(capsys, "breakout", "--folder", logs, "--shards", "0")
    assert "no step" in error and "--shards" in error


@pytest.mark.parametrize(
    "words, named",
    [
        ([], "name a game"),
        (["brekout"], "did you mean Breakout"),
        (["breakout", "--run", "6"], "--run 6"),
        (["breakout", "--shards", "50"], "--shards 50"),
        (["breakout", "--share", "0"], "--share 0"),
        (["breakout", "--share", "nan"], "--share nan"),
        (["breakout", "--url-base", "ftp://x"], "--url-base"),
        (["breakout", "--shard", "0"], "--shard"),
        (["breakout-run1-1__pct"], "breakout-run1-1__pct"),
        (["breakout-run1-shards-0-_pct"], "breakout-run1-shards-0-_pct"),
    ],
)
def test_bad_words(words, named, capsys):
    assert named in check_error(capsys, *words)


def test_the_mend_of_a_script_is_a_command(capsys):
    """What a script says of a set that is missing names the same part."""
    words = ["--dataset_id", "dqn-replay/space-invaders/run2-1pct-v0", "--download", "false"]
    assert load_script("dqn").main(words) == 2
    command = re.search(r"python datasets/dqn_replay.py (\S+)$", capsys.readouterr().err.strip())
    args = replay.parse([command[1]])
    assert (args.game, args.run, args.share) == ("space-invaders", 2, 0.01)
    assert replay.parse(["pong-run1"]).share == 1
    for part in ({"share": 0.005}, {"shards": (0, 12)}, {"shards": (3,), "share": 0.1}):
        log = replay.dataclasses.replace(replay.find_game("Pong", TABLE), run=2, **part)
        args = replay.parse([log.minari_id.partition("/")[2].replace("/", "-")])
        assert (args.run, tuple(args.shards), args.share) == (2, log.shards, log.share)


def test_list_shows_the_games(capsys):
    assert replay.main(["--list"]) == 0
    assert "SpaceInvaders" in capsys.readouterr().out


# ---- download


@pytest.fixture
def server(tmp_path):
    """A local server of tmp_path/web: (its address, the requests that came)."""
    seen = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def log_message(self, *words):
            seen.append(words[1])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/dqn", seen
        web.shutdown()


def test_download_fetches_what_is_missing_once(tmp_path, server):
    url, seen = server
    write_shard(tmp_path / "web/dqn/Breakout/1/replay_logs")
    words = ["breakout", "--shards", "0", "--url-base", url, "--cache", str(tmp_path / "cache")]
    assert replay.main(words) == 0
    assert len(seen) == 5
    assert replay.main([*words, "--force"]) == 0
    assert len(seen) == 5
    assert minari.load_dataset("dqn-replay/breakout/run1-shards-0-v0").total_episodes == 3


def test_a_page_in_place_of_a_file_and_a_missing_file_are_told(tmp_path, server, capsys):
    url, _ = server
    folder = tmp_path / "web/dqn/Breakout/1/replay_logs"
    write_shard(folder)
    (folder / "$store$_reward_ckpt.0.gz").write_bytes(b"<html>")
    (folder / "$store$_terminal_ckpt.0.gz").unlink()
    words = ["breakout", "--url-base", url, "--cache", tmp_path / "cache"]
    error = check_error(capsys, *words, "--shards", "0", pauses=())
    assert "reward_ckpt.0.gz" in error and "--folder" in error and url in error
    (folder / "$store$_reward_ckpt.0.gz").unlink()
    error = check_error(capsys, *words, "--shards", "0", pauses=())
    assert "404" in error and "by hand" in error


def test_without_a_network_one_line_says_what_to_fetch(tmp_path, capsys):
    url = "http://nowhere.invalid/dqn"
    error = check_error(capsys, "pong", "--url-base", url, "--cache", tmp_path / "cache")
    assert f"fetch {url}/Pong/1/replay_logs/$store$_observation_ckpt.0.gz" in error
    assert "--folder" in error
