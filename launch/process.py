"""One `Process` object however the program was started: alone, by torchrun, by srun, by submitit or by mpirun.

    with start(options) as process:
        model = process.wrap(model.to(process.device))

Collectives on CPU tensors and Python objects go through a gloo group beside the device's own backend, so
that host-side agreement never waits for the GPU's queue.
"""
import dataclasses
import datetime
import gc
import inspect
import json
import os
import socket
import time
import uuid
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
import torch.distributed as dist

from common.errors import UserError
from common.random import key
from common.log import logger
from launch.places import Place, find_place
from launch.processes import end_with_launcher

BACKENDS = {"cuda": "nccl", "xpu": "xccl", "cpu": "gloo", "mps": "gloo"}


@dataclasses.dataclass(eq=False)
class Process:
    """This process among its peers. All methods also work when it is alone; then nothing is communicated.

    `node` counts nodes from 0, `node_name` is for people, `backend` is "" for a lone process. `waits_in` names
    the collective this process is inside of (the watchdog reads it from its thread).
    """

    place: Place
    device: torch.device
    backend: str = ""
    store: dist.Store | None = None
    side: dist.ProcessGroup | None = None
    waits_in: str = ""

    rank = property(lambda self: self.place.rank)
    world_size = property(lambda self: self.place.world_size)
    local_rank = property(lambda self: self.place.local_rank)
    local_world_size = property(lambda self: self.place.local_world_size)
    node = property(lambda self: self.place.node)
    node_name = property(lambda self: self.place.node_name)
    is_main = property(lambda self: self.place.rank == 0)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            with self._waiting("barrier"):
                dist.barrier(group=self.side)

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce `tensor` (any shape; on the CPU or on this process' device) over all processes in place.

        `op` is "sum", "min" or "max". Returns the tensor.
        """
        if self.world_size > 1:
            with self._waiting("all_reduce"):
                group = self.side if tensor.device.type == "cpu" else None
                dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()), group=group)
        return tensor

    def broadcast_object(self, obj: Any = None, source: int = 0) -> Any:
        """The picklable object of process `source`, on every process."""
        if self.world_size == 1:
            return obj
        box = [obj]
        with self._waiting("broadcast"):
            dist.broadcast_object_list(box, src=source, group=self.side)
        return box[0]

    def all_gather_object(self, obj: Any) -> list[Any]:
        """The picklable objects of all processes in order of rank, on every process."""
        box = [obj] * self.world_size
        if self.world_size > 1:
            with self._waiting("all_gather"):
                dist.all_gather_object(box, obj, group=self.side)
        return box

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on every process; its UserError is raised on every process too.

        So the run folder and the checkpoint to resume need to be seen by rank 0's node only.
        """
        outcome = None, None
        if self.is_main:
            try:
                outcome = work(), None
            except UserError as error:
                outcome = None, str(error)
        result, sentence = self.broadcast_object(outcome)
        if sentence is not None:
            raise UserError(sentence)
        return result

    def local_first(self, work: Callable[[], Any]) -> Any:
        """`work()`, done by one process of each node before the others, who then find its caches."""
        if self.local_rank != 0:
            self.barrier()
        result = work()
        if self.local_rank == 0:
            self.barrier()
        return result

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """DistributedDataParallel around `model`, or the model itself when this process is alone.

        Without `device_ids`, for all inputs are on the device already and would be copied once more; without
        buffer broadcasts, because HorNet has no buffers that training changes. Accumulate gradients by setting
        `require_backward_grad_sync` before the forward of each micro-batch.
        """
        if self.world_size == 1:
            return model
        ddp = torch.nn.parallel.DistributedDataParallel
        # Renamed in torch 2.15.
        renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters
        buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        # After its first backward pass DDP sorts its buckets anew. The order of additions in a ring of three or more
        # depends on the place in the bucket, so a resumed run, whose first update has the old buckets, would differ in
        # its last bits. Looking for unused parameters (there are none) keeps the buckets as they are.
        exact = self.backend == "gloo" or torch.are_deterministic_algorithms_enabled()
        return ddp(model, gradient_as_bucket_view=True, find_unused_parameters=exact, **buffers)

    def close(self, failed: bool = False) -> None:
        """Leave the process group. After a failure nobody waits for peers that may be gone."""
        if self.side is None:
            return
        if not failed:
            self.barrier()
        # A group destroyed while autograd still holds DDP's buckets sometimes aborts the interpreter at its end.
        gc.collect()
        self.side = None
        if failed and self.backend == "nccl":
            return  # destroy_process_group would wait for the collectives in flight; the exit of the process ends them
        dist.destroy_process_group()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(failed=kind is not None)

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        self.waits_in = what
        try:
            yield
        finally:
            self.waits_in = ""


def start(options: Any) -> Process:
    """Find this process' place, choose its device and join the process group.

    Reads `options.device` (auto, cuda, xpu, mps, cpu, or one device such as cuda:1) and, where present,
    `rendezvous_timeout` (180 s) and `hang_timeout` (180 s; 0 switches the watchdog off).
    Raises UserError for a device that is not there, a device used twice, and processes that did not arrive.
    """
    place = find_place(os.environ)
    device = choose_device(getattr(options, "device", "auto") or "auto", place.local_rank, place.local_world_size)
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).set_device(device)
    process = Process(place, device)
    if place.launcher != "none":
        end_with_launcher()
    if place.world_size == 1:
        return process
    if place.local_world_size == place.world_size and os.path.isdir("/sys/class/net/lo"):
        # On one node nothing needs to listen on an outside interface.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    limit = datetime.timedelta(seconds=float(getattr(options, "rendezvous_timeout", None) or 180))
    process.store = meet(place, limit)
    process.backend = BACKENDS[device.type]
    timeout = datetime.timedelta(seconds=group_timeout(float(getattr(options, "hang_timeout", 180))))
    # No device_id: NCCL would connect at once and fail on a shared device before it can be named below.
    dist.init_process_group(process.backend, store=process.store, rank=place.rank, world_size=place.world_size,
                            timeout=timeout)
    process.side = dist.group.WORLD if process.backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    try:
        refuse_shared_devices(process.all_gather_object((place.node, device_identity(device))))
    except UserError:
        process.close()
        raise
    return process


