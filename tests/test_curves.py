"""What a run says of itself: progress lines, metrics.jsonl, summary.json, its plot and the curve it should have had."""

import json
import math
import random
import re
from types import SimpleNamespace

import pytest

from model.errors import UserError
from scripts import quickstart
from tests.conftest import Killed, killed_after
from trainer import curves, runtime, state, train_full_sft, train_pretrain
from trainer.optim import lr_at

PNG = b"\x89PNG\r\n\x1a\n"
TIMES = {"tokens_per_second", "minutes", "mfu", "memory_gb"}
EXPECTED = sorted(curves.EXPECTED.glob("*.json"))


def pretrain(documents, out, **changes):
    cfg = train_pretrain.Config(**{**dict(
        max_len=48, batch_size=8, log_every=3, eval_every=5, sample_every=0, save_every=4, device="cpu", warmup_steps=2,
        size="1x32", tokenizer="nano", data=str(documents), out=str(out), max_steps=11), **changes})
    return train_pretrain.main(cfg)


# --------------------------------------------------------------------------------------------------- while it trains


@pytest.mark.parametrize("step", [3, 6, 11])                                    # 3: before the first save
def test_a_killed_run_leaves_the_metrics_of_an_uninterrupted_one(step, documents, tmp_path):
    """Saved every 4 steps and logged every 3, so that a save falls into an open window of the log."""
    pretrain(documents, tmp_path / "whole")
    with killed_after(step):
        pretrain(documents, tmp_path / "cut")
    if step > 4:
        assert state.latest(tmp_path / "cut")[1]["windows"][0]["steps"] == step // 4 * 4 % 3
    pretrain(documents, tmp_path / "cut")
    whole, cut = ([{name: value for name, value in entry.items() if name not in TIMES} for entry in curves.read(folder)]
                  for folder in (tmp_path / "whole", tmp_path / "cut"))
    assert [entry["step"] for entry in whole] == [0, 3, 5, 6, 9, 10, 11, 11]
    assert whole == cut


def test_a_run_killed_at_its_very_end_is_summed_up_once(documents, tmp_path, monkeypatch):
    whole = pretrain(documents, tmp_path / "whole")

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(state, "finish", die)                      # evaluated and saved, but not marked as finished
        pretrain(documents, tmp_path / "cut")
    assert curves.read(tmp_path / "cut")[-1]["final"]
    summary = pretrain(documents, tmp_path / "cut")
    for entry in (*summary["curve"], *whole["curve"]):
        del entry["minutes"]
    assert summary["curve"] == whole["curve"] and summary["tokens"] == whole["tokens"]
    assert len(curves.read(tmp_path / "cut")) == len(curves.read(tmp_path / "whole"))


def test_open_windows_are_shared_out_whole_among_any_number_of_ranks():
    windows = [{"sums": {"loss": 2.0 ** rank}, "items": 10 ** rank, "tokens": 10 ** rank, "steps": 2, "seconds": 1.5}
               for rank in range(3)]
    for world_size in (1, 2, 3, 4):
        ranks = [SimpleNamespace(rank=rank, world_size=world_size, sums={}, window_items=0, window_tokens=0)
                 for rank in range(world_size)]
        for rank in ranks:
            runtime.Run.restore_window(rank, windows)
            assert (rank.window_steps, rank.window_seconds) == (2, 1.5)
        assert sum(rank.window_items for rank in ranks) == sum(rank.window_tokens for rank in ranks) == 111
        assert sum(rank.sums.get("loss", 0) for rank in ranks) == 7
        if world_size == 3:
            assert [rank.sums["loss"] for rank in ranks] == [1, 2, 4]


def test_progress_lines_are_the_rows_of_a_table(documents, tmp_path, capsys):
    pretrain(documents, tmp_path / "run", max_steps=21, eval_every=6, sample_every=9, log_every=1)
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("step ")]
    rows = [line for line in lines if re.match(r"\d+/21 ", line)]
    assert len(rows) == 21 and len(set(heads)) == 1 and {len(line) for line in (*heads, *rows)} == {80}
    ends = [match.end() for match in re.finditer(r"\S+", heads[0])][1:]
    assert heads[0].split() == ["step", "loss", "bpb", "lr", "|g|", "tok/s", "mfu", "GB", "eta"]
    for row in rows:
        assert [match.end() for match in re.finditer(r"\S+", row)][1:] == ends
    for before, row in zip(lines, lines[1:], strict=False):      # a header wherever the table starts again, only there
        if row in rows:
            assert before in rows or before in heads
        assert not (row in heads and before in rows)
    assert all(line.startswith("    ") for line in lines if "held out after" in line or line.lstrip().startswith("| "))
    assert sum(line.startswith("    | ") for line in lines) >= 2


