"""Run main.py as a Slurm job, or as the same job on this machine:

    python -m launch.run_with_submitit --nodes 4 --ngpus 8 --config recipes/hornet_tiny_7x7.yaml --data_path DIR
    python -m launch.run_with_submitit status runs/12345

Every option that isn't the launcher's own goes to main.py. The job runs a snapshot of the code and the
configuration taken now, is requeued after a preemption or at its time limit, and resumes where it was.
"""
import argparse
import dataclasses
import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import submitit
import yaml

from common.errors import UserError
from common.files import read_json, write_json
from common.ledger import RUNNING, Ledger, Record
from common.log import logger, setup_logging
from common.outcome import ExitCode, Outcome
from launch.slurm import Job
from launch.stop import alive

ROOT = Path(__file__).resolve().parent.parent
SIGNAL_DELAY = 120  # seconds before the time limit at which Slurm signals: more than one update and one save


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the launcher's options.")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _number(kind: type, least: float, most: float = float("inf")):
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            to = f" to {most:g}" if most < float("inf") else " or more"
            raise argparse.ArgumentTypeError(f"{text!r}: a number of {least:g}{to} is accepted")
        return value
    return parse


def parser() -> argparse.ArgumentParser:
    """The launcher's own options; the published launcher's names, without any site's defaults."""
    p = _Parser(prog="python -m launch.run_with_submitit", allow_abbrev=False, description=__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nodes", type=_number(int, 1), default=1, help="number of nodes")
    p.add_argument("--ngpus", type=_number(int, 1), default=8,
                   help="processes, and GPUs unless --device cpu, per node")
    p.add_argument("--timeout", type=_number(float, 1 / 60, 24 * 366), default=72, help="time limit in hours")
    p.add_argument("--job_name", default="hornet")
    p.add_argument("--job_dir", default="runs/%j", help="folder of the logs and, by default, the run; %%j: job id")
    p.add_argument("--partition", help="where to submit; Slurm's default if not given")
    p.add_argument("--comment", help="comment for the scheduler")
    p.add_argument("--cpus_per_task", type=_number(int, 1), default=10, help="CPU cores per process")
    p.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE",
                   help="any other sbatch option, such as --slurm account=vision --slurm constraint=a100; repeatable")
    p.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto",
                   help="auto: Slurm where there is sbatch")
    p.add_argument("--max_requeue", type=_number(int, 0), default=100, help="how often the job may be requeued")
    p.add_argument("--dry_run", nargs="?", const=True, default=False, type=_truth,
                   help="print the job's script and stop")
    p.add_argument("--use_volta32", action="store_true", help="published flag: accepted with a notice")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Submit, or show a job's status. Returns the exit code: 2 for a user's mistake."""
    setup_logging()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["status"]:
            if len(argv) != 2:
                raise UserError("status takes one folder: python -m launch.run_with_submitit status DIR.")
            sys.stdout.write(status(Path(argv[1])))
            return ExitCode.DONE
        options, rest = parser().parse_known_args(argv)
        return submit(options, rest)
    except UserError as error:
        logger.error("%s", error)
        return error.exit_code


def submit(options: argparse.Namespace, argv: list[str]) -> int:
    """Check, take the snapshot, submit, and say where to look. `argv` is main.py's."""
    if options.use_volta32:
        logger.warning("--use_volta32 names GPUs of one cluster and has no effect; use --slurm constraint=NAME.")
    cluster = choose_cluster(options, argv)
    check_main_options(argv)
    folder = str(Path(options.job_dir).expanduser().absolute())
    argv, output_dir = with_output_dir(argv, folder)
    if options.dry_run:
        sys.stdout.write(script(cluster, build_executor(cluster, folder, options, argv), argv))
        return ExitCode.DONE
    code, before = snapshot_folder(folder), os.getcwd()
    try:
        argv = snapshot(code, argv)
        job = Job(argv, before, str(code), folder, output_dir, options.max_requeue)
        executor = build_executor(cluster, folder, options, argv)
        os.chdir(code)  # the job's tasks unpickle and import from here
        submitted = executor.submit(job)
        output_dir = output_dir.replace("%j", submitted.job_id)
        write_json(submitted.paths.folder / "job.json", dict(
            dataclasses.asdict(job), id=submitted.job_id, cluster=cluster, output_dir=output_dir, submitted=time.time()))
    except OSError as error:
        raise UserError(f"--job_dir {options.job_dir} cannot be used: {error.filename or folder}: {error.strerror}; choose "
                        "a folder that all nodes can write to.", code="unusable_folder") from None
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())[-400:]}", code="sbatch") from None
    finally:
        os.chdir(before)
    logger.info("Submitted job %s. Its logs: %s", submitted.job_id, submitted.paths.folder)
    logger.info("python -m launch.run_with_submitit status %s", shlex.quote(str(submitted.paths.folder)))
    return ExitCode.DONE


