"""Errors in the words of the command line: the package names arguments and functions, and a user types options and commands.

A message of the package names its arguments as Python does, and where a remedy is a command, that comes first, such as
"`retro build` (in Python: `RetroDatastore.build(...)`)".
"""

import re
from collections.abc import Iterable
from typing import Any


# Arguments of the package, and the parameters of the commands that give them.
_PARAMETERS = {"retriever": "store", "backbone_name_or_path": "base", "num_passages": "passages"}
_IN_PYTHON = re.compile(r" \(in Python: (?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")


def as_typed(message: str, parameters: Iterable[Any]) -> str:
    """A message of the package for somebody who has typed a command.

    Args:
        message (`str`): of an error.
        parameters (`Iterable`): those of the command.
    """
    message = _IN_PYTHON.sub("", message)
    options = {one.name: max(one.opts, key=len) for one in parameters if one.opts[0].startswith("-")}
    options |= {argument: options[name] for argument, name in _PARAMETERS.items() if name in options}
    for argument, option in options.items():
        message = re.sub(rf"`[\w.]+\([^`]*\b{argument}=([^`,]*)\)`", rf"`{option} \1`", message)
        message = re.sub(rf"(?<![\w.-]){argument}=(?=[^\s`,)])", f"{option} ", message)
        # A word of plain English counts only where it must be the argument.
        anywhere = rf"|{argument}" if "_" in argument else ""
        message = re.sub(
            rf"(?<![\w.-])(?:{argument}=|(?<=`){argument}(?=`)|^{argument}(?= is ){anywhere})(?!\w)", option, message
        )
    return message