def test_summary_says_all_that_a_committed_result_needs(documents, tmp_path):
    returned = pretrain(documents, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(returned))
    entries = curves.read(tmp_path / "run")
    steps = [entry for entry in entries if "lr" in entry]
    assert summary["steps"] == summary["planned_steps"] == 11 and summary["tokens"] == steps[-1]["tokens"]
    # tokens over the time in steps: all windows together, each its tokens / its speed
    counts = [now["tokens"] - before for now, before in
              zip(steps, [0, *(entry["tokens"] for entry in steps)], strict=False)]
    seconds = sum(count / entry["tokens_per_second"] for count, entry in zip(counts, steps, strict=True))
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / seconds, rel=1e-3)
    assert [point["step"] for point in summary["curve"]] == [0, 5, 10, 11]
    assert summary["curve"][-1]["bits_per_byte"] == summary["held_out"]["bits_per_byte"]
    low, high = summary["held_out"]["bits_per_byte_interval"]
    assert low < summary["held_out"]["bits_per_byte"] < high
    assert summary["machine"]["cpu"] and summary["machine"]["cores"] >= 1 and summary["machine"]["gpu"] == ""
    assert summary["config"]["max_steps"] == 11 and summary["minutes"] > 0 and summary["torch"] and summary["command"]


# ---------------------------------------------------------------------------------------------------------- the plot


def entry(step, **values):
    return {"step": step, "tokens": 100 * step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5.0, **values}




def held_out(step, bpb, targets=1000):
    return {"step": step, "tokens": 100 * step, "val_loss": 2 * bpb, "val_bits_per_byte": bpb, "val_targets": targets}