def group_timeout(hang_timeout: float) -> float:
    """Seconds the process group itself waits: above the watchdog's patience, so that its sentence comes first."""
    return max(300.0, 11 * hang_timeout + 60) if hang_timeout else 1800.0


def choose_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this process. Works when a task sees all GPUs of its node and when it sees only its own.

    CUDA_VISIBLE_DEVICES is not asked: on machines without a GPU a scheduler may set it all the same.
    """
    available = {"cuda": torch.cuda.is_available(), "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
                 "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, index = wanted.partition(":")
    if kind == "auto":
        kind = next(name for name, there in available.items() if there)
    if kind not in available or (index and not index.isdigit()):
        raise UserError(f"--device {wanted}: not a device; use auto, cuda, xpu, mps, cpu, or one of them such as "
                        f"cuda:1.")
    if not available[kind]:
        usable = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"--device {wanted}: PyTorch finds no {kind} device on this machine; use --device auto "
                        f"(here: {usable}).")
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    count = torch.get_device_module(kind).device_count()
    if not index and 1 < count < local_world_size:
        raise UserError(f"{local_world_size} processes on this node but {count} {kind} devices: start {count} "
                        f"processes per node.")
    number = int(index) if index else (local_rank if count > 1 else 0)
    if number >= count:
        raise UserError(f"--device {wanted}: this process sees {count} {kind} device(s), numbered 0 to {count - 1}.")
    return torch.device(kind, number)


def device_identity(device: torch.device) -> str:
    """What two processes on one node must not share; empty for the CPU, which they may."""
    if device.type == "cpu":
        return ""
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(visible) > device.index and visible[device.index].startswith("MIG"):
            return visible[device.index]  # slices of one GPU report the same uuid
        return str(torch.cuda.get_device_properties(device).uuid)
    return str(device)


def refuse_shared_devices(found: list[tuple[int, str]]) -> None:
    """`found[rank]` is (node, device identity); UserError when two ranks of one node have the same device."""
    owners: dict[tuple[int, str], int] = {}
    for rank, (node, identity) in enumerate(found):
        if identity and (node, identity) in owners:
            raise UserError(f"ranks {owners[node, identity]} and {rank} on node {node} share one device ({identity}): "
                            f"start one process per device, and leave the number out of --device.")
        owners[node, identity] = rank


# ---------------------------------------------------------------------------------------------------- rendezvous

def meet(place: Place, limit: datetime.timedelta) -> dist.Store:
    """A store shared by all processes, once all are there; UserError naming the missing ranks after `limit`."""
    try:
        store = _connect(place, limit)
    except (dist.DistError, RuntimeError, OSError) as error:
        sentence = (f"rank {place.rank} ({place.node_name}) found no rank 0 at {place.master_addr} within "
                    f"{limit.total_seconds():.0f} s: check that rank 0 has started there and that this node reaches it "
                    f"(--rendezvous_timeout).")
        logger.error("%s (%s)", sentence, str(error).splitlines()[0])  # rank 0, which speaks for all, isn't there
        raise UserError(sentence) from None
    return dist.PrefixStore(name_this_start(store, place, limit), store)


def name_this_start(store: dist.Store, place: Place, limit: datetime.timedelta) -> str:
    """What rank 0 calls this start, once all ranks have answered to that very name.

    A store may outlive its processes (torchrun keeps one over its restarts), and what an earlier start left in it must
    not be taken for this one's: so rank 0 draws a name, each rank answers to it with a word of its own, and a rank
    believes a name only when it finds its own word among the answers that rank 0 has seen.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + limit.total_seconds()
    try:
        if place.rank == 0:
            store.set("start", word)
            answers = [f"{word}/{rank}" for rank in range(1, place.world_size)]
            while not store.check(answers):
                if time.monotonic() > deadline:
                    raise UserError(_missing(store, word, place, limit))
                time.sleep(0.02)
            store.set(f"{word}/complete", json.dumps([answer.decode() for answer in store.multi_get(answers)]))
            return word
        start = ""
        while time.monotonic() < deadline:
            if store.check(["start"]):
                start = store.get("start").decode()
                store.set(f"{start}/{place.rank}", word)
                if store.check([f"{start}/complete"]) and word in json.loads(store.get(f"{start}/complete")):
                    return start
            time.sleep(0.05)
        if not start:
            raise UserError(f"rank {place.rank} ({place.node_name}): rank 0 did not arrive within "
                            f"{limit.total_seconds():.0f} s (--rendezvous_timeout).")
        raise UserError(_missing(store, start, place, limit))
    except (dist.DistError, RuntimeError):
        raise UserError(f"rank {place.rank}: rank 0 has given up waiting; see its message.") from None


