"""A run's page on Weights & Biases: the same one whenever the run goes on, with its evaluations and videos.

The page's id, how much was sent to it and what was sent once stand in RUN_DIR/wandb.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from z1_jax.errors import UserError
from z1_jax.files import read_json, write_whole

STATE = "wandb.json"


class WandbRun:
    """The page of the run in `directory`, opened again where there was one.

    Raises:
      UserError: wandb is not installed.
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any] | None) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("W&B is on but wandb is not installed: pip install 'z1-jax[log]'") from None
        self._wandb, self._path = wandb, directory / STATE
        state = self._state()
        self._id = state.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._logged = list(state["logged"]) if isinstance(state.get("logged"), list) else []
        # W&B's own counter: offline it would begin anew whenever a run goes on.
        self._sent = state["sent"] if isinstance(state.get("sent"), int) else 0
        self._keep()  # before anything is sent: a run that is killed at once goes on under this id too
        self._run = wandb.init(
            project=project,
            dir=str(directory),
            config=dict(config or {}),
            id=self._id,
            resume="allow",
            allow_val_change=True,  # a run may be given more iterations
        )
        for stage in ("sft", "grpo"):  # stages count their own steps, so that W&B's single counter cannot be used
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, values: Mapping[str, Any]) -> None:
        self._sent += 1
        self._keep()
        self._run.log(dict(values), step=self._sent)

    def log_once(self, name: str, numbers: Mapping[str, float]) -> None:
        """Logs numbers, and shows them in the page's summary, unless something was logged under this name before."""
        if name not in self._logged:
            self.log(numbers)
            self._run.summary.update(dict(numbers))
            self._note(name)

    def video_once(self, name: str, key: str, path: Path, caption: str) -> None:
        """Shows a video under `key`, unless something was logged under this name before."""
        if name not in self._logged:
            video = self._wandb.Video(_as_gif(path), format="gif", caption=caption)  # the page does not play WebP
            self.log({key: video})
            self._note(name)

    def finish(self) -> None:
        self._run.finish()

    def _state(self) -> dict[str, Any]:
        with contextlib.suppress(UserError):
            return read_json(self._path, dict, {})
        return {}

    def _note(self, name: str) -> None:
        self._logged.append(name)
        self._keep()

    def _keep(self) -> None:
        write_whole(self._path, json.dumps({"id": self._id, "sent": self._sent, "logged": self._logged}))


def _as_gif(path: Path) -> io.BytesIO:
    """An animation in the one format of the viewer's that Pillow writes."""
    content = io.BytesIO()
    with Image.open(path) as image:
        frames, durations = [], []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(image.convert("RGB"))
            durations.append(image.info.get("duration", 50))
    frames[0].save(content, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    content.seek(0)
    return content