def choose_cluster(options: argparse.Namespace, argv: list[str]) -> str:
    """"slurm" or "local", saying why when it was for us to choose."""
    there = shutil.which("sbatch") is not None and shutil.which("srun") is not None
    cluster = options.cluster
    if cluster == "auto":
        cluster = "slurm" if there else "local"
        logger.info("--cluster auto: %s, because sbatch is%s on the PATH.", cluster, "" if there else " not")
    if cluster == "slurm" and not there:
        several = " --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500" if options.nodes > 1 else ""
        raise UserError(f"--cluster slurm: there is no sbatch on this machine; without Slurm start"
                        f"{', on each node,' if several else ''} torchrun --nnodes={options.nodes}{several} "
                        f"--nproc_per_node={options.ngpus} main.py {shlex.join(argv)}", code="no_slurm")
    if cluster == "local" and options.nodes > 1:
        raise UserError(f"--nodes {options.nodes}: a local job has one node; use --nodes 1, or torchrun on each node.")
    return cluster


def check_main_options(argv: list[str]) -> None:
    """Let main.py check its options now: a mistake should not wait in a queue for hours."""
    command = [sys.executable, str(ROOT / "main.py"), "--print_config", "true", *argv]
    answer = subprocess.run(command, capture_output=True, text=True)
    if not answer.returncode:
        return
    sentence = answer.stderr.strip() or f"main.py ended with {answer.returncode}"
    if answer.returncode == ExitCode.USAGE:
        sentence = sentence.splitlines()[-1].removeprefix("error: ")
    raise UserError(own_flag_meant(sentence) or sentence, code="main_options")


def own_flag_meant(sentence: str) -> str | None:
    """main.py's sentence on a flag it doesn't know, with the launcher's flag instead of its own suggestion when that
    is nearer; None when it isn't."""
    unknown = re.match(r"unknown flag --([\w-]+)", sentence)
    if not unknown:
        return None
    its = re.search(r"did you mean --(\w+)\?", sentence)
    own = [option.removeprefix("--") for option in parser()._option_string_actions if option.startswith("--")]
    near = difflib.get_close_matches(unknown[1], own + ([its[1]] if its else []), n=1)
    if not near or near[0] not in own:
        return None
    return f"unknown flag --{unknown[1]}; did you mean --{near[0]}?"


def with_output_dir(argv: list[str], folder: str) -> tuple[list[str], str]:
    """`argv` with an absolute --output_dir, the job's folder unless a flag or the configuration names another."""
    given = flag(argv, "output_dir")
    config = flag(argv, "config")
    if given is None and config and Path(config).is_file():
        given = (yaml.safe_load(Path(config).read_text()) or {}).get("output_dir")
    output_dir = str(Path(given).expanduser().absolute()) if given else folder
    return [*without_flag(argv, "output_dir"), "--output_dir", output_dir], output_dir


def flag(argv: list[str], name: str) -> str | None:
    """The last value of --name in `argv`, written with a space or with =."""
    value = None
    for i, token in enumerate(argv):
        if token == f"--{name}" and i + 1 < len(argv):
            value = argv[i + 1]
        elif token.startswith(f"--{name}="):
            value = token.partition("=")[2]
    return value


def without_flag(argv: list[str], name: str) -> list[str]:
    """`argv` without --name and its value."""
    return [token for i, token in enumerate(argv) if token != f"--{name}" and not token.startswith(f"--{name}=")
            and not (i and argv[i - 1] == f"--{name}")]