BAND = [{"step": step, "tokens": 100 * step, "targets": 1000, "loss": [1.8, 2.0, 2.2],
         "bits_per_byte": [0.9, 1.0, 1.1]} for step in (0, 10, 20)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("entries, band", [
    ([], []), ([entry(10, loss=2.0)], []), ([held_out(0, 3.0)], []), ([held_out(0, 3.0)], BAND[:1]),
    ([held_out(0, 9.0), *(entry(n, loss=9 / n) for n in range(1, 100)), held_out(99, 0.1)], BAND),
    ([entry(1, loss=-2.0), entry(2, loss=0.5)], []), ([entry(1, loss=math.nan), entry(2, loss=0.5)], []),
    ([entry(1, reward=0.0), entry(2, reward=0.0)], []), ([entry(1), {**entry(2, loss=3.0), "grad_norm": None}], [])])
def test_a_plot_of_any_run(entries, band, tmp_path):
    curves.draw(entries, tmp_path, band)
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_a_run_leaves_its_plot_and_no_plot_is_worth_a_run(documents, tmp_path, monkeypatch, capsys):
    pretrain(documents, tmp_path / "run", eval_every=0)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(PNG)

    def broken(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(curves, "draw", broken)
    summary = pretrain(documents, tmp_path / "other", eval_every=0)
    assert summary["steps"] == 11 and (tmp_path / "other" / "summary.json").exists()
    assert state.latest(tmp_path / "other")[1]["finished"]
    assert "warning: RuntimeError: no ink (all is saved but curves.png)" in capsys.readouterr().out


def test_drawn_by_hand_also_while_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(held_out(0, 3.0)) + "\n" + json.dumps(entry(1, loss=2.0))
                                            + '\n{"step": 2, "tok', encoding="utf-8")
    assert [each["step"] for each in curves.read(tmp_path)] == [0, 1]
    curves.main(curves.Config(run=str(tmp_path)))
    assert str(tmp_path / "curves.png") in capsys.readouterr().out and (tmp_path / "curves.png").exists()
    with pytest.raises(UserError, match="nowhere"):
        curves.main(curves.Config(run=str(tmp_path / "nowhere")))


# ------------------------------------------------------------------------------------------------ the expected curve


def summary_of(seed=1, scale=1.0, steps=(0, 10, 20), **changes):
    """A run's summary whose bits per byte go 4, 2, 1 times scale."""
    config = {"lr": 1e-3, "schedule": "wsd", "warmup_steps": 2, "batch_size": 8, "seed": seed, "log_every": 10}
    points = [{"step": step, "tokens": 100 * step, "targets": 1000, "loss": 8 * scale * 0.5 ** number,
               "bits_per_byte": 4 * scale * 0.5 ** number} for number, step in enumerate(steps)]
    return {"stage": "pretrain", "parameters": 5, "planned_steps": steps[-1], "steps": steps[-1], "parent": None,
            "commit": "", "torch": "", "machine": {}, "dtype": "float32", "data": {"records": 9, "tokens": 1000},
            "config": {**config, **changes}, "curve": points}


def test_the_band_is_a_prediction_interval():
    """Worked by hand for log values 0, 1, 2 at both steps: s² = 1, t = 4.303, so 1 ± 4.303 · sqrt(4 / 3)."""
    columns = [[{"step": step, "bits_per_byte": math.e ** value} for value in (0, 1, 2)] for step in (10, 20)]
    half = 4.303 * math.sqrt(4 / 3)
    assert curves.bands(columns, "bits_per_byte")[1] == pytest.approx(
        [math.exp(1 - half), math.e, math.exp(1 + half)], abs=1e-4)
    rng, inside = random.Random(0), 0                            # one more run lies in the band 95 times in 100
    for _ in range(4000):
        first, second, third, new = (math.exp(rng.gauss(0, 0.1)) for _ in range(4))
        (low, _, high), = curves.bands([[{"step": 1, "x": value} for value in (first, second, third)]], "x")
        inside += low <= new <= high
    assert inside / 4000 == pytest.approx(0.95, abs=0.015)


def test_learning_rates_decide_how_far_runs_can_be_compared():
    wsd = dict(lr=1e-3, schedule="wsd", warmup_steps=40)
    for ours, theirs, last in ((1150, 1150, 1150), (700, 1150, 502), (1150, 700, 502), (2000, 1150, 817)):
        rates = [[lr_at(step, total, SimpleNamespace(**wsd)) for step in range(1, total + 1)]
                 for total in (ours, theirs)]
        assert rates[0][:last] == rates[1][:last] and (ours == theirs or rates[0][last] != rates[1][last])
        assert curves.last_comparable_step({**wsd, "planned_steps": ours}, {**wsd, "planned_steps": theirs}) == last
    cosine = {**wsd, "schedule": "cosine"}
    assert curves.last_comparable_step({**cosine, "planned_steps": 500}, {**cosine, "planned_steps": 900}) == 40


def test_only_runs_of_the_same_settings_are_compared():
    base = curves.settings(summary_of())
    assert curves.differences(base, curves.settings(summary_of(seed=2, log_every=1))) == []
    assert curves.differences(base, curves.settings(summary_of(lr=2e-3, batch_size=4))) == ["batch_size", "lr"]
    assert curves.differences(base, {**base, "tokens": 1005}) == []
    assert curves.differences(base, {**base, "tokens": 1050}) == ["tokens"]
    assert curves.differences(base, {**base, "parameters": 6, "stage": "dpo"}) == ["parameters", "stage"]
    child = {**base, "stage": "full_sft", "parent": base}
    assert curves.differences(child, child) == []
    for parent in (None, {**base, "planned_steps": 21}, {**base, "lr": 1.0}):
        assert curves.differences(child, {**child, "parent": parent}) == ["parent"]
    assert curves.differences(curves.settings({"stage": "pretrain"}), base)     # of an older form: nothing fits


def test_made_from_runs_and_found_again(tmp_path, monkeypatch, capsys):
    folders = []
    for seed, scale in enumerate((1.0, 1.02, 0.98)):
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        (folders[-1] / "summary.json").write_text(json.dumps(summary_of(seed, scale)), encoding="utf-8")
    monkeypatch.setattr(curves, "EXPECTED", tmp_path / "expected")
    curves.main(curves.Config(run=",".join(map(str, folders)), make=str(tmp_path / "expected" / "pretrain.json")))
    band = curves.expected(summary_of())
    assert [point["step"] for point in band] == [0, 10, 20]
    low, middle, high = band[2]["bits_per_byte"]
    assert 0.9 < low < 0.98 and middle == pytest.approx(1, abs=1e-3) and 1.02 < high < 1.12
    assert curves.expected(summary_of(lr=1.0)) == curves.expected({**summary_of(), "stage": "dpo"}) == []
    shorter = curves.expected(summary_of(steps=(0, 10, 18)))
    assert [point["step"] for point in shorter] == [0, 10]       # with wsd of 18 steps the rate goes down after 13
    # a run's own report
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(held_out(step, bpb)) + "\n" for step, bpb in
                                                      ((0, 4.0), (10, 2.0), (20, 1.0))), encoding="utf-8")
    curves.report(folders[0])
    assert "held-out bpb 1.000 at 0.0M tokens: inside the expected" in capsys.readouterr().out

    (folders[1] / "summary.json").write_text(json.dumps(summary_of(1, batch_size=3)), encoding="utf-8")
    for runs, told in ((folders, "batch_size"), (folders[:1], "a band needs"), ([tmp_path], "no summary.json")):
        with pytest.raises(UserError, match=told):
            curves.main(curves.Config(run=",".join(map(str, runs)), make=str(tmp_path / "no.json")))
    assert not (tmp_path / "no.json").exists()


