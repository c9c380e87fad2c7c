"""Experiment trackers: what a run measures, on a page of SwanLab or Weights & Biases. Off unless `--tracker` asks.

metrics.jsonl is the record of a run and a tracker only a view of it, so that nothing a tracker does may cost the run:
it starts at the first figure, gives back the signal handlers it takes, and is dropped with one warning when it fails.
Keys are the packages' own business (`swanlab login`, `wandb login`, or their environment variables): none passes here.
"""

import contextlib
import html
import importlib.util
import json
import os
import random
import signal
import uuid

from model.errors import UserError

MODES = {   # what --tracker_mode is called by each package
    "swanlab": {"cloud": "cloud", "offline": "offline", "local": "local", "disabled": "disabled"},
    "wandb": {"cloud": "online", "offline": "offline", "disabled": "disabled"},
}
KEYS = ("SWANLAB_API_KEY", "WANDB_API_KEY")


def check(cfg):
    """UserError when the flags ask for a tracker that is not there, before anything is built."""
    if cfg.tracker == "none":
        return
    if cfg.tracker not in MODES:
        raise UserError(f"--tracker {cfg.tracker}: expected none, {' or '.join(MODES)}")
    if cfg.tracker_mode not in MODES[cfg.tracker]:
        raise UserError(f"--tracker_mode {cfg.tracker_mode}: {cfg.tracker} knows {', '.join(MODES[cfg.tracker])}")
    if importlib.util.find_spec(cfg.tracker) is None:
        raise UserError(f"--tracker {cfg.tracker}: not installed; python -m pip install {cfg.tracker}")
    if cfg.tracker_mode == "local" and importlib.util.find_spec("swanboard") is None:
        raise UserError("--tracker_mode local: the dashboard is not installed; "
                        'python -m pip install "swanlab[dashboard]", or use --tracker_mode offline')


class Tracker:
    """The tracker of one run. With --tracker none, on other ranks than 0 and after a failure every call does nothing.

    `id` names the tracker's run: a continued training is given the old one and goes on in the same curves.
    """

    def __init__(self, cfg, folder, is_main):
        check(cfg)
        self.cfg, self.folder = cfg, folder
        self.on = is_main and cfg.tracker != "none"
        self.id = uuid.uuid4().hex
        self.run = None                                    # the package's own object, from the first figure on

    def log(self, step, figures):
        """Send the numbers among `figures` {name: value} as those of `step`; an interval becomes its two ends."""
        numbers = {}
        for name, value in figures.items():
            if isinstance(value, (tuple, list)) and len(value) == 2:
                numbers |= {f"{name}_low": value[0], f"{name}_high": value[1]}
            elif isinstance(value, (int, float)) and name not in ("step", "final"):
                numbers[name] = value
        self.attempt(lambda: self.started().log(numbers, step=step))

    def sample(self, step, text):
        """Send a text of the model's."""
        def send():
            run = self.started()
            package = importlib.import_module(self.cfg.tracker)
            shown = (package.Text(text) if self.cfg.tracker == "swanlab"
                     else package.Html(f"<pre>{html.escape(text)}</pre>"))
            run.log({"sample": shown}, step=step)

        self.attempt(send)

    def finish(self):
        """Send what is left and close the tracker's run; a training that continues opens it again."""
        if self.run is not None:
            self.attempt(lambda: self.run.finish())
            self.run = None

    def attempt(self, do):
        """Call `do` unless the tracker is off; if it fails, the tracker is off from now on."""
        if self.on:
            with undisturbed():
                self.on = warn_if_it_fails(f"--tracker {self.cfg.tracker} is off from here on", do)

    def started(self):
        """The package's run object; the first call starts it, with the settings that train_config.json holds."""
        if self.run is None:
            cfg = self.cfg
            if cfg.tracker_mode != "cloud":                # wandb would report its own start even so
                os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            package = importlib.import_module(cfg.tracker)
            config = json.loads((self.folder / "train_config.json").read_text(encoding="utf-8"))
            common = dict(project=cfg.tracker_project, name=self.folder.resolve().name, config=config, id=self.id,
                          resume="allow", mode=MODES[cfg.tracker][cfg.tracker_mode])
            if cfg.tracker == "swanlab":                   # both: end what an interrupted run left open
                self.run = package.init(**common, log_dir=str(self.folder / "swanlog"), reinit=True)
            else:
                self.run = package.init(**common, dir=str(self.folder), reinit="finish_previous")
        return self.run


@contextlib.contextmanager
def undisturbed():
    """Keep what trackers change in passing: the handlers of Ctrl-C and SIGTERM, which save the run, and `random`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    drawn = random.getstate()
    try:
        yield
    finally:
        random.setstate(drawn)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def warn_if_it_fails(consequence, do):
    """Call `do`; an exception becomes one warning that ends in `consequence`. Returns whether all went well.

    The only place that catches everything, and for extras only: a tracker or a plot comes from a package that may
    raise anything (no network, a full disk, a server's whim), and hours of training must not end because of it.
    """
    try:
        do()
    except (Exception, SystemExit) as error:               # swanlab leaves by sys.exit where it asks for a key
        told = (str(error).splitlines() or [""])[0][:300]  # no further: the lines after it may show settings
        for key in filter(None, map(os.environ.get, KEYS)):
            told = told.replace(key, "***")
        print(f"warning: {type(error).__name__}: {told} ({consequence})", flush=True)
        return False
    return True
