"""The scripts in deploy/, run as a cluster would run them: two nodes that are both this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from lascaux.config.load import load_config
from lascaux.parallel.layout import resolve_layout
from tests.conftest import metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
PATIENCE_SECONDS = 100
PYTHON_BIN = Path(sys.executable).parent

CONFIG = """
[model]
num_layers = 2
d_model = 32
num_heads = 4
vocab_size = 300
max_context = 32
[data]
sources = "{text}"
valid_fraction = 0.2
[train]
steps = {steps}
batch_tokens = 256
microbatch_seqs = 2
seq_len = 32
device = "cpu"
precision = "fp32"
[parallel]
tp = {tp}
timeout_seconds = 60
[schedule]
warmup_steps = 2
[checkpoint]
every_steps = 20
[evaluate]
every_steps = 0
"""

# `srun` starts its command once for each node, hands SIGUSR1 on and returns the highest exit code.
SRUN = """
import json, os, pathlib, signal, subprocess, sys
command = sys.argv[1:]
with open(pathlib.Path(__file__).with_name("srun.log"), "a") as log:
    log.write(json.dumps(command) + "\\n")
while command[0].startswith("--"):
    command.pop(0)
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(n)}) for n in nodes]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""
SCONTROL = """
import pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    assert sys.argv[3:] == ["node[1-2]"]
    print("localhost\\nnode2")
else:
    pathlib.Path(__file__).with_name("scontrol.log").write_text(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Callable[..., Path]:
    def write(steps: int = 8, tp: int = 1) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(CONFIG.format(text=corpus, steps=steps, tp=tp))
        return path

    return write


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script of its own group of processes; whatever is left of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def launch(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        with open(tmp_path / f"{len(started)}.log", "w") as log:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield launch
    for process in started:
        for pid in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


@pytest.fixture
def slurm(tmp_path: Path, start: Callable[..., Any]) -> Callable[..., subprocess.Popen[str]]:
    """Submit train.sbatch, its first lines edited; Slurm's commands are the two above."""
    commands = tmp_path / "slurm"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(f"#!{sys.executable}\n{text}")
        (commands / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f"PATH={PYTHON_BIN}:$PATH\n")
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(free_port() - 20000),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_GPUS_ON_NODE": "1",
    }

    def submit(config: Path, run: Path) -> subprocess.Popen[str]:
        script = (DEPLOY / "slurm" / "train.sbatch").read_text()
        for name, value in (("CONFIG", config), ("RUN", run), ("VENV", tmp_path / "venv")):
            script, found = re.subn(rf"(?m)^{name}=\S+", f"{name}={value}", script)
            assert found == 1
        (tmp_path / "train.sbatch").write_text(script)
        return start(["bash", str(tmp_path / "train.sbatch")], environment)

    return submit


