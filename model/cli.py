"""Command-line flags from a dataclass: a field's name, type, default and help are the flag's.

    @dataclass
    class Config:
        lr: float = arg(1e-3, "peak learning rate")
        size: str = arg("nano", "named size", choices=("nano", "small"))

    cfg = parse_args(Config)              # python script.py --lr 3e-4
    cfg = Config(lr=3e-4)                 # the same from Python: tests call main(Config(...))

Field types are str, int, float and bool only; "off" is 0 or "". A bool becomes `--flag` and `--no-flag`.
"""

import argparse
import dataclasses
import pathlib
import sys

SHIPPED = pathlib.Path(__file__).resolve().parent / "nano"          # the checkpoint that comes with the project


def arg(default, help, choices=None, positional=False):
    """A dataclass field that is also a command-line flag. `choices` limits a str flag to the given values; positional:
    the value stands alone on the command line, without a flag before it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "positional": positional})


class HintingParser(argparse.ArgumentParser):
    """argparse that answers an unknown flag which people bring from elsewhere with the name of ours."""

    def __init__(self, *args, hints=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.hints = hints or {}

    def error(self, message):
        used = [token.split("=")[0].lstrip("-") for token in sys.argv[1:] if token.startswith("--")]
        told = [f"--{flag}: here {self.hints[flag]}" for flag in used if flag in self.hints]
        self.exit(2, f"error: {'; '.join(told) or message} (--help lists the flags)\n")


def parse_args(cls, argv=None, description="", hints=None):
    """Parse `argv` (default: the command line) into an instance of the dataclass `cls`.

    `hints` maps flags of similar projects, without dashes, to what answers them here. Wrong use prints one line and
    exits with code 2.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = HintingParser(description=description, allow_abbrev=False, formatter_class=formatter, hints=hints)
    for field in dataclasses.fields(cls):
        text = field.metadata["help"].replace("%", "%%")
        shown = f" (default: {field.default})" if field.default != "" else ""
        options = {"default": field.default, "help": text + shown, "dest": field.name}
        if field.metadata["positional"]:
            parser.add_argument(field.name, nargs="?", default=field.default, help=text + shown,
                                metavar=field.name.upper())
        elif field.type is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, choices=field.metadata["choices"],
                                metavar=None if field.metadata["choices"] else field.type.__name__.upper(), **options)
    return cls(**vars(parser.parse_args(argv)))


def or_shipped(folder):
    """`folder`, a script's default checkpoint, or while nothing was trained there the one that comes along, said so."""
    if folder.is_dir() or not SHIPPED.is_dir():
        return folder
    print(f"{folder.parent.name}/{folder.name} is not there yet (bash scripts/quickstart.sh trains it): this is "
          f"{SHIPPED.parent.name}/{SHIPPED.name}, which comes along", flush=True)
    return SHIPPED
