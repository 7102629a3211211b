"""Where policies for D4RL's tasks are evaluated: each of today's environments, and its notes."""

import functools
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import load_tool, plain_agent

# Gymnasium's remarks: v4 is out of date, FrankaKitchen's goal is one object in all observations.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
d4rl = load_tool("datasets/d4rl.py")
TASKS = d4rl.read_tasks()


def tasks_by_environment() -> dict[str, d4rl.Task]:
    """One task for each environment: tasks that differ in their data alone share one."""
    found = {}
    for task in TASKS.values():
        mixed = task.suite == "kitchen" and "mixed" in task.task
        key = (task.eval_env, task.max_episode_steps, task.reset_cell, task.goal_cell, mixed)
        found.setdefault(key, task)
    return {task.task: task for task in found.values()}


EACH = tasks_by_environment()


def build(name: str) -> gym.Env:
    return d4rl.build_env(TASKS[name])


def still(env: gym.Env) -> np.ndarray:
    return np.zeros(env.action_space.shape, env.action_space.dtype)


def test_eighteen_environments():
    assert len(EACH) == 18
    assert len({d4rl.build_env(task).spec.to_json() for task in TASKS.values()}) == 18


@pytest.mark.parametrize("name", EACH)
def test_stored_builds_steps_and_is_seeded(iql, name):
    task = EACH[name]
    built = d4rl.build_env(task)
    flatten = functools.partial(iql.flatten_obs, built.observation_space)
    sizes = plain_agent(iql, len(flatten(built.reset(seed=0)[0])), task.act_dim)
    spec, _ = iql.find_environment(iql.TrainConfig(), {"env_spec": built.spec.to_json()}, sizes)
    env = gym.make(spec)
    assert env.spec == built.spec
    assert (env.spec.id, env.spec.max_episode_steps) == (task.eval_env, task.max_episode_steps)
    assert env.action_space.shape == (task.act_dim,)
    assert (env.action_space.low <= -1).all() and (env.action_space.high >= 1).all()

    def play(seed: int) -> np.ndarray:
        env.action_space.seed(0)
        states, rewards = [env.reset(seed=seed)[0]], []
        for _ in range(5):
            state, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            assert not (terminated or truncated)
            states.append(state)
            rewards.append(reward)
        flat = np.stack([flatten(state) for state in states])
        assert np.isfinite(flat).all() and np.isfinite(rewards).all()
        return np.column_stack([flat, [0, *rewards]])

    first, again, other = play(3), play(3), play(4)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], other[0])
    if task.suite == "kitchen":
        assert env.observation_space["observation"].shape == (59,) and task.obs_dim == 60
    else:
        assert first.shape[1] == task.obs_dim + 1


