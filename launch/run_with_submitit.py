"""Run main.py as a Slurm job:

    python -m launch.run_with_submitit --nodes 4 --ngpus 8 --config recipes/hornet_tiny_7x7.yaml ...
    python -m launch.run_with_submitit status runs/12345

Every option that isn't the launcher's own goes to main.py. The job runs a snapshot of the code and the
configuration taken now, is requeued after a preemption or at its time limit, and resumes where it was.
"""
import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import NoReturn

import submitit
import yaml
from submitit.core.utils import FailedJobError

from common.errors import UserError
from common.files import write_json
from common.ledger import RUNNING, Ledger, Record
from common.log import logger, setup_logging
from common.outcome import ExitCode, Outcome
from launch.slurm import Job, last_lines, program
from launch.stop import margin, squeue

ROOT = Path(__file__).resolve().parent.parent
KILLED = "killed without a word, or its node was lost"
UNFINISHED = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED")
START_UP = 120  # seconds that a job may need before its first update
SETUP = [
    # From 22.05 on srun doesn't take this over from the job.
    "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
    # A signal to the batch script (scancel --batch or --full) would end it, and with it the job.
    'srun() { command srun "$@" & local step=$! code',
    '  for name in USR1 USR2 TERM; do trap "kill -$name $step" $name; done',
    "  while wait $step; code=$?; kill -0 $step 2>/dev/null; do :; done; return $code; }"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help.", code="unknown_flag")


def parser() -> argparse.ArgumentParser:
    """The launcher's own options; the published launcher's names, without any site's defaults."""
    p = _Parser(prog="python -m launch.run_with_submitit", allow_abbrev=False, description=__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nodes", type=int, default=1, help="number of nodes")
    p.add_argument("--ngpus", type=int, default=8, help="processes, and GPUs unless --device cpu, per node")
    p.add_argument("--timeout", type=float, default=72, help="time limit in hours")
    p.add_argument("--job_name", default="hornet")
    p.add_argument("--job_dir", default="runs/%j", help="folder of logs and, by default, run; %%j: job id")
    p.add_argument("--partition", help="where to submit; Slurm's default if not given")
    p.add_argument("--comment", help="comment for the scheduler")
    p.add_argument("--cpus_per_task", type=int, default=10, help="CPU cores per process")
    p.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE",
                   help="any other sbatch option, such as --slurm account=vision; repeatable")
    p.add_argument("--max_requeue", type=int, default=100, help="how often the job may be requeued")
    p.add_argument("--dry_run", nargs="?", const="true", default="false", choices=("true", "false"),
                   help="print the job's script and stop")
    p.add_argument("--module", default="", choices=("", "dense.segmentation", "dense.detection"),
                   help="what to run in place of main.py")
    p.add_argument("--use_volta32", action="store_true", help="published flag: accepted with a notice")
    p.add_argument("--config", help=argparse.SUPPRESS)  # main.py's, of which the job gets a copy
    return p


def split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, checked, and the options for main.py."""
    options, rest = parser().parse_known_args(argv)
    for name in ("nodes", "ngpus", "cpus_per_task", "timeout"):
        if not 0 < getattr(options, name) < 1e5:
            raise UserError(f"--{name} {getattr(options, name)}: give more than 0.", code="invalid_value")
    seconds = options.timeout * 3600
    if seconds < START_UP + margin(seconds):
        raise UserError(f"--timeout {options.timeout:g} (hours) is less than the {START_UP} s in which a job "
                        f"starts and the {margin(seconds):.0f} s in which it is saved; give 0.05 or more.",
                        code="invalid_value")
    return options, rest + (["--config", options.config] if options.config else [])


def main(argv: Sequence[str]) -> int:
    """Submit, or show a job's status. Returns the exit code: 2 for a user's mistake."""
    setup_logging()
    try:
        if argv[:1] != ["status"]:
            return submit(*split(argv))
        if len(argv) != 2:
            raise UserError("status takes one folder, the job's.", code="missing_value")
        sys.stdout.write(status(Path(argv[1])))
        return ExitCode.DONE
    except UserError as error:
        logger.error("%s", error)
        return error.exit_code


def submit(options: argparse.Namespace, argv: list[str]) -> int:
    """Check, take the snapshot, submit, and say where to look. `argv` is main.py's."""
    if options.use_volta32:
        logger.warning("--use_volta32 has no effect: use --slurm constraint=NAME for GPUs of one kind.")
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("there is no sbatch on this machine; without Slurm start main.py with torchrun on "
                        "each node (TRAINING.md).", code="no_slurm")
    resolved = resolve(argv, options.module)
    folder = str(Path(options.job_dir).expanduser().absolute())
    output_dir = str(Path(resolved["output_dir"] or folder).expanduser().absolute())
    argv += ["--output_dir", output_dir]  # of two the last counts
    executor = build_executor(folder, options, gpus=resolved["device"] != "cpu")
    if options.dry_run == "true":
        text = executor._make_submission_file_text(executor._submitit_command_str, "dry_run")
        sys.stdout.write(f"{text}# each task then runs: {options.module or 'main.py'} {shlex.join(argv)}\n")
        return ExitCode.DONE
    earlier = Ledger(folder).read("job.json")
    if earlier and job_state(earlier, {})[0].startswith(UNFINISHED):
        raise UserError(f"--job_dir {folder} is that of job {earlier['id']}, which has not ended: cancel it, "
                        "or give each job a folder of its own with %j, as in runs/%j.", code="folder_in_use")
    try:
        code = snapshot(folder)
        if options.config and os.path.isfile(options.config):
            argv += ["--config", str(shutil.copy2(options.config, code / "submitted_config.yaml"))]
        job = Job(argv, os.getcwd(), str(code), folder, output_dir, options.max_requeue, options.module)
        with chdir(code):  # the job's tasks unpickle and import from here
            submitted = executor.submit(job)
        write_json(submitted.paths.folder / "job.json",
                   {"id": submitted.job_id, "code": job.code,
                    "output_dir": output_dir.replace("%j", submitted.job_id)})
    except OSError as error:
        raise UserError(f"--job_dir {options.job_dir} cannot be used ({error.filename or folder}: "
                        f"{error.strerror}); choose a folder that all nodes can write to.",
                        code="unusable_folder") from None
    except FailedJobError as error:
        reason = " ".join(str(error).split())[-400:]
        raise UserError(f"sbatch refuses the job: {reason}", code="sbatch") from None
    logger.info("Submitted job %s. Its logs: %s", submitted.job_id, submitted.paths.folder)
    logger.info("python -m launch.run_with_submitit status %s", shlex.quote(str(submitted.paths.folder)))
    return ExitCode.DONE


def resolve(argv: list[str], module: str = "") -> Record:
    """main.py's options, or a module's, which checks them now: a mistake should not wait in a queue for
    hours."""
    command = [*program(str(ROOT), module), "--print_config", "true", *argv]
    answer = subprocess.run(command, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    if answer.returncode != 0:
        sentence = (answer.stderr.splitlines() or [f"main.py ended with {answer.returncode}"])[-1]
        raise UserError(sentence.removeprefix("error: "), code="main_options")
    return yaml.safe_load(answer.stdout)


def snapshot(folder: str) -> Path:
    """Copy the program (modules, packages, recipes) to a new folder beside the job's: where its %j begins."""
    base = Path(f"{folder}/%".partition("%")[0] + "name").parent
    code = base / "code" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    code.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy2(path, code)
    for name in {path.parent.name for way in ("*/*.py", "recipes/*") for path in ROOT.glob(way)} - {"tests"}:
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    return code


def build_executor(folder: str, options: argparse.Namespace, *, gpus: bool) -> submitit.SlurmExecutor:
    """submitit's executor with the launcher's options in Slurm's terms."""
    extra = dict(requeue=True)
    for pair in options.slurm:
        key, equals, value = pair.partition("=")
        if not key:
            raise UserError(f"--slurm {pair}: KEY=VALUE is accepted, such as --slurm account=vision.",
                            code="invalid_value")
        extra[key.lstrip("-").replace("-", "_")] = value if equals else True
    gpus = gpus and not any(key.startswith(("gres", "gpus")) for key in extra)
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(
        job_name=options.job_name, time=max(1, round(options.timeout * 60)), nodes=options.nodes,
        ntasks_per_node=options.ngpus, cpus_per_task=options.cpus_per_task, setup=SETUP,
        gpus_per_node=options.ngpus if gpus else None, partition=options.partition, comment=options.comment,
        additional_parameters=extra, signal_delay_s=round(margin(options.timeout * 3600)))
    return executor


def status(folder: Path) -> str:
    """Where the job with its logs in `folder` stands: state, update, attempts, first cause, last words."""
    own = Ledger(folder.absolute())
    if not (job := own.read("job.json")):
        raise UserError(f"{folder} holds no job.json: give the folder named when the job was submitted.",
                        code="no_job")
    run = Ledger(job["output_dir"])
    attempts = [a for ledger in {run.path: run, own.path: own}.values() for a in ledger.attempts()
                if a.get("job") == job["id"]]
    last = max(attempts, key=lambda a: a["restarts"], default={})
    state, at_work = job_state(job, last)
    lines = [f"job      {job['id']}", f"state    {state}"]
    if at_work and (now := run.reached(job["id"])):
        lines.append(f"update   {now['update']} ({now['phase']}, {time.time() - now['time']:.0f} s ago)")
    for each in attempts[-6:]:
        ended = each["state"]
        if ended == RUNNING:
            ended = "under way" if at_work and each is last else KILLED
        ended += f" at update {each['update']}" if "update" in each else ""
        ended += {True: ", requeued", False: ", not requeued", None: ""}[each.get("requeued")]
        why = each.get("reason") or each.get("cause")
        lines.append(f"attempt  {each['restarts'] + 1}: {ended}" + (f" ({why})" if why else ""))
    failed = last.get("state") == Outcome.FAILED
    log = own.path / f"{job['id']}_{last.get('rank', 0)}_log.err"
    words = last_lines(log, 12 if failed else 1)
    lines += [f"failure  {last.get('cause')}"] * failed + [f"log      {log}"] * bool(words)
    return "\n".join(lines + [f"         | {line}" for line in words]) + "\n"


def job_state(job: Record, last: Record) -> tuple[str, bool]:
    """What Slurm says, or how the last attempt ended where it doesn't know; and whether tasks are at work."""
    begun = last.get("state") == RUNNING
    ended = KILLED if begun else last.get("state", "UNKNOWN")
    state, reason, first, nodes, elapsed = (squeue(job["id"], "%T|%r|%S|%N|%M") or "||||").split("|")
    if state == "PENDING":
        return f"{state} ({reason}" + (f", not before {first})" if first != "N/A" else ")"), False
    if state in UNFINISHED:
        return f"{state} on {nodes} for {elapsed}" + ("" if begun else ", starting"), begun
    known = state or ended
    return known if ended in (Outcome.DONE, known) else f"{known}; the run: {ended}", False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
