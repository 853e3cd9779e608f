"""What the examination measures of a machine and of a recipe's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loratune.model.nvidia import has_kernels

Token: TypeAlias = Literal["none", "accepted", "refused", "not tried"]


@dataclass(frozen=True)
class Failure:
    """Why a process that was to measure something has no result."""

    kind: Literal["refused", "error", "signal", "timeout"]
    """refused: an error that loratune foresees; error: any other exception."""
    text: str

    @property
    def is_crash(self) -> bool:
        """Whether the process itself crashed or hung, as loratune's own would."""
        return self.kind in ("signal", "timeout")


@dataclass(frozen=True)
class Gpu:
    """A GPU, as torch sees it."""

    name: str
    capability: tuple[int, int]
    """CUDA compute capability, such as (8, 9)."""
    memory_bytes: int
    has_bfloat16: bool
    """Whether bfloat16 products run in hardware."""


@dataclass(frozen=True)
class TorchFacts:
    """torch, and the devices that it can use."""

    version: str
    cuda: str | None
    """The version of CUDA that torch was built for."""
    architectures: tuple[str, ...]
    """What its kernels were compiled for: `torch.cuda.get_arch_list()`."""
    gpus: tuple[Gpu, ...]
    reason: str
    """Why torch can use no GPU, in its own words."""
    indirect: tuple[tuple[int, int], ...]
    """Pairs of GPUs that cannot read each other's memory."""
    cpu_has_bfloat16: bool
    threads: int
    """That torch would compute with on the CPU."""
    cores: int
    free_memory_bytes: int
    """Main memory that is free, within the container's limit."""

    def runs_on(self, gpu: Gpu) -> bool:
        """Return whether torch has kernels for a GPU."""
        return has_kernels(gpu.capability, self.architectures)


@dataclass(frozen=True)
class Trial:
    """A computation by a package, compared with the same one by torch."""

    difference: float | None
    """Norm of the difference, relative to torch's result; None if the package's result is not finite."""
    bound: float
    """Largest difference by rounding."""
    has_computed: bool = True
    """Whether there was a computation; without a GPU, packages for GPUs are only imported."""

    @property
    def is_right(self) -> bool:
        return not self.has_computed or (self.difference is not None and self.difference <= self.bound)

    def __str__(self) -> str:
        return "not finite" if self.difference is None else f"{self.difference:.0%} away"


@dataclass(frozen=True)
class Place:
    """A folder that loratune writes to."""

    path: str
    """The folder, or the nearest one above it that exists."""
    free_bytes: int
    reason: str
    """Why a file cannot be written there; empty if it can."""


@dataclass(frozen=True)
class HubFacts:
    """The hub, asked over the network unless that is switched off."""

    endpoint: str
    is_offline: bool
    """Whether HF_HUB_OFFLINE is set."""
    reason: str
    """Why it does not answer; empty if it does."""
    token: Token
    base_bytes: int | None
    """Size of the base's files that would be downloaded; None if not asked, or not told."""
    base_reason: str
    """Why the base cannot be downloaded; empty if it can, or was not asked for."""


@dataclass(frozen=True)
class Version:
    """The version of a package that loratune needs."""

    installed: str | None
    wanted: str
    """loratune's own range, such as `>=2.8`; empty if any version is."""
    tested: str | None
    """Version in the tested set."""


@dataclass(frozen=True)
class PackingFacts:
    """What a model has done with two packed documents, and with which attention."""

    attention: str
    is_packed: bool | None
    """Whether rows can be packed; None if the recipe packs none."""
    reason: str
    dtype: str
    recurrent_layers: int


@dataclass(frozen=True)
class BaseFacts:
    """The files of a recipe's base."""

    folder: str | None
    """None: the base is not on this machine."""
    problems: tuple[str, ...]
    unfinished: tuple[str, ...]
    """Files of downloads that have not ended."""
    pointers: tuple[str, ...]
    """Files that Git LFS has left pointers in the place of."""
    weight_bytes: int
    compared: int
    """Number of files whose bytes have been compared with the hub's hashes."""
    lacks_files: bool = False
    """Whether its config, its tokenizer or some of its weights are missing."""

    @property
    def is_whole(self) -> bool:
        """Whether the base is on this machine, and nothing is wrong with it."""
        return self.folder is not None and not self.problems and not self.pointers


@dataclass(frozen=True)
class Machine:
    """All facts about a machine. A failure stands for what could not be measured."""

    driver: str | None
    """Version of NVIDIA's driver."""
    has_nvidia_device: bool
    are_gpus_hidden: bool
    """Whether CUDA_VISIBLE_DEVICES excludes all GPUs."""
    torch: TorchFacts | Failure
    works_without_gpu: bool
    """Whether torch answers where the GPU is hidden from it; only tried where it does not otherwise."""
    packages: Mapping[str, str | None]
    """Optional package → its version, None if it is not installed."""
    trials: Mapping[str, Trial | Failure]
    """Package → its trial; `torch` for products of matrices on each GPU."""
    packing: PackingFacts | Failure | None
    """Of the recipe's base, or else of the practice model; None if it was not tried."""
    places: Mapping[str, Place | Failure]
    shared_memory_bytes: int | None
    """Size of /dev/shm."""
    hub: HubFacts | Failure
    exchanges: Mapping[str, Trial | Failure]
    """An all-reduce over all GPUs, by the variable that was set for it: `` for none."""
    versions: Mapping[str, Version]

    @property
    def can_compute(self) -> bool:
        """Whether torch can use what there is to compute with; if not, the other trials would only repeat why."""
        if isinstance(self.torch, Failure):
            return False
        if self.torch.gpus:
            return all(map(self.torch.runs_on, self.torch.gpus))
        return self.are_gpus_hidden or not self.has_nvidia_device


@dataclass(frozen=True)
class RecipeFacts:
    """What a recipe asks for, and the state of its files."""

    config: str
    """Name of the recipe, as given."""
    base: str
    hub: Literal["huggingface", "modelscope"]
    is_from_hub: bool
    """Whether the base is a hub id, not a folder."""
    asks_for_bfloat16: bool
    """Whether it names the type instead of leaving it to the machine."""
    files: BaseFacts | Failure
    template: Failure | None
    """Why the tokenizer or the template cannot be used."""
    rows: Mapping[str, bool | Failure]
    """Source of rows → whether it is on this machine, or why it cannot be read."""

    @property
    def needs_base(self) -> bool:
        """Whether the base, or a part of it, has to be downloaded from Hugging Face."""
        if isinstance(self.files, Failure):
            is_here = self.files.kind == "refused"  # neither a folder nor a hub id
        else:
            is_here = self.files.folder is not None and not self.files.lacks_files
        return self.is_from_hub and self.hub == "huggingface" and not is_here

    @property
    def needs_hub(self) -> bool:
        """Whether anything has to be downloaded from Hugging Face."""
        return self.needs_base or any(is_here is False and source[:3] == "hf:" for source, is_here in self.rows.items())
