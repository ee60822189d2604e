"""experiments/cuda.py: small, on a CPU, so that it does not break before its day.

Run: pytest tests/test_cuda.py
"""

import json

import pytest

from experiments import cuda


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


def test_steps_fill_the_time(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(cuda, "run_piece", lambda folder, name, command: ran.append(command[-1]))
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
    other = outcome(cuda, *flags, "--minutes", 3)
    assert other.code == 2
    assert "--minutes: was 3.0, must be 8.0, as" in other.err


def test_a_device_that_is_not_there(outcome, tmp_path):
    ran = outcome(cuda, "--device", "cuda:99", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "--device: was 'cuda:99'" in ran.err
    assert not (tmp_path / "out").exists()
