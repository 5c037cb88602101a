"""One `Process` object however the program was started: alone, by torchrun, mpirun, srun or submitit.

    with start(options.device, options.rendezvous_timeout) as process:
        model = process.wrap(model.to(process.device))

Collectives on CPU tensors and Python objects go through a gloo group beside the device's own backend, so
that agreement between hosts never waits for the GPU's queue.
"""
import dataclasses
import gc
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from common.errors import Failure, UserError
from common.log import logger
from common.random import key

T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class Place:
    """Where one process stands among its peers, as its launcher says.

    Rank 0 is met at `port` of `master_addr`; `served` says that the launcher has a store listening there
    already.
    """

    launcher: str = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_name: str = dataclasses.field(
        default_factory=lambda: os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    master_addr: str = "127.0.0.1"
    port: int = 0
    served: bool = False
    is_main = property(lambda self: self.rank == 0)
    one_node = property(lambda self: self.local_world_size == self.world_size)


@dataclasses.dataclass(eq=False, kw_only=True)
class Process(Place):
    """This process among its peers. All methods also work when it is alone; then nothing is communicated.

    `backend` is "" for a lone process. `waits_in` names the collective this process is inside of (the
    watchdog reads it from its thread).
    """

    device: torch.device
    backend: str = ""
    store: dist.Store | None = None
    side: dist.ProcessGroup | None = None
    waits_in: str = ""

    def barrier(self) -> None:
        """Wait until every process is here."""
        self._together(dist.barrier, group=self.side)

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce `tensor` (any shape; on the CPU or on this process' device) over all processes in place.

        `op` is "sum", "min" or "max". Returns the tensor.
        """
        group = self.side if tensor.device.type == "cpu" else None
        self._together(dist.all_reduce, tensor, op=getattr(dist.ReduceOp, op.upper()), group=group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process: one small reduction between the hosts."""
        return bool(self.all_reduce_(torch.tensor([int(flag)], dtype=torch.int32), "max"))

    def broadcast_object(self, obj: T) -> T:
        """The picklable object of rank 0, on every process."""
        box = [obj]
        self._together(dist.broadcast_object_list, box, src=0, group=self.side)
        return box[0]

    def all_gather_object(self, obj: T) -> list[T]:
        """The picklable objects of all processes in order of rank, on every process."""
        box = [obj] * self.world_size
        self._together(dist.all_gather_object, box, obj, group=self.side)
        return box

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every process; its UserError is raised on every process too.

        So only rank 0's node needs to see the run folder and the checkpoint to resume.
        """
        result = error = None
        if self.is_main:
            try:
                result = work()
            except UserError as refusal:
                error = refusal
        result, error = self.broadcast_object((result, error))
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]

    def local_first(self, work: Callable[[], T]) -> T:
        """`work()`, done by one process of each node before the others, who then find its caches."""
        results = [work()] if self.local_rank == 0 else []
        self.barrier()
        return results[0] if results else work()

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """DistributedDataParallel around `model`, or the model itself when this process is alone.

        Without `device_ids`, for all inputs are on the device already and would be copied once more.
        Accumulate gradients by setting `require_backward_grad_sync` before each micro-batch's forward.
        """
        if self.world_size == 1:
            return model
        # After its first backward pass DDP sorts its buckets again. The order of additions in a ring of three
        # or more depends on the place in the bucket, so a resumed run, whose first update has the old
        # buckets, would differ in its last bits. Looking for unused parameters (there are none) keeps them.
        exact = self.backend == "gloo" or torch.are_deterministic_algorithms_enabled()
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True,
                                                         find_unused_parameters=exact)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the process group. After a failure nobody waits for peers that may be gone."""
        if self.side is None:
            return
        if kind is None:
            self.barrier()
        # A group destroyed while autograd holds DDP's buckets sometimes aborts the interpreter at its end.
        gc.collect()
        self.side = None
        if kind is None or self.backend != "nccl":  # which would wait for the collectives in flight
            dist.destroy_process_group()

    def _together(self, collective: Callable, *given: object, **named: object) -> None:
        if self.world_size > 1:
            self.waits_in = collective.__name__
            try:
                collective(*given, **named)
            finally:
                self.waits_in = ""


def start(device: str = "auto", rendezvous_timeout: float = 180.0) -> Process:
    """Find this process' place, choose its device and join the process group.

    Args:
        device: auto, cuda, xpu, mps, cpu, or one device such as cuda:1.
        rendezvous_timeout: seconds to wait for the other processes.

    Raises UserError for a device that is missing or used twice and for a launcher's environment that makes no
    sense, Failure for processes that did not arrive.
    """
    place = find_place()
    chosen = choose_device(device, place.local_rank, place.local_world_size)
    if chosen.type in ("cuda", "xpu"):
        torch.get_device_module(chosen).set_device(chosen)
    process = Process(**vars(place), device=chosen)
    if place.world_size == 1:
        return process
    if place.one_node and os.path.isdir("/sys/class/net/lo"):
        # On one node nothing needs to listen on an outside interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    process.store = meet(place, rendezvous_timeout)
    process.backend = dist.get_default_backend_for_device(chosen)
    limit = timedelta(seconds=rendezvous_timeout)
    # No device_id: NCCL would connect at once and fail on a shared device before it can be named below.
    dist.init_process_group(process.backend, store=process.store, timeout=limit,
                            rank=place.rank, world_size=place.world_size)
    group = dist.group.WORLD if process.backend == "gloo" else dist.new_group(backend="gloo", timeout=limit)
    process.side = cast(dist.ProcessGroup, group)
    refuse_shared_devices(process.all_gather_object((place.node_name, device_identity(chosen))))
    # From here on a rank that keeps the others waiting is the watchdog's business, which knows a job that was
    # suspended from one that hangs. Public since torch 2.15.
    change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in {dist.group.WORLD, process.side}:
        change(timedelta(days=365), group)
    return process


# ------------------------------------------------------------------------------------------------ places

# The variables of rank, number of processes, rank on this node, number on this node.
VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))}


