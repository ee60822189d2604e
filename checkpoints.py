"""The checkpoints of a training: written whole or not at all, read whole or refused."""

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weights.files import damaged, read_json


class Checkpoints:
    """Folders step-000123, written beside, synced and renamed: a kill leaves none half written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-*"):
            shutil.rmtree(stale)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order."""
        steps = []
        for path in self.folder.glob("step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal():
                steps.append(int(number))
        return sorted(steps)

    def describe_newest(self) -> str:
        """What an error says of how much is safe."""
        steps = self.steps()
        newest = self.path(steps[-1]) if steps else "none"
        return f"newest good checkpoint: {newest}"

    def save(
        self, step: int, weights: dict[str, Tensor], state: dict[str, Any], record: dict[str, Any]
    ) -> None:
        """Write trained weights, the state of the optimizer, and a JSON record."""
        beside = self.folder / f".tmp-{step}"
        try:
            beside.mkdir()
            save_file(weights, beside / "weights.safetensors")
            with (beside / "state.pt").open("wb") as file:
                torch.save(state, file)
            (beside / "record.json").write_text(json.dumps(record, indent=2) + "\n")
            for path in beside.iterdir():
                sync(path)
            sync(beside)
            beside.rename(self.path(step))
            sync(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of these
            shutil.rmtree(beside, ignore_errors=True)
            raise OSError(
                f"{self.path(step)}: was not written ({error}); {self.describe_newest()}"
            ) from None

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """What `save` was given: weights, state and record; ValueError unless they are whole."""
        folder = self.path(step)
        with self.damaged(step):
            for name in ("weights.safetensors", "state.pt", "record.json"):
                if not (folder / name).is_file():
                    raise ValueError(f"without {name}")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            record = read_json(folder / "record.json")
            missing = {"optimizer", "step", "best"} - state.keys() - record.keys()
            if missing:
                raise ValueError(f"without {min(missing)}")
            if record["step"] != step:
                raise ValueError(f"of step {record['step']}")
            if not all(type(value) in (int, float) for value in record["best"].values()):
                raise ValueError(f"best {record['best']}")
            return load_file(folder / "weights.safetensors"), state, record

    def damaged(self, step: int) -> AbstractContextManager[None]:
        """Whatever a checkpoint raises that is not what was saved is an error that names it."""
        return damaged(self.path(step), "whole, or removed, to go on from the one before")

    def prune(self, keep: int, best: int | None) -> None:
        """Remove all but the last `keep`, and the best."""
        for step in self.steps()[:-keep]:
            if step != best:
                # Renamed first, so that a folder step-* is always whole.
                old = self.path(step).rename(self.folder / f".tmp-old-{step}")
                shutil.rmtree(old)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
