"""What is deployed, on what, and what is expected of it: frozen data, resolved once, printed, saved with results."""

import re
from typing import Any, Literal, get_args

import msgspec

from disagg.errors import BudgetError, InputError

DeviceKind = Literal["cpu", "cuda"]
Role = Literal["both", "prefill", "decode"]
Dtype = Literal["float32", "float16", "bfloat16", "fp8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
_ON_CORES: tuple[Dtype, ...] = ("float32", "float16")


class Budget(msgspec.Struct, frozen=True):
    """The devices every arm shares. `cpu:2` is two cores, any; `cuda:0,2` is two GPUs, these."""

    kind: DeviceKind
    devices: tuple[int, ...]  # numbers of cores or GPUs as this process may use them

    @classmethod
    def parse(cls, text: str, cores: tuple[int, ...]) -> "Budget":
        """`text` as on the command line; `cores` are the CPU cores this process may run on. Raises BudgetError."""
        if match := re.fullmatch(r"cpu:(\d+)", text):
            wanted = int(match[1])
            if not 1 <= wanted <= len(cores):
                raise BudgetError(
                    f"Budget {text!r} asks for {wanted} core(s) and this machine lends {len(cores)}: "
                    f"use cpu:1 to cpu:{len(cores)}."
                )
            return cls("cpu", tuple(cores[:wanted]))
        if match := re.fullmatch(r"cuda:(\d+(?:,\d+)*)", text):
            gpus = tuple(int(number) for number in match[1].split(","))
            if len(set(gpus)) < len(gpus):
                raise BudgetError(f"Budget {text!r} names a GPU twice: name each once.")
            return cls("cuda", gpus)
        raise BudgetError(
            f"Budget {text!r} is not understood: write cpu:N, a number of cores, or cuda:0,1, the GPUs, that all arms "
            "share."
        )

    def __str__(self) -> str:
        return f"cpu:{len(self.devices)}" if self.kind == "cpu" else f"cuda:{','.join(map(str, self.devices))}"


class WorkerSpec(msgspec.Struct, frozen=True):
    """One worker process: its name, its role at start and its share of the budget."""

    name: str
    role: Role
    devices: tuple[int, ...]  # the cores it is pinned to, one thread each, or its GPU
    shares: int = 1  # how many workers run on these same devices, itself included
    kind: DeviceKind = "cpu"

    @property
    def num_threads(self) -> int:
        """CPU threads it computes with."""
        return len(self.devices) if self.kind == "cpu" else 1

    @property
    def torch_device(self) -> str:
        """Where its tensors live, as torch names it."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.devices[0]}"

    @property
    def place(self) -> str:
        """Its devices in words: "core 0+1", "GPU 1"."""
        return f"{'core' if self.kind == 'cpu' else 'GPU'} {'+'.join(map(str, self.devices))}"


class Deployment(msgspec.Struct, frozen=True):
    """Workers placed on a budget. `2C`: two colocated; `3P1D`: three prefill, one decode."""

    name: str
    budget: Budget
    workers: tuple[WorkerSpec, ...]

    @classmethod
    def parse(cls, text: str, budget: Budget) -> "Deployment":
        """`text` in the field's notation. Raises BudgetError when it is not understood or cannot be placed."""
        match = re.fullmatch(r"(?:(\d+)C|(\d+)P(\d+)D)", text)
        if not match or "0" in match.groups():
            raise BudgetError(
                f"Deployment {text!r} is not understood: write 2C (two colocated workers) or 1P1D "
                "(one prefill, one decode), with counts from 1."
            )
        counts: tuple[tuple[Role, str], ...] = (("both", match[1]), ("prefill", match[2]), ("decode", match[3]))
        roles = [role for role, count in counts for _ in range(int(count or 0))]
        shares = _place(len(roles), budget)
        letters = {"both": "C", "prefill": "P", "decode": "D"}
        seen: dict[str, int] = {}
        workers = []
        for role, (devices, sharing) in zip(roles, shares, strict=True):
            seen[role] = seen.get(role, 0) + 1
            workers.append(WorkerSpec(f"{letters[role]}{seen[role] - 1}", role, devices, sharing, budget.kind))
        return cls(text, budget, tuple(workers))

    @property
    def disaggregated(self) -> bool:
        """Whether any request is handed over."""
        return any(worker.role == "prefill" for worker in self.workers)

    @property
    def oversubscribed(self) -> bool:
        """Whether workers share a core or a GPU, which the output must say."""
        return any(worker.shares > 1 for worker in self.workers)


def _place(num_workers: int, budget: Budget) -> list[tuple[tuple[int, ...], int]]:
    """Each worker's devices and how many share them. Devices are dealt evenly; more workers than devices share."""
    devices = budget.devices
    if num_workers >= len(devices):
        homes = [index % len(devices) for index in range(num_workers)]
        return [((devices[home],), homes.count(home)) for home in homes]
    if budget.kind == "cuda":
        raise BudgetError(
            f"{num_workers} worker(s) cannot use {len(devices)} GPUs, as each runs on one: "
            "deploy at least as many workers as the budget has GPUs."
        )
    per_worker, extra = divmod(len(devices), num_workers)
    if extra:
        raise BudgetError(
            f"{len(devices)} cores cannot be split evenly over {num_workers} workers: "
            "use a multiple, so that no worker is favoured."
        )
    return [(devices[i * per_worker : (i + 1) * per_worker], 1) for i in range(num_workers)]


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How every worker of every arm runs. One instance for all arms: that is what makes them comparable.

    The defaults below are for cores; `on` knows those for GPUs too.
    """

    model: str = "seed"
    random_weights: bool = False
    dtype: Dtype = "float32"
    max_len: int | None = None  # context limit in tokens; None: the model's own
    page_size: int = 16
    kv_bytes: int = 1 << 30  # KV memory of the whole deployment, split evenly over its workers; 0: all GPUs have left
    gpu_memory: float = 0.9  # share of each GPU's memory the deployment may take, weights included, if kv_bytes is 0
    max_batch_tokens: int = 512  # positions a step may compute: the chunk size
    max_mixed_tokens: int | None = None  # the same where some of them are decodes; None: as above
    enough_tokens: int | None = None  # a step with so many takes no other prompt; None: up to the limits
    max_running: int = 64
    chunked_prefill: bool = True
    prefix_caching: bool = False
    checksum: bool = False  # verify every page in flight
    weights_seed: int = 42  # of random weights

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise InputError(f"page_size must be a power of two, not {self.page_size}.")
        mixed = self.max_batch_tokens if self.max_mixed_tokens is None else self.max_mixed_tokens
        enough = self.max_batch_tokens if self.enough_tokens is None else self.enough_tokens
        limits = {"max_batch_tokens": self.max_batch_tokens, "max_mixed_tokens": mixed, "enough_tokens": enough}
        for name, limit in (limits | {"max_running": self.max_running}).items():
            if limit < 1:
                raise InputError(f"{name} must be at least 1, not {limit}.")
        if self.max_mixed_tokens is not None and self.max_mixed_tokens < self.max_running:
            raise InputError(
                f"max_mixed_tokens ({self.max_mixed_tokens}) must be at least max_running ({self.max_running}): "
                "so many decodes would leave prefill nothing."
            )
        if not 0 < self.gpu_memory <= 1:
            raise InputError(f"gpu_memory must be a share above 0 and up to 1, not {self.gpu_memory:g}.")

    @classmethod
    def on(cls, kind: DeviceKind, **given: Any) -> "EngineSpec":
        """The fields given, except for those that are None, over the defaults for this kind of device.

        Whoever gives `max_batch_tokens` means every step: the default for mixed ones then does not apply. That of
        `enough_tokens` does: a larger limit is for longer prompts, not for more of them. Raises InputError.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        if "max_batch_tokens" in chosen:
            chosen.setdefault("max_mixed_tokens", None)
        if kind == "cpu" and (dtype := chosen.get("dtype", "float32")) not in _ON_CORES:
            raise InputError(f"--dtype {dtype} is for GPUs: use {' or '.join(_ON_CORES)} on cores.")
        return cls(**{**(_ON_GPUS if kind == "cuda" else {}), **chosen})

    @property
    def chunk_tokens(self) -> int:
        """Positions a step may compute where some are decodes: how long a prompt's chunk may keep others waiting."""
        mixed, batch = self.max_mixed_tokens, self.max_batch_tokens
        return batch if mixed is None else min(mixed, batch)

    def with_chunk(self, tokens: int) -> "EngineSpec":
        """The same with another `chunk_tokens`: by the limit of mixed steps where there is one, else by that of all."""
        limit = "max_batch_tokens" if self.max_mixed_tokens is None else "max_mixed_tokens"
        return msgspec.structs.replace(self, **{limit: tokens})


# 1,024 positions keep a GPU as busy as 8,192 for models from some billion weights on: a prompt is computed whole where
# it can, and does not wait for others computed beside it. 512 still do nearly, and are a graph: decodes beside chunks
# have to wait half as long
_ON_GPUS = {
    "dtype": "bfloat16", "kv_bytes": 0, "max_batch_tokens": 4096, "max_mixed_tokens": 512, "enough_tokens": 1024,
    "max_running": 256,
}  # fmt: skip


class SLO(msgspec.Struct, frozen=True):
    """What a request must meet to count as good. None: not asked for. Seconds."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> "SLO":
        """`ttft=200ms,tpot=50ms`; a bare number is seconds. Raises InputError, also when no limit is named.

        A bare number from 10 on is refused: it is far likelier to be meant as milliseconds.
        """
        units = {"ms": 1e-3, "s": 1.0, "": 1.0}
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(ttft|tpot|e2e)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s|)\s*", part)
            if not match:
                raise InputError(f"SLO part {part!r} is not understood: write for example ttft=200ms,tpot=0.05.")
            name, limit_s = f"{match[1]}_s", float(match[2]) * units[match[3]]
            if not match[3] and limit_s >= 10:
                raise InputError(f"SLO part {part!r} has no unit: write {match[2]}ms or {match[2]}s.")
            if name in limits:
                raise InputError(f"SLO {text!r} names {match[1]} twice: give it one limit.")
            if limit_s == 0:
                raise InputError(f"SLO part {part!r} cannot be met: a limit must be above 0.")
            limits[name] = limit_s
        return cls(**limits)
