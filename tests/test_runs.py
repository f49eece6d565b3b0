import json
import time

from z1_jax import runs


def test_a_killed_stage_has_noted_its_time_and_a_later_one_adds_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_CLOCK_S", 0.05)
    path = tmp_path / "wall_seconds.json"
    with runs.StageClock(path).stage("sft"):
        time.sleep(0.5)
        noted = json.loads(path.read_text())["sft"]  # what a kill at this moment would leave
        killed = path.read_text()
    assert 0.2 < noted <= json.loads(path.read_text())["sft"]
    path.write_text(killed)
    clock = runs.StageClock(path)
    began = time.perf_counter()
    with clock.stage("sft"):
        time.sleep(0.1)
    took = time.perf_counter() - began
    assert noted + 0.1 <= clock.seconds["sft"] <= noted + took
    assert json.loads(path.read_text()) == clock.seconds
