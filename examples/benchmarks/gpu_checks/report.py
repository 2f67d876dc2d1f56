"""Options of gpu_check.py, and what writes its results."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """What the command line says.

    :param device: "cuda" or "cpu"
    :param out: folder of the results
    :param quick: fewer cases and tiny sizes; the times say nothing
    :param no_code: run compiled graphs operation by operation, without TorchInductor
    :param parallel: run the stages that check side by side
    :param limit: seconds for all stages together
    :param scale: factor of the stages' own time limits
    """

    device: str = "cuda"
    out: Path = Path("logs/gpu")
    quick: bool = False
    no_code: bool = False
    parallel: bool = True
    limit: float = 430.0
    scale: float = 1.0


class Report:
    """Writes the results of one stage.

    :param out: folder of ``check.jsonl``
    :param stage: name of the stage
    """

    def __init__(self, out: Path, stage: str) -> None:
        self.path = out / "check.jsonl"
        self.stage = stage

    def write(self, item: str, **values: Any) -> None:  # whatever JSON or str() can show
        """Write one result; ``ok`` says whether it is what it should be."""
        line = json.dumps({"stage": self.stage, "item": item, **values}, default=str)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @contextmanager
    def noting_errors(self, item: str) -> Iterator[None]:
        """Write an error as a result of the item, and go on."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:400]}"
            self.write(item, ok=False, error=text, traceback=traceback.format_exc()[-1800:])

    def check(self, item: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:  # the function's
        """Call a function and write the values that it returns, or its error."""
        started = time.time()
        with self.noting_errors(item):
            values = function(*arguments)
            self.write(item, **{"ok": True, **values}, seconds=round(time.time() - started, 1))
