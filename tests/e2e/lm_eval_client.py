"""lm_eval as its users run it, in a process of its own: python lm_eval_client.py JOBS.json.

Each job has model_args and a batch size; prints what lm_eval says of every document of every task.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate  # pyright: ignore
from lm_eval.tasks import TaskManager  # pyright: ignore


def main(jobs_file: Path) -> None:
    jobs: dict[str, Any] = json.loads(jobs_file.read_text())
    manager = TaskManager(include_path=jobs["tasks"], include_defaults=False)
    found = []
    for job in jobs["jobs"]:
        result = simple_evaluate(
            model="local-completions",
            model_args=job["model_args"],
            batch_size=job["batch_size"],
            tasks=jobs["names"],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = {
            name: [(s["doc_id"], s["filtered_resps"]) for s in result["samples"][name]]
            for name in jobs["names"]
        }
        found.append({"samples": samples, "results": result["results"]})
    print(json.dumps(found, default=str))


main(Path(sys.argv[1]))
