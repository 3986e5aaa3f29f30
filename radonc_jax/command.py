"""How a command starts and ends: what a user can get wrong is told in one line."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

PREEMPTED = 75  # the exit code of a run that was told to end and has saved: "try again"
CONFIGS = Path(__file__).parents[1] / "configs"


class Preempted(BaseException):
    """The process was told to end and has saved its work; the message says how far it was.

    As `KeyboardInterrupt`, it is none of the errors that a piece of work may have and be spared.
    """


def run(main: Callable[[], None], *, stopped: str = "stopped") -> None:
    """Reads the flags, then runs `main` as `guard` does; ends the process."""
    app.run(guard(main, stopped=stopped), flags_parser=_parse_flags)


def guard(main: Callable[[], None], *, stopped: str = "stopped") -> Callable[[list[str]], None]:
    """`main` as absl calls it, with the arguments that are no flags.

    One of those, a `ValueError`, an `OSError` (no such file, no permission, disk full) or a
    `FloatingPointError` becomes `SystemExit("error: ...")`, one line; anything else is a bug and
    keeps its traceback.

    Args:
      main: a command, without arguments: all it takes are flags.
      stopped: told, with exit code 130, when it is interrupted from the keyboard, and with code
        `PREEMPTED` when it ends by `Preempted`.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected argument {argv[1]!r}; every setting is a --flag=value")
        try:
            main()
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {_message(error)}")
        except Preempted as reason:
            print(f"told to end: {reason}; {stopped.removeprefix('stopped: ')}", file=sys.stderr)
            sys.exit(PREEMPTED)
        except KeyboardInterrupt:
            print(stopped, file=sys.stderr)
            sys.exit(130)

    return guarded


def _parse_flags(argv: list[str]) -> list[str]:
    _check_choices(argv)
    _check_config(argv)
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:  # ml_collections, of a key it does not know
        cause = error
        while cause.args and isinstance(cause.args[0], Exception):
            cause = cause.args[0]
        text = ". ".join(str(cause.args[0]).splitlines())
        joined = " has no key " if text.startswith("'") else ": "
        sys.exit(f"error: --config{joined}{text}")
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {_message(error)}")


def _check_choices(argv: list[str]) -> None:
    """Ends the process where a flag that takes one of several values has none: the flag that comes
    next would be taken for it."""
    for argument, following in itertools.pairwise([*argv[1:], "--"]):
        name = argument.removeprefix("--")
        if name == argument or name not in flags.FLAGS or not following.startswith("--"):
            continue
        parser = flags.FLAGS[name].parser
        if isinstance(parser, flags.EnumParser):
            values = " or ".join(f"{argument}={value}" for value in parser.enum_values if value)
            sys.exit(f"error: {argument} needs a value: {values}")


def _check_config(argv: list[str]) -> None:
    """Ends the process where --config names no file, which ml_collections tells in its own words;
    those that there are stand in the error."""
    if "config" not in flags.FLAGS:
        return
    for argument, following in itertools.pairwise([*argv[1:], ""]):
        name, separator, value = argument.partition("=")
        if name not in ("--config", "-config"):
            continue
        value = (value if separator else following).partition(":")[0]
        if not value:
            sys.exit("error: --config needs a value: a file of configs/")
        path = Path(value)
        if path.exists() and not path.is_dir():
            continue
        here = "" if path.is_absolute() else f" in {Path.cwd()}"
        there = [file.name for file in sorted(CONFIGS.glob("*_*.py")) if file.name[0] != "_"]
        there = f"; {CONFIGS} has {', '.join(there)}" if there else ""
        sys.exit(f"error: --config={path}: no such file{here}{there}")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
