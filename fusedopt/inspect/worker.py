"""The processes behind `fusedopt inspect`: compiling and interpreting exclude each other in one process.

Called as ``worker compiled|interpreted JSON``, where the JSON object holds the configuration and, for the former, the
architecture. Prints one JSON object: the counts, or ``{"error": …, "input": whether the request was at fault}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from fusedopt.inspect.errors import BadAccess, BadInput, CannotFollow


class Worker:
    """A process at work on one of the two methods."""

    def __init__(self, method: str, request: dict[str, Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        if method == "interpreted":
            environment["TRITON_INTERPRET"] = "1"
        # The child must import the same fusedopt, also when this process found it through a changed sys.path.
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        command = [sys.executable, "-P", "-m", "fusedopt.inspect.worker", method, json.dumps(request)]
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def result(self) -> dict[str, Any]:
        """Wait for the counts.

        Raises:
            BadInput: the request was at fault. CannotFollow: anything else went wrong.
        """
        out, err = self._process.communicate()
        lines = out.strip().splitlines()
        if self._process.returncode or not lines:
            last = err.strip().splitlines()[-1:] or [f"status {self._process.returncode}"]
            raise CannotFollow(f"the counting process ended: {last[0]}")
        answer = json.loads(lines[-1])
        if "error" in answer:
            raise (BadInput if answer["input"] else CannotFollow)(answer["error"])
        return answer

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def main(method: str, request: dict[str, Any]) -> dict[str, Any]:
    """Count by one method."""
    from fusedopt.inspect.subject import Configuration

    configuration = Configuration(**request["configuration"])
    try:
        if method == "compiled":
            from fusedopt.inspect.compiled import inspect

            return inspect(configuration, request["arch"]).as_json()
        from fusedopt.inspect.interpreted import count

        return count(configuration)
    except BadInput as error:
        return {"error": str(error), "input": True}
    except (CannotFollow, BadAccess) as error:
        return {"error": str(error), "input": False}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
