"""experiments/cuda.py: small, on a CPU, so that it does not break before its day.

Run: pytest tests/test_cuda.py
"""

import json
import signal
import subprocess
import sys
import time

import pytest

from experiments import cuda
from tests.helpers import ROOT


def test_a_piece_is_done_once_and_its_words_are_kept(tmp_path, capsys):
    count = "open('runs', 'a').write('x'); print('said')"
    command = ["-c", count.replace("runs", str(tmp_path / "runs"))]
    cuda.run_piece(tmp_path, "piece", command)
    cuda.run_piece(tmp_path, "piece", command)
    assert (tmp_path / "runs").read_text() == "x"
    assert (tmp_path / "piece.log").read_text() == "said\n"
    assert "piece: done before" in capsys.readouterr().out


def test_a_piece_that_fails_is_tried_again(tmp_path):
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"piece: ended with 3 \(why\); all of it: .*piece.log"
        ):
            cuda.run_piece(tmp_path, "piece", ["-c", "print('why'); exit(3)"])


def test_a_piece_that_ended_before_its_end_is_not_done(tmp_path):
    """As train.py does on a signal, which saves and ends with 0."""
    with pytest.raises(ValueError, match=r"piece: ended with 0 \(saved\)"):
        cuda.run_piece(tmp_path, "piece", ["-c", "print('saved')"], lambda: False)
    assert not (tmp_path / "piece.done").exists()
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    assert cuda.has_steps(tmp_path, 3)
    assert not cuda.has_steps(tmp_path, 4)
    assert not cuda.has_steps(tmp_path / "nowhere", 0)


SLOW_TO_STOP = """
import signal, sys, time
def stop(number, frame):
    time.sleep(1)
    open(sys.argv[1], "w").write("saved")
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_piece_has_time_to_save(tmp_path, monkeypatch, name):
    """Ctrl-C goes to the script and to its piece, SIGTERM to the script, which passes it on."""

    def interrupt(program, timeout=None):
        while b"ready" not in (tmp_path / "log").read_bytes():
            time.sleep(0.01)
        monkeypatch.undo()
        if name == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        program.send_signal(signal.SIGINT)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    command = [sys.executable, "-c", SLOW_TO_STOP, str(tmp_path / "file")]
    with (tmp_path / "log").open("w") as out, pytest.raises(KeyboardInterrupt):
        cuda.run_to_its_end(command, out)
    assert (tmp_path / "file").read_text() == "saved"


def test_a_piece_that_fails_does_not_stop_the_others(tmp_path, outcome, monkeypatch):
    ran = []

    def run_piece(folder, name, command, is_done=None):
        ran.append(name)
        if name in ("tests", "window-first"):
            raise ValueError(f"{name}: ended with 1")

    monkeypatch.setattr(cuda, "run_piece", run_piece)
    monkeypatch.setattr(cuda, "read_log", lambda out: [{"step": 1, "seconds": 1.0}])
    ended = outcome(cuda, "--quick", "--device", "cpu", "--out", tmp_path / "out")
    assert ended.code == 2
    assert "2 pieces failed" in ended.err
    assert "failed: window-first: ended with 1" in ended.out
    assert {"speed-decode", "freqkv-tuned", "freqkv-recall"} <= set(ran)
    assert not {"window-tuned", "window-recall"} & set(ran)


def test_steps_fill_the_time(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(cuda, "run_piece", lambda folder, name, command, _: ran.append(command[-1]))
    run = cuda.Run("x", "freqkv")
    (tmp_path / "x").mkdir()
    times = [{"step": 0, "val_loss": 1}, {"step": 1, "seconds": 9}, {"step": 2, "seconds": 2}]
    lines = "".join(json.dumps(record) + "\n" for record in [*times, {"step": 3, "seconds": 1.5}])
    (tmp_path / "x/log.jsonl").write_text(lines)
    cuda.tune(tmp_path, run, cuda.FULL, {}, seconds=100)
    assert ran == ["3", "50"]
    (tmp_path / "x/log.jsonl").write_text(lines.replace("1.5", "2.5"))
    cuda.tune(tmp_path, run, cuda.FULL, {}, seconds=100)  # when it goes on, as many as before
    assert ran[2:] == ["3", "50"]


def test_a_damaged_number_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "run_piece", lambda *about: None)
    monkeypatch.setattr(cuda, "read_log", lambda out: [{"step": 1, "seconds": 1.0}])
    (tmp_path / "x.steps").write_text("")
    with pytest.raises(ValueError, match=r"x\.steps: was damaged .* or removed"):
        cuda.tune(tmp_path, cuda.Run("x", "freqkv"), cuda.FULL, {}, seconds=100)


def test_a_folder_of_something_else(outcome, tmp_path):
    (tmp_path / "tests.log").write_text("mine")
    ran = outcome(cuda, "--quick", "--device", "cpu", "--out", tmp_path)
    assert (ran.code, "was there already, must be new, or one of cuda" in ran.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["tests.log"]


@pytest.mark.slow
def test_all_pieces(tmp_path, outcome, monkeypatch):
    [run] = [run for run in cuda.RUNS if run.name == "freqkv-recent"]
    monkeypatch.setattr(cuda, "RUNS", [run])
    monkeypatch.setattr(cuda, "SPEED", ["compression"])
    flags = ("--quick", "--device", "cpu", "--out", tmp_path / "out")
    ran = outcome(cuda, *flags)
    assert ran.code == 0, ran.err
    tuned = json.loads((tmp_path / "out/freqkv-recent/adapter/freqkv.json").read_text())
    assert (tuned["attention"], tuned["window"], tuned["recent"]) == ("freqkv", 64, 32)
    table = (tmp_path / "out/table.txt").read_text()
    assert table in ran.out
    head, row = table.splitlines()
    assert head.split() == "64 256 told 32 ago told 128 ago".split()  # noqa: SIM905 (a line)
    assert row.split()[0] == "freqkv-recent"
    again = outcome(cuda, *flags)
    assert again.out.count("done before") == 6
    assert table in again.out
    other = outcome(cuda, *flags, "--texts", ROOT / "dct.py")
    assert other.code == 2
    assert "--texts: was ['" in other.err
    assert "must be None, as" in other.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "no/such"], "--data: no/such held no file"),
        (["--texts", "no/such"], "--texts: no/such held no file"),
        (["--minutes", "3"], "--minutes: was given with --quick"),
    ],
)
def test_bad_input_leaves_nothing(outcome, tmp_path, flags, message):
    ran = outcome(cuda, "--quick", "--device", "cpu", "--out", tmp_path / "out", *flags)
    assert (ran.code, message in ran.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(outcome, tmp_path):
    ran = outcome(cuda, "--device", "cuda:99", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "--device: was 'cuda:99'" in ran.err
    assert not (tmp_path / "out").exists()