def find_place(env: Mapping[str, str] = os.environ) -> Place:
    """The place of this process: torchrun and mpirun first (they may themselves run under srun), then srun.

    A plain `python` inside a Slurm allocation or an interactive shell is a single process, although
    SLURM_NTASKS may say otherwise: only srun's own step variables count. Raises UserError (code
    "environment") for variables that are missing, no numbers, or out of range.
    """
    for launcher, (rank, size, local_rank, local_size) in VARIABLES.items():
        if rank in env and size in env:
            env = {local_rank: "0", local_size: env[size], **env}
            world = number(env, size, 1)
            local = number(env, local_size, 1, world)
            place = Place(launcher, number(env, rank, 0, world - 1), world,
                          number(env, local_rank, 0, local - 1), local)
            return place if world == 1 else dataclasses.replace(
                place, master_addr=checked(env, "MASTER_ADDR", "the name of rank 0's node", bool),
                port=number(env, "MASTER_PORT", 1, 65535),
                served=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env or "SLURM_PTY_PORT" in env:
        return Place()
    # "2(x3),1" are nodes with 2, 2, 2 and 1 tasks.
    part = r"([1-9]\d{0,4})(?:\(x([1-9]\d{0,4})\))?"
    tasks = checked(env, "SLURM_STEP_TASKS_PER_NODE", "numbers such as 2(x3),1",
                    lambda text: re.fullmatch(f"{part}(,{part})*", text))
    counts = [int(count) for count, times in re.findall(part, tasks) for _ in range(int(times or 1))]
    # Rank 0 runs on the first node: of "gpu[07-09,12],login1" on gpu07.
    names = checked(env, "SLURM_STEP_NODELIST", "names such as gpu[07-09]", bool)
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", names).partition(",")[0]
    world = number(env, "SLURM_STEP_NUM_TASKS", 1)
    local = counts[number(env, "SLURM_NODEID", 0, len(counts) - 1)]
    # Two steps of one job must not meet, nor an attempt what is left of the one before; and a job whose port
    # is taken finds another when it is requeued.
    start = " ".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return Place("srun", number(env, "SLURM_PROCID", 0, world - 1), world,
                 number(env, "SLURM_LOCALID", 0, local - 1), local,
                 master_addr=first if len(counts) > 1 else "127.0.0.1", port=20000 + key(0, start) % 12000)


def number(env: Mapping[str, str], name: str, least: int, most: int = 99999) -> int:
    """The whole number from `least` to `most` in an environment variable."""
    return int(checked(env, name, f"a whole number from {least} to {most}",
                       lambda text: re.fullmatch(r"\d{1,9}", text) and least <= int(text) <= most))


def checked(env: Mapping[str, str], name: str, expected: str, accepts: Callable[[str], object]) -> str:
    """The environment variable `name`; UserError saying what is `expected` where its text isn't accepted."""
    if accepts(env.get(name, "")):
        return env[name]
    found = f"is {env[name][:80]!r}" if name in env else "is missing"
    raise UserError(f"the environment variable {name} {found}; expected is {expected}: start with torchrun, "
                    "srun, or python -m launch.run_with_submitit.", code="environment")


# ----------------------------------------------------------------------------------------------- devices

def choose_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this process. Works when a task sees all GPUs of its node and when it sees only its own.

    CUDA_VISIBLE_DEVICES is not asked: on machines without a GPU a scheduler may set it all the same. Raises
    UserError (code "device").
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    usable = [accelerator.type, "cpu"] if accelerator is not None else ["cpu"]
    kind, _, index = wanted.partition(":")
    kind = usable[0] if kind == "auto" else kind
    if kind not in usable or (index and not index.isdigit()):
        raise UserError(f"--device {wanted}: PyTorch finds {' and '.join(usable)} on this machine; use "
                        "auto, one of these, or a numbered one such as cuda:1.", code="device")
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    count = torch.get_device_module(kind).device_count()
    needed = int(index) + 1 if index else local_world_size if count > 1 else 1
    if needed > count:
        raise UserError(f"--device {wanted}: this node needs {needed} {kind} devices for {local_world_size} "
                        f"process(es), and PyTorch finds {count}: start one per device.", code="device")
    return torch.device(kind, int(index) if index else local_rank % count)


def device_identity(device: torch.device) -> str:
    """What two processes on one node must not share; empty for the CPU, which they may."""
    if device.type != "cuda":
        return "" if device.type == "cpu" else str(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[device.index:]
    if visible and visible[0].startswith("MIG"):
        return visible[0]  # slices of one GPU report the same uuid
    return str(torch.cuda.get_device_properties(device).uuid)


def refuse_shared_devices(found: list[tuple[str, str]]) -> None:
    """`found[rank]` is (node, device identity); UserError when two ranks of one node have the same device."""
    for rank, (node, identity) in enumerate(found):
        first = found.index((node, identity))
        if identity and first != rank:
            raise UserError(f"ranks {first} and {rank} on node {node} share one device ({identity}): start "
                            "one process per device, without a number in --device.", code="device")


# -------------------------------------------------------------------------------------------- rendezvous

def meet(place: Place, limit: float) -> dist.Store:
    """A store shared by all processes, once all are there.

    Raises Failure: code "rendezvous" after `limit` seconds, on rank 0 naming the missing ranks; code "port"
    on rank 0 where it cannot listen, mostly because another program does.
    """
    try:
        store = _serve(place) if place.rank == 0 and not place.served else _connect(place, limit)
        return dist.PrefixStore(name_this_start(store, place, limit), store)
    except (TimeoutError, RuntimeError):
        failure = Failure(f"rank {place.rank} ({place.node_name}) found no rank 0 at {place.master_addr}, "
                          f"port {place.port}, that has met all ranks within {limit:.0f} s: check that all "
                          "run and are within reach (--rendezvous_timeout).", code="rendezvous")
        if place.rank:  # which else leaves it to rank 0 to speak, and that may be the one that is missing
            logger.error("%s", failure)
        raise failure from None


def _serve(place: Place) -> dist.Store:
    """Rank 0's store; on one node it listens at that node's address alone."""
    try:
        family, *_, address = socket.getaddrinfo(place.master_addr, place.port, type=socket.SOCK_STREAM)[0]
        host = str(address[0]) if place.one_node else ""
        listener = socket.create_server((host, place.port), family=family, backlog=1024)
    except OSError as error:
        raise Failure(f"rank 0 cannot listen at {place.master_addr}, port {place.port} ({error.strerror}): "
                      "start again with another MASTER_PORT (torchrun --master_port) and an address of this "
                      "node.", code="port") from None
    return dist.TCPStore(host or "127.0.0.1", place.port, is_master=True, wait_for_workers=False,
                         master_listen_fd=listener.detach())


def _connect(place: Place, limit: float) -> dist.Store:
    """The store of another, or TimeoutError: TCPStore waits for ever for a listener that says nothing."""
    store: Future[dist.Store] = Future()

    def connect() -> None:
        with suppress(RuntimeError):
            store.set_result(dist.TCPStore(place.master_addr, place.port, is_master=False,
                                           wait_for_workers=False, timeout=timedelta(seconds=limit)))

    threading.Thread(target=connect, daemon=True).start()
    return store.result(limit)


def name_this_start(store: dist.Store, place: Place, limit: float) -> str:
    """What rank 0 calls this start, once all ranks have answered to that very name.

    A store may outlive its processes (torchrun keeps one over its restarts), and what an earlier start left
    in it must not be taken for this one's: so rank 0 draws a name, each rank answers to it with a word of its
    own, and a rank believes a name only when it finds its word among the answers that rank 0 has seen.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + limit
    answers = [f"{word}/{rank}" for rank in range(1, place.world_size)]
    if place.rank == 0:
        store.set("start", word)
    while time.monotonic() < deadline:
        if place.rank == 0 and store.check(answers):
            store.set(f"{word}/complete", b" ".join(store.multi_get(answers)).decode())
            return word
        if place.rank and store.check(["start"]):
            start = store.get("start").decode()
            store.set(f"{start}/{place.rank}", word)
            if store.check([f"{start}/complete"]) and word in store.get(f"{start}/complete").decode():
                return start
        time.sleep(0.03)
    if place.rank:
        raise TimeoutError
    missing = [str(rank) for rank, name in enumerate(answers, 1) if not store.check([name])]
    raise Failure(f"rank 0 ({place.node_name}) met {len(answers) - len(missing)} of {len(answers)} others "
                  f"within {limit:.0f} s; missing rank(s): {', '.join(missing)} (--rendezvous_timeout).",
                  code="rendezvous")