def _missing(store: dist.Store, start: str, place: Place, limit: datetime.timedelta) -> str:
    missing = [rank for rank in range(1, place.world_size) if not store.check([f"{start}/{rank}"])]
    return (f"only {place.world_size - len(missing)} of {place.world_size} processes arrived within "
            f"{limit.total_seconds():.0f} s; missing rank(s): {', '.join(map(str, missing))} (--rendezvous_timeout).")


def _connect(place: Place, limit: datetime.timedelta) -> dist.Store:
    if place.launcher in ("torchrun", "mpirun"):
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=limit))
        return store
    ports = [20000 + key(0, place.token, i) % 12000 for i in range(4)]
    if place.rank == 0:
        return _serve(place, ports, limit)
    return _find(place, ports, limit)


def _serve(place: Place, ports: list[int], limit: datetime.timedelta) -> dist.Store:
    address = "127.0.0.1" if place.local_world_size == place.world_size else ""
    for port in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError:
            listener.close()
            continue
        listener.listen(1024)
        store = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=limit, wait_for_workers=False,
                              master_listen_fd=listener.detach())
        store.set("token", place.token)
        return store
    raise UserError(f"ports {ports} on {place.node_name} are all taken; start again.")


def _find(place: Place, ports: list[int], limit: datetime.timedelta) -> dist.Store:
    """Try the ports rank 0 may have taken until one answers with this very start's token."""
    deadline = datetime.datetime.now() + limit
    while True:
        for port in ports:
            try:
                socket.create_connection((place.master_addr, port), timeout=5).close()
                store = dist.TCPStore(place.master_addr, port, is_master=False, wait_for_workers=False,
                                      timeout=datetime.timedelta(seconds=5))
                if store.get("token").decode() == place.token:
                    store.set_timeout(limit)
                    return store
            except (OSError, dist.DistError, RuntimeError):
                pass
        if datetime.datetime.now() > deadline:
            raise OSError("nobody answers")
        time.sleep(0.2)
