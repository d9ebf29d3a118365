"""Words of the command line: settings set apart, errors in one line, help with every setting."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from lascaux.config.describe import describe_section
from lascaux.errors import ConfigError, suggest


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Set `--section.key=value` and `--section.key value` apart from the rest."""
    plain: list[str] = []
    flags: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, _ = argument.partition("=")
        if not (key.startswith("--") and "." in key):
            plain.append(argument)
        elif equals:
            flags.append(argument)
        elif rest:
            flags.append(f"{argument}={rest.pop(0)}")
        else:
            raise ConfigError(f"{argument} needs a value: {argument}=VALUE")
    return plain, flags


def read_count(text: str) -> int:
    """A whole number as people write it: 1000, 1_000, 1,000, 1e12, 300B, 1.5T.

    Raises: argparse.ArgumentTypeError for anything else.
    """
    plain = text.replace(",", "").replace("_", "").strip()
    power = {"k": 3, "m": 6, "b": 9, "t": 12}.get(plain[-1:].lower())
    try:
        count = float(plain[:-1]) * 10**power if power else float(plain)
        if count != round(count):
            raise ValueError
        return round(count)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number; write 1000000, 1e6, 1M or 300B"
        ) from None


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line and suggests the nearest word."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        words = [word for action in self._actions for word in action.option_strings]
        hint = ""
        if message.startswith("unrecognized arguments: "):
            hint = suggest(message.removeprefix("unrecognized arguments: ").split("=")[0], words)
        raise ConfigError(f"{message}{hint}\nsee: {self.prog} --help")


def add_command(
    commands: "argparse._SubParsersAction[Parser]",
    name: str,
    function: Callable[[argparse.Namespace, list[str]], int],
    words: str,
    sections: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """A command with its help, and that of the settings it hears."""
    settings = "\n\n".join(describe_section(section) for section in sections)
    command = commands.add_parser(
        name,
        help=words,
        description=words[0].upper() + words[1:] + ".",
        epilog=f"settings (shown with their defaults):\n{settings}" if settings else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run_command=function)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    return command