def free_port() -> int:
    """One of those that the job's number leads train.sbatch to."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


def descendants(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in path.read_text().split()] if path.exists() else []
    return [found for child in children for found in (*descendants(child), child)]


def workers(pid: int) -> list[int]:
    """The processes that train."""
    found = []
    for child in descendants(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if b"train" in words and words[1].endswith(b"lascaux"):
            found.append(child)
    return found


def wait_for(path: Path, process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, output.read_text()
        time.sleep(0.02)


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "slurm" / "srun.log").read_text().splitlines()]


def test_slurm_reads_every_line_that_is_meant_for_it() -> None:
    """It looks no further than the first command, and knows nothing of a second `#`."""
    lines = (DEPLOY / "slurm" / "train.sbatch").read_text().splitlines()
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    asked = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert asked and max(asked) < first_command


def test_slurm_trains_to_the_end_though_a_process_is_killed(
    tmp_path: Path, config: Callable[..., Path], slurm: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    job = slurm(config(steps=150), run)
    wait_for(run / "checkpoints" / "step_00000020", job, tmp_path / "0.log")
    os.kill(workers(job.pid)[-1], signal.SIGKILL)
    assert job.wait(PATIENCE_SECONDS) == 0, (tmp_path / "0.log").read_text()
    output = (tmp_path / "0.log").read_text()
    assert "dp_shard 2: 2 processes" in output
    assert "continued at step" in output and "3 restarts left" in output
    assert metrics(run)[-1]["step"] == 150
    assert len(calls(tmp_path)) == 2
    assert not (tmp_path / "slurm" / "scontrol.log").exists()


def test_slurm_saves_and_queues_again_when_time_is_nearly_up(
    tmp_path: Path, config: Callable[..., Path], slurm: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    job = slurm(config(steps=1_000_000), run)
    wait_for(run / "checkpoints" / "step_00000020", job, tmp_path / "0.log")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE_SECONDS) == 75, (tmp_path / "0.log").read_text()
    assert "nothing is lost" in (tmp_path / "0.log").read_text()
    last = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step_{last:08d}" / "manifest.json").exists()
    requeued = (tmp_path / "slurm" / "scontrol.log").read_text()
    assert re.fullmatch(r"requeue \d+", requeued)
    assert len(calls(tmp_path)) == 1


def test_slurm_ends_at_once_with_what_the_user_must_mend(
    tmp_path: Path, config: Callable[..., Path], slurm: Callable[..., subprocess.Popen[str]]
) -> None:
    job = slurm(config(tp=3), tmp_path / "run")
    assert job.wait(PATIENCE_SECONDS) == 2, (tmp_path / "0.log").read_text()
    output = (tmp_path / "0.log").read_text()
    assert "parallel.tp 3 needs a multiple of 3 processes, and there are 2" in output
    assert len(calls(tmp_path)) == 1
    assert not (tmp_path / "slurm" / "scontrol.log").exists()


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """What train.yaml asks Kubernetes for, by kind."""
    text = (DEPLOY / "kubernetes" / "train.yaml").read_text()
    return {item["kind"]: item for item in yaml.safe_load_all(text)}


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    (only,) = manifest["Job"]["spec"]["template"]["spec"]["containers"]
    return only


def variables(manifest: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(manifest)["env"]}


def test_the_parts_of_the_manifest_fit_together(manifest: dict[str, Any]) -> None:
    job, service = manifest["Job"], manifest["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    labels, environment = job["spec"]["template"]["metadata"]["labels"], variables(manifest)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= labels.items()
    (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart["labelSelector"]["matchLabels"].items() <= labels.items()
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(manifest)["volumeMounts"]}
    assert volumes.keys() == mounts.keys() and mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    claim = manifest["PersistentVolumeClaim"]
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volumes["config"]["configMap"]["name"] == manifest["ConfigMap"]["metadata"]["name"]
    assert Path(environment["RUN"]).is_relative_to(mounts["runs"])
    assert environment["CONFIG"] in [
        f"{mounts['config']}/{n}" for n in manifest["ConfigMap"]["data"]
    ]
    assert pod["terminationGracePeriodSeconds"] > int(environment["SAVE_SECONDS"]) + 30
    rules = spec["podFailurePolicy"]["rules"]
    assert pod["restartPolicy"] == "Never"  # or those rules would not be taken
    by_code = {r["onExitCodes"]["values"][0]: r["action"] for r in rules if "onExitCodes" in r}
    assert by_code == {2: "FailJob", 75: "Ignore"}
    names = {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r}
    assert names == {container(manifest)["name"]}


def test_the_configuration_in_the_manifest_is_accepted(
    manifest: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(manifest["ConfigMap"]["data"]["run.toml"])
    nodes, gpus = manifest["Job"]["spec"]["completions"], container(manifest)["resources"]["limits"]
    layout = resolve_layout(load_config(str(path)), nodes * gpus["nvidia.com/gpu"])
    assert layout.dp_replicate == nodes


def start_pods(
    manifest: dict[str, Any],
    start: Callable[..., subprocess.Popen[str]],
    config: Path,
    run: Path,
) -> list[subprocess.Popen[str]]:
    """Both pods: names lead to this machine, volumes to its folders, and a node has no GPU."""
    here = {
        "CONFIG": str(config),
        "RUN": str(run),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PROCESSES": "1",
        "PATH": f"{PYTHON_BIN}:{os.environ['PATH']}",
    }
    only = container(manifest)
    return [
        start(
            [*only["command"], *only["args"]],
            {**variables(manifest), **here, "JOB_COMPLETION_INDEX": str(index)},
        )
        for index in range(manifest["Job"]["spec"]["completions"])
    ]


def outputs(tmp_path: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))


def test_pods_train_to_the_end(
    tmp_path: Path,
    manifest: dict[str, Any],
    config: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    run = tmp_path / "run"
    pods = start_pods(manifest, start, config(), run)
    assert [pod.wait(PATIENCE_SECONDS) for pod in pods] == [0, 0], outputs(tmp_path)
    assert metrics(run)[-1]["step"] == 8
    assert "dp_shard 2: 2 processes" in outputs(tmp_path)


def test_all_pods_save_when_one_is_stopped(
    tmp_path: Path,
    manifest: dict[str, Any],
    config: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    run = tmp_path / "run"
    pods = start_pods(manifest, start, config(steps=1_000_000), run)
    wait_for(run / "checkpoints" / "step_00000020", pods[0], tmp_path / "0.log")
    pods[1].terminate()
    assert [pod.wait(PATIENCE_SECONDS) for pod in pods] == [75, 75], outputs(tmp_path)
    last = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step_{last:08d}" / "manifest.json").exists()


def test_a_lost_pod_does_not_end_the_job_but_a_mistake_does(
    tmp_path: Path,
    manifest: dict[str, Any],
    config: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    run = tmp_path / "run"
    pods = start_pods(manifest, start, config(steps=1_000_000), run)
    wait_for(run / "checkpoints" / "step_00000020", pods[0], tmp_path / "0.log")
    os.kill(workers(pods[1].pid)[0], signal.SIGKILL)
    left, lost = (pod.wait(PATIENCE_SECONDS) for pod in pods)
    assert lost == 1 and left in (1, 75), outputs(tmp_path)
    pods = start_pods(manifest, start, config(tp=3), tmp_path / "other")
    assert [pod.wait(PATIENCE_SECONDS) for pod in pods] == [2, 2], outputs(tmp_path)