def snapshot_folder(folder: str) -> Path:
    """A new folder for the code beside the job's: in the part of `folder` before the first %j."""
    base = folder.partition("%")[0]
    base = base if base in (folder, "") or base.endswith("/") else os.path.dirname(base)
    return Path(base) / "code" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def snapshot(code: Path, argv: list[str]) -> list[str]:
    """Copy the program (its modules, packages, recipes) to `code`, and the configuration; `argv` naming the copy."""
    code.mkdir(parents=True)
    for path in sorted(ROOT.iterdir()):
        if path.is_file() and path.suffix == ".py":
            shutil.copy2(path, code)
        elif path.is_dir() and path.name != "tests" and (path.name == "recipes" or any(path.glob("*.py"))):
            shutil.copytree(path, code / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    config = flag(argv, "config")
    if not config or not Path(config).is_file():
        return argv
    shutil.copy2(config, code / "submitted_config.yaml")
    return ["--config", str(code / "submitted_config.yaml"), *without_flag(argv, "config")]


def build_executor(cluster: str, folder: str, options: argparse.Namespace, argv: list[str]) -> submitit.Executor:
    """submitit's executor with the launcher's options in Slurm's terms."""
    gpus = 0 if flag(argv, "device") == "cpu" else options.ngpus
    minutes = max(1, round(options.timeout * 60))
    if cluster == "local":
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=minutes, tasks_per_node=options.ngpus, gpus_per_node=gpus,
                                   signal_delay_s=SIGNAL_DELAY)
        return executor
    extra = {}
    for pair in options.slurm:
        key, equals, value = pair.partition("=")
        if not key:
            raise UserError(f"--slurm {pair}: expected KEY=VALUE as for sbatch, such as --slurm account=vision.")
        extra[key.lstrip("-").replace("-", "_")] = value if equals else True
    parameters = dict(job_name=options.job_name, time=minutes, nodes=options.nodes, ntasks_per_node=options.ngpus,
                      cpus_per_task=options.cpus_per_task, partition=options.partition, comment=options.comment,
                      signal_delay_s=SIGNAL_DELAY, additional_parameters=dict({"requeue": True}, **extra),
                      # From 22.05 on srun doesn't take this over from the job.
                      setup=["export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"])
    if gpus and not any(key.startswith(("gres", "gpus")) for key in extra):
        parameters["gpus_per_node"] = gpus
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


def script(cluster: str, executor: submitit.Executor, argv: list[str]) -> str:
    """What would be submitted."""
    command = f"# each task then runs: main.py {shlex.join(argv)}\n"
    if cluster == "local":
        return f"{executor.parameters['tasks_per_node']} tasks: {executor._submitit_command_str}\n{command}"
    return executor._make_submission_file_text(executor._submitit_command_str, "dry_run") + command


def status(folder: Path) -> str:
    """State, attempts, last update and first cause of the job in `folder`, with the last lines of the failed rank."""
    try:
        job = read_json(folder / "job.json")
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no job.json: give the folder of the logs that run_with_submitit named when it "
                        "submitted the job.", code="no_job") from None
    attempts = [a for path in dict.fromkeys((job["output_dir"], str(folder))) for a in Ledger(path).attempts()
                if a.get("job") == job["id"]]
    last = attempts[-1] if attempts else {}
    lines = [f"job      {job['id']} ({job['cluster']})", f"state    {job_state(job)}",
             f"attempt  {last.get('restarts', 0) + 1} of at most {job['max_requeue'] + 1}"]
    if last.get("state") == RUNNING:
        lines += progress(Path(job["output_dir"]), job["id"])
    elif last:
        lines.append(f"update   {last['update']}")
    for attempt in attempts[-6:]:
        at = f" at update {attempt['update']}" if "update" in attempt else ""
        then = "" if "requeued" not in attempt else "; requeued" if attempt["requeued"] else "; not requeued"
        because = f": {attempt.get('reason') or attempt['cause']}" if attempt.get("reason") or attempt.get("cause") else ""
        lines.append(f"         attempt {attempt['restarts'] + 1}: {attempt['state']}{at}{then}{because}")
    if last.get("state") == Outcome.FAILED:
        lines += [f"failure  {last['cause']}", *last_lines(folder, job["id"], last.get("rank", 0))]
    return "\n".join(lines) + "\n"


def progress(output_dir: Path, job_id: str) -> list[str]:
    """How far the run is, from the watchdog's own record; nothing where that is another job's."""
    try:
        found = read_json(output_dir / "progress.json")
    except (OSError, ValueError):
        return []
    ago = time.time() - found["time"]
    return [f"update   {found['update']} ({found['phase']}, {ago:.0f} s ago, {found['world_size']} processes)"
            ] if found.get("job") == job_id else []


def last_lines(folder: Path, job_id: str, rank: int, count: int = 12) -> list[str]:
    """The end of one rank's error log."""
    log = folder / f"{job_id}_{rank}_log.err"
    if not log.is_file():
        return []
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 20000))
        text = file.read().decode(errors="replace").rstrip().splitlines()
    return [f"         {log.name}:", *(f"         | {line}" for line in text[-count:])]


def job_state(job: Record) -> str:
    """What Slurm says, or for a local job whether its controller runs and what it recorded last."""
    if job["cluster"] == "local":
        ended = Ledger(job["output_dir"]).newest().get("state", "ENDED")
        return RUNNING if alive(int(job["id"])) else "COMPLETED" if ended == Outcome.DONE else "ENDED"
    for command in (["squeue", "--noheader", "--states=all", f"--jobs={job['id']}", "--format=%T"],
                    ["sacct", "--noheader", "--allocations", f"--jobs={job['id']}", "--format=State"]):
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
        except (OSError, subprocess.SubprocessError):
            continue
        if answer:
            return answer[0]
    return "UNKNOWN"


if __name__ == "__main__":
    sys.exit(main())