def test_verdicts():
    def verdict(*entries):
        return curves.verdict(curves.held_out(entries), BAND)

    assert "inside the expected 0.900 to 1.100" in verdict(held_out(0, 3.0), held_out(10, 2.0), held_out(20, 1.05))
    assert "above" in verdict(held_out(20, 1.15)) and "Is my loss normal?" in verdict(held_out(20, 1.15))
    assert "below" in verdict(held_out(20, 0.85)) and "normal" not in verdict(held_out(20, 0.85))
    assert "1.000 at 0.0M" in verdict(held_out(10, 1.0), held_out(20, 0.5, targets=2000))       # other held-out rows
    assert verdict(held_out(0, 1.0)) is verdict(held_out(15, 1.0)) is verdict() is None


@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: path.stem)
def test_the_committed_curves_are_those_of_the_quickstart(path):
    """A changed default, or changed data, makes the curves those of nobody: make them again (trainer/README.md)."""
    curve = json.loads(path.read_text(encoding="utf-8"))
    found = curve["settings"]
    stages = {"pretrain": (train_pretrain.Config, quickstart.Config.pretrain_steps),
              "full_sft": (train_full_sft.Config, quickstart.Config.sft_steps)}
    config, steps = stages[path.stem]
    assert found["stage"] == path.stem and found["planned_steps"] == steps and len(set(curve["seeds"])) >= 3
    assert {name: found[name] for name in curves.SHAPING if hasattr(config, name)} == \
        {name: getattr(config, name) for name in curves.SHAPING if hasattr(config, name)}
    points = curve["points"]
    assert points[0]["step"] == 0 and points[-1]["step"] == steps
    for point in points:
        for low, middle, high in (point["loss"], point["bits_per_byte"]):
            assert 0 < low < middle < high < 1.3 * middle


def test_a_run_that_samples_leaves_its_dashboard(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append((figure, path)))
    entries = [{"step": 0, "val_loss": 0.6, "val_accuracy": 0.4, "val_accuracy_interval": [0.3, 0.5],
                "val_reward": 0.3},
               {"step": 5, "reward": 0.5, "reward_checker": 0.5, "reward_std": 0.1, "lr": 1e-4,
                "explained_variance": None},
               {"step": 10, "val_loss": 0.5, "val_accuracy": 0.5, "val_accuracy_interval": [0.4, 0.6],
                "val_canary_yes": 0.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    curves.report(tmp_path)
    (figure, path), = drawn
    assert path == tmp_path / "curves.png"
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert panels.keys() == curves.DASHBOARD.keys()
    accuracy, = panels["held out: accuracy"].lines
    assert accuracy.get_xydata().tolist() == [[0, 0.4], [10, 0.5]]
    assert len(panels["held out: accuracy"].collections) == 1                        # its interval
    assert [line.get_label() for line in panels["reward, as trained on"].lines] == [
        "reward", "reward_checker", "reward, held out"]
    assert [line.get_label() for line in panels["canaries, and the reward of the policy"].lines] == [
        "canary_yes, held out", "reward, held out"]
