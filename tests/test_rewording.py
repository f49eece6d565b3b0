"""Other words at evaluation: what is exchanged, what is refused, and that nothing else changes."""

import json
import pathlib

import numpy as np
import pytest
import tiny_policy as tiny

from envs.base import Episode, SlotsLost
from envs.kitchen import KitchenEnv
from envs.pool import EnvPool
from z1_jax import evaluate
from z1_jax.checkpoint import Checkpoints
from z1_jax.config.checks import check
from z1_jax.config.schema import Config, ConfigError, EvalConfig
from z1_jax.rewording import RewordedPool, check_words, reworded
from z1_jax.worlds import World

ROOT = pathlib.Path(__file__).parents[1]
SWAP = {"left": "right", "right": "left"}


def test_whole_words_are_exchanged_at_once():
    assert reworded("close the left drawer", SWAP) == "close the right drawer"
    assert reworded("left of right", SWAP) == "right of left"
    assert reworded("pick the can, or cancel", {"can": "lime"}) == "pick the can, or cancel"  # "can," is another word


def test_a_pool_shows_the_same_with_other_words():
    with EnvPool(lambda: KitchenEnv("CloseDrawer", image_size=8), 2, 0) as pool:
        other = RewordedPool(pool, SWAP)
        episodes = [Episode(seed, "CloseDrawer") for seed in (3, 4)]
        plain, told = pool.reset([0, 1], episodes), other.reset([0, 1], episodes)
        assert [reworded(one.instruction, SWAP) for one in plain] == [one.instruction for one in told]
        assert all(one.instruction != two.instruction for one, two in zip(plain, told, strict=True))
        for one, two in zip(plain, told, strict=True):
            assert np.array_equal(one.state, two.state) and all(
                np.array_equal(one.images[camera], two.images[camera]) for camera in one.images
            )
        actions = np.zeros((2, 4, other.spec.action_dim))
        results, seen = other.step([0, 1], actions)
        assert [one.instruction for one in seen] == [one.instruction for one in told] and results[0].steps == 4
        later = other.finish(other.begin_step([0, 1], actions))
        assert later[1][1].instruction == told[1].instruction and later[1][0].steps == 4
        over, gone = other.step([0, 1], np.zeros((2, 100, other.spec.action_dim)))
        assert over[0].done and gone == [None, None]


def test_an_episode_without_the_words_is_refused():
    """Of a spout's episodes a third say "center": they would pass for episodes with other words."""
    with EnvPool(lambda: KitchenEnv("TurnSinkSpout", image_size=8), 1, 0) as pool:
        told = {pool.reset([0], [Episode(seed, "TurnSinkSpout")])[0].instruction: seed for seed in range(40)}
        other = RewordedPool(pool, SWAP)
        for text, seed in told.items():
            if reworded(text, SWAP) != text:
                assert other.reset([0], [Episode(seed, "TurnSinkSpout")])[0].instruction == reworded(text, SWAP)
                continue
            with pytest.raises(ConfigError, match=f"changes nothing in “{text}” of an episode"):
                other.reset([0], [Episode(seed, "TurnSinkSpout")])
    assert len(told) == 3


def test_what_is_left_of_a_broken_call_has_other_words_too():
    class Broken:
        def reset(self, slots, episodes):
            env = KitchenEnv("CloseDrawer", image_size=8)
            raise SlotsLost({1: "it broke"}, [env.observe(), None])

    with pytest.raises(SlotsLost) as error:
        RewordedPool(Broken(), {"close": "open"}).reset([0, 1], [])
    assert error.value.answers[0].instruction.startswith("open the ") and error.value.answers[1] is None


@pytest.mark.parametrize("words", ["left", "left:", ":right", "left:left", "left:the right", "a:b:c"])
def test_words_that_are_none_are_one_line(words):
    with pytest.raises(ConfigError, match="config key eval.words: got .*expected WORD:INSTEAD, e.g. left:right"):
        check(Config(algorithm="eval", checkpoint="x", eval=EvalConfig(words=(words,))))


def test_words_twice_or_in_training_are_one_line():
    with pytest.raises(ConfigError, match="expected each word once before a colon"):
        check(Config(algorithm="eval", checkpoint="x", eval=EvalConfig(words=("a:b", "a:c"))))
    with pytest.raises(ConfigError, match="other words are for python -m z1_jax.evaluate alone"):
        check(Config(eval=EvalConfig(words=("a:b",))))


def test_words_that_a_task_does_not_have_are_refused():
    seen = [
        World("A", tasks=("A",), instructions=("on it",)),
        World("B", tasks=("B",), instructions=("turn on", "turn off")),
    ]
    check_words({"on": "off", "off": "on"}, seen)
    check_words({}, seen)
    with pytest.raises(ConfigError, match=r"got on:off, which changes nothing in “turn off” of B; leave the task out"):
        check_words({"on": "off"}, seen)


def test_an_evaluation_says_what_was_told(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path / "policy")
    checkpoints.save(1, tiny.policy(1).parts(), tiny.policy(1).document())
    checkpoints.close()
    command = [
        "evaluate.py", f"--config={ROOT / 'configs' / 'eval.py'}", f"--config.checkpoint={tmp_path / 'policy'}",
        f"--config.env.cameras={tiny.CAMERA}", "--config.env.workers=0", "--config.env.horizon=8",
        "--config.eval.episodes=2", "--config.env.parallel=2", "--config.task=CloseDrawer",
        f"--config.run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="got open:close, which changes nothing in “close the"):
        evaluate.main([*command, "--config.eval.words=open:close"])
    assert not (tmp_path / "run").exists()
    evaluate.main([*command, "--config.eval.words=left:right,right:left"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    env = KitchenEnv("CloseDrawer", image_size=8)
    own = []
    for seed in (900_000_000, 900_000_001):
        env.reset(Episode(seed))
        own.append(env.observe().instruction)
    assert summary["instructions"] == list(dict.fromkeys(reworded(text, SWAP) for text in own))
    assert summary["protocol"]["words"] == SWAP
    assert "[“left” is told as “right”, “right” is told as “left”]" in summary["sentence"]
