"""How good is a completion? Finds a reward function by name and holds it to its promise.

A reward function is any callable `(prompt, completion, finished) -> float`: the `Prompt` with its answer and metadata,
the completion as text without special tokens, and whether it ended with end-of-sequence rather than at the token limit.
It is named `module:function`; the module is an installed one, or a file in the current directory (installed ones win,
so that no file of the user's shadows a library).

Promises: what `load_reward` returns gives a finite float or raises UsageError. Does not: time out, sandbox.
"""

import importlib
import math
import numbers
import sys
from collections.abc import Callable
from pathlib import Path

from rollout.tasks.prompts import Prompt
from shared.errors import UsageError

OP = "load reward"

Reward = Callable[[Prompt, str, bool], float]


def load_reward(name: str) -> Reward:
    """Import `module:function`, also from the current directory.

    Raises:
        UsageError: not of that form, no such module or function, a module that fails on import, not callable. What is
            returned raises it for an exception inside the reward function and for a result that is no finite number.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise UsageError(
            f"{name!r} does not name a reward function",
            op=OP,
            hint="Write module:function, such as rollout.tasks.chain_sum:reward",
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(f"module {module_name} needs {error.name}, which is not installed", op=OP) from error
        raise UsageError(
            f"no module {module_name}", op=OP, hint=f"Looked among the installed packages and in {here}"
        ) from None
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UsageError(f"module {module_name} fails on import: {type(error).__name__}: {error}", op=OP) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise UsageError(f"module {module_name} has no {attribute}", op=OP, key=str(module.__file__))
    if not callable(function):
        raise UsageError(f"{name} is not callable but a {type(function).__name__}", op=OP)
    return _checked(function, name)


def _checked(function: Callable[..., object], name: str) -> Reward:
    def reward(prompt: Prompt, completion: str, finished: bool) -> float:
        try:
            value = function(prompt, completion, finished)
        except Exception as error:  # the user's code
            raise UsageError(
                f"{name} failed on prompt {prompt.id!r}: {type(error).__name__}: {error}", op="score"
            ) from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UsageError(f"{name} returned {value!r:.80} for prompt {prompt.id!r}, not a finite number", op="score")
        return float(value)

    return reward