@pytest.mark.parametrize("robot", ["Hopper", "HalfCheetah", "Walker2d"])
def test_todays_locomotion_takes_the_same_policies(robot):
    todays, d4rls = gym.make(f"{robot}-v5"), build(f"{robot.lower()}-medium-v2")
    assert d4rls.spec.id == f"{robot}-v4"
    assert todays.observation_space.shape == d4rls.observation_space.shape
    assert todays.action_space == d4rls.action_space
    assert todays.spec.max_episode_steps == d4rls.spec.max_episode_steps
    starts = [env.reset(seed=seed)[0] for env in (todays, d4rls) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(starts[0], starts[1])
    np.testing.assert_allclose(starts[0], starts[3])
    assert not np.array_equal(starts[0], starts[2])
    assert np.isfinite(todays.step(todays.action_space.sample())[1])


# ---- mazes: what the notes say


def place(env: gym.Env, position: np.ndarray) -> None:
    """Put the ball or the ant there, at rest."""
    body = getattr(env.unwrapped, "point_env", None) or env.unwrapped.ant_env
    state = body.data.qpos.copy()
    state[:2] = position
    body.set_state(state, np.zeros_like(body.data.qvel))


def step_beside_the_goal(env: gym.Env, distance: float) -> tuple[float, bool]:
    """Reward and end at the first step that comes from so far beside the goal."""
    env.reset(seed=0)
    place(env, env.unwrapped.goal + np.array([distance, 0]))
    _, reward, terminated, _, _ = env.step(still(env))
    return reward, terminated


def cells_of(env: gym.Env, positions: list) -> set:
    return {tuple(env.unwrapped.maze.cell_xy_to_rowcol(xy)) for xy in positions}


@pytest.mark.parametrize("name", [name for name in EACH if TASKS[name].suite == "maze2d"])
def test_maze2d_goals_and_starts(name):
    env = build(name)
    goals, starts = [], []
    for seed in range(200):
        starts.append(env.reset(seed=seed)[0][:2])
        goals.append(env.unwrapped.goal.copy())
    (goal_cell,) = cells_of(env, goals)
    centre = env.unwrapped.maze.cell_rowcol_to_xy(np.array(goal_cell))
    reach = np.abs(np.array(goals) - centre).max()
    assert 0.2 < reach <= 0.25 and "within 0.25 m" in TASKS[name].note  # drawn anew each episode
    maze = np.array(env.unwrapped.maze.maze_map, dtype=object)
    free = {tuple(cell) for cell in np.argwhere(maze != 1)}
    seen = cells_of(env, starts)
    assert seen <= free - {goal_cell} and "no episode starts in its cell" in TASKS[name].note
    assert len(seen) > len(free) / 2


@pytest.mark.parametrize("maze", ["umaze", "medium", "large"])
def test_maze2d_pays_within_the_noted_radius(maze):
    name = f"maze2d-{maze}-v1"
    env = build(name)
    assert step_beside_the_goal(env, 0.44) == (1, False)
    assert step_beside_the_goal(env, 0.47) == (0, False)
    assert "counts within 0.45 m" in TASKS[name].note

    env = build(f"maze2d-{maze}-dense-v1")
    assert "0.45" not in TASKS[f"maze2d-{maze}-dense-v1"].note  # which has no radius
    for distance in (0, 0.3, 0.47):
        reward, terminated = step_beside_the_goal(env, distance)
        assert reward == pytest.approx(np.exp(-distance), rel=1e-3) and not terminated


def test_maze2d_pays_at_the_goal_to_the_end():
    env = build("maze2d-umaze-v1")
    env.reset(seed=0)
    place(env, env.unwrapped.goal)
    steps = [env.step(still(env))[1:4] for _ in range(300)]
    assert steps == [(1, False, False)] * 299 + [(1, False, True)]


@pytest.mark.parametrize("maze", ["umaze", "medium-play", "large-diverse"])
def test_antmaze_ends_within_the_noted_radius(maze):
    name = f"antmaze-{maze}-v2"
    env = build(name)
    assert step_beside_the_goal(env, 0.40) == (1, True)
    assert step_beside_the_goal(env, 0.50) == (0, False)
    assert "counts within 0.45 m" in TASKS[name].note


def test_antmaze_draws_goal_and_start_but_no_pose():
    name = "antmaze-umaze-v2"
    env, shift = build(name), d4rl.maze_frame(TASKS[name])[1]
    starts, goals, poses = [], [], []
    for seed in range(60):
        observation, _ = env.reset(seed=seed)
        starts.append(observation[:2] - shift)
        goals.append(env.unwrapped.goal - shift)
        poses.append(observation[2:])
    for drawn, centre in ((starts, (0, 0)), (goals, (0, 8))):  # D4RL's cells (1, 1) and (3, 1)
        reach = np.abs(np.array(drawn) - centre).max(0)
        assert ((reach > 0.9) & (reach <= 1)).all() and "within 1 m" in TASKS[name].note
    assert np.ptp(poses, 0).max() == 0 and not poses[0][-14:].any()
    assert "always starts from one pose" in TASKS[name].note


# ---- hands: what the notes say


def test_pen_ends_after_100_steps_and_not_when_dropped():
    env = build("pen-human-v1")
    env.reset(seed=0)
    state = env.unwrapped.get_env_state()
    dropped = state["qpos"].copy()
    dropped[-6] += 0.2  # its first axis points down
    ends, rewards = [], []
    for number in range(100):
        if number == 10:
            env.unwrapped.set_state(dropped, np.zeros_like(state["qvel"]))
        _, reward, terminated, truncated, _ = env.step(still(env))
        ends.append((terminated, truncated))
        rewards.append(reward)
    assert ends == [(False, False)] * 99 + [(False, True)]
    assert max(rewards[10:]) < -4  # 5 less in every step from there on
    assert "after the pen is dropped" in TASKS["pen-human-v1"].note


def rest_of_reward(robot: str, env: gym.Env) -> tuple[float, float]:
    """D4RL's reward of the present state without its first term, and that term's distance."""
    sim, at = env.unwrapped.data, env.unwrapped
    velocity = sim.qvel
    if robot == "door":
        hinge = sim.qpos[at.door_hinge_addrs].item()
        assert hinge < 0.2  # no bonus
        rest = -0.1 * (hinge - 1.57) ** 2 - 1e-5 * np.sum(velocity**2)
        ends = sim.site_xpos[at.grasp_site_id], sim.site_xpos[at.handle_site_id]
    elif robot == "hammer":
        nail, tool = sim.site_xpos[at.target_obj_site_id], sim.site_xpos[at.tool_site_id]
        rest = -np.linalg.norm(tool - nail) - 1e-2 * np.linalg.norm(velocity)
        rest -= 10 * np.linalg.norm(nail - sim.site_xpos[at.goal_site_id])
        rest += 2 * (min(sim.xpos[at.obj_body_id][2], tool[2]) > 0.04)
        ends = sim.site_xpos[at.S_grasp_site_id], sim.xpos[at.obj_body_id]
    else:
        assert sim.xpos[at.obj_body_id][2] < 0.04  # on the table: nothing else counts
        rest, ends = 0, (sim.site_xpos[at.S_grasp_site_id], sim.xpos[at.obj_body_id])
    return rest, np.linalg.norm(ends[0] - ends[1])


@pytest.mark.parametrize("robot", ["door", "hammer", "relocate"])
def test_reach_term_of_the_hands_has_the_noted_sign(robot):
    name = f"{robot}-human-v1"
    env = build(name)
    env.reset(seed=0)
    for _ in range(3):
        _, reward, terminated, _, _ = env.step(still(env))
        rest, distance = rest_of_reward(robot, env)
        assert distance > 0.05 and not terminated
        assert reward == pytest.approx(rest + 0.1 * distance, abs=1e-6)  # D4RL: rest - 0.1 distance
    assert re.search("adds 0.1 times .* where D4RL subtracts it", TASKS[name].note)


# ---- kitchen


@pytest.mark.parametrize("name", ["kitchen-complete-v0", "kitchen-partial-v0", "kitchen-mixed-v0"])
def test_kitchen_asks_for_the_datasets_subtasks(name):
    env = build(name)
    env.reset(seed=0)
    words = {"light": "light switch", "slider": "slide cabinet", "bottomburner": "bottom burner"}
    listed = Path(TASKS[name].url).stem.removesuffix("-v0").partition("kitchen_")[2].split("_")
    assert set(env.unwrapped.goal) == {words.get(word, word) for word in listed}
    assert len(env.unwrapped.goal) == TASKS[name].ref_max_score == 4

    kitchen = env.unwrapped
    goal = {key: np.array(value) for key, value in kitchen.goal.items()}
    rewards = []
    for reached in range(5):  # one after the other is done
        achieved = {key: value + 9 * (i >= reached) for i, (key, value) in enumerate(goal.items())}
        rewards.append(kitchen.compute_reward(achieved, goal, {}))
        kitchen.tasks_to_complete -= set(kitchen.step_task_completions)
    assert rewards == [0, 1, 1, 1, 1]  # each pays once


def test_kitchen_ends_with_the_last_subtask():
    env = build("kitchen-mixed-v0")
    env.reset(seed=0)
    env.unwrapped.tasks_to_complete.clear()
    env.unwrapped.episode_task_completions.extend(list(env.unwrapped.goal)[:-1])
    assert not env.step(still(env))[2]
    env.unwrapped.episode_task_completions.append(list(env.unwrapped.goal)[-1])
    assert env.step(still(env))[2]
