"""The Training page: curves of runs from their metrics.jsonl, drawn again while they grow."""

import json
import math
import pathlib
import posixpath

import altair as alt
import pandas as pd
import streamlit as st

from scripts.web import sources
from scripts.web.chat import KEEP
from scripts.web.labels import say
from scripts.web.text import escaped, plain

SECONDS = 5                  # between two looks at the files
AT_FIRST = 3                 # runs shown before anything is chosen: those written to last
MOST_POINTS = 1000           # of a curve; longer ones are thinned
COUNTERS = ("step", "tokens", "minutes")


def find_runs(folder):
    """Folders below `folder` with a metrics.jsonl, the one written to last first: {name: path}."""
    found = [path / "metrics.jsonl" for path, files in sources.walk([folder]) if "metrics.jsonl" in files]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.parent.relative_to(folder).as_posix(): path.parent for path in found}


@st.cache_data(show_spinner=False, max_entries=100)
def read_metrics(path, size, changed):
    """The objects of a metrics.jsonl, a list of dicts; size and changed (its time) make a grown file a new one.

    A last line that is being written is left for the next time, as is anything that is not an object.
    """
    rows = []
    for line in pathlib.Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def rows_of(folder):
    path = folder / "metrics.jsonl"
    try:
        state = path.stat()
        return read_metrics(str(path), state.st_size, state.st_mtime)
    except OSError:                                    # the run was removed meanwhile
        return []


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def curve(rows, metric, over, smoothing):
    """[(x, y, smoothed y)] of a metric in the rows that log it; rows without the counter `over` are left out.

    Smoothed: an exponential moving average s = a·s + (1 - a)·y, divided by 1 - a^n so that its beginning is not
    pulled to zero. Long curves keep every n-th point and the last.
    """
    points, average, weight = [], 0.0, 0.0
    for row in rows:
        x, y = row.get(over), row.get(metric)
        if is_number(x) and is_number(y):
            average, weight = smoothing * average + (1 - smoothing) * y, smoothing * weight + 1 - smoothing
            points.append((x, y, average / weight))
    stride = -(-len(points) // MOST_POINTS) or 1
    return points[:-1][::stride] + points[-1:]


def metrics_of(folders):
    """Names of what the runs logged as numbers, losses and held-out figures first."""
    names = {name for folder in folders for row in rows_of(folder) for name, value in row.items() if is_number(value)}
    first = ("loss", "val_loss", "reward", "val_reward", "val_accuracy", "val_bits_per_byte")
    return sorted(names - set(COUNTERS), key=lambda name: (first.index(name) if name in first else len(first), name))


def shortened(names):
    """Names without the folders that all of them lie in: a phone has no room to repeat them."""
    common = posixpath.commonpath([posixpath.dirname(name) for name in names])
    return [posixpath.relpath(name, common) if common else name for name in names]


def page(cfg):
    st.title(say("training"))
    folder = sources.place(cfg.runs)
    runs = find_runs(folder)
    if not runs:
        st.info(say("no_runs", folder=escaped(sources.shown(folder))))
        return
    chosen = st.multiselect(say("runs"), list(runs), list(runs)[:AT_FIRST], key="runs", **KEEP)
    if not chosen:
        st.info(say("choose_runs"))
        return
    left, right = st.columns(2)
    names = metrics_of([runs[name] for name in chosen])
    if not names:
        st.info(say("nothing_logged"))
        return
    metric = left.selectbox(say("metric"), names, key="metric", **KEEP)
    over = right.selectbox(say("over"), COUNTERS, key="over", **KEEP,
                           format_func=lambda name: say("steps" if name == "step" else name))
    left, right = st.columns(2, vertical_alignment="center")
    smoothing = left.slider(say("smoothing"), 0.0, 0.99, 0.0, 0.01, help=say("smoothing_help"), key="smoothing", **KEEP)
    log_scale = right.toggle(say("log_scale"), key="log_scale", **KEEP)
    shown = {short: runs[name] for name, short in zip(chosen, shortened(chosen), strict=True)}
    draw(shown, metric, over, smoothing, log_scale)


@st.fragment(run_every=SECONDS)
def draw(runs, metric, over, smoothing, log_scale):
    """The curves and a line of figures for each run. Streamlit calls this again by itself."""
    curves = {plain(name): curve(rows_of(folder), metric, over, smoothing) for name, folder in runs.items()}
    points = pd.DataFrame([{"run": name, "x": x, "y": y, "smooth": smooth} for name, points in curves.items()
                           for x, y, smooth in points if not log_scale or min(y, smooth) > 0])
    if points.empty:
        st.info(say("nothing_logged"))
        return
    scale = alt.Scale(type="log") if log_scale else alt.Scale(zero=False)
    lines = alt.Chart(points).encode(
        x=alt.X("x:Q", title=say("steps" if over == "step" else over)),
        color=alt.Color("run:N", title=None, sort=list(curves),
                        legend=alt.Legend(orient="top", columns=1, labelLimit=500)))
    tips = [alt.Tooltip("run:N", title=say("run")), alt.Tooltip("x:Q", title=over),
            alt.Tooltip("y:Q", title=metric, format=".4g")]
    smooth = lines.mark_line(point=len(points) < 60 * len(curves)).encode(
        y=alt.Y("smooth:Q", title=metric, scale=scale), tooltip=tips)
    raw = lines.mark_line(opacity=0.25).encode(y=alt.Y("y:Q", title=metric, scale=scale))
    chart = (raw + smooth if smoothing else smooth).properties(height=320 + 30 * len(curves))
    st.altair_chart(chart.interactive(bind_y=False))
    st.dataframe(pd.DataFrame([figures(plain(name), folder, curves[plain(name)]) for name, folder in runs.items()]),
                 hide_index=True)
    st.caption(say("refreshed", seconds=SECONDS))


def figures(name, folder, points):
    """What the table says about a run: how far it is, and the metric's last and lowest value."""
    rows, line = rows_of(folder), {say("run"): name}
    for counter in COUNTERS:
        line[say("steps" if counter == "step" else counter)] = next(
            (row[counter] for row in reversed(rows) if is_number(row.get(counter))), None)
    line[say("last_value")] = float(f"{points[-1][1]:.4g}") if points else None
    line[say("best_value")] = float(f"{min(y for _, y, _ in points):.4g}") if points else None
    line[say("state")] = say("finished" if (folder / "summary.json").exists() else "unfinished")
    return line
