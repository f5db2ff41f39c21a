"""What this machine has, which backend each device gets and why, and whether that backend is right here."""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement
from rich.table import Table
from torch import Tensor

from infini_attention.ops import choose_backend, infini_attention

DISTRIBUTION = "infini-attention"
TOLERANCE = 1e-4  # of the self-check; fp32 rounding leaves about 1e-6


@dataclass(frozen=True)
class Extra:
    """An optional set of packages: which of them are missing, and what installs them."""

    name: str
    missing: list[str]
    command: str


@dataclass(frozen=True)
class Device:
    """A device, the backend that `backend="auto"` takes on it, and how well it agrees with the reference.

    Attributes:
        name: as torch names it.
        description: processor or card, with threads or memory.
        backend: what "auto" takes.
        reason: why, in words.
        error: largest difference from the reference, relative to its largest output; None if the check broke.
        failure: what torch said when the check broke, else empty.
    """

    name: str
    description: str
    backend: str
    reason: str
    error: float | None
    failure: str = ""

    @property
    def sound(self) -> bool:
        """Whether the backend gives the reference's outputs."""
        return self.error is not None and self.error <= TOLERANCE


@dataclass(frozen=True)
class Diagnosis:
    """All that `infini doctor` shows; a version is None where the package is not installed."""

    versions: dict[str, str | None]
    extras: list[Extra]
    devices: list[Device]

    @property
    def sound(self) -> bool:
        """Whether every device passed its self-check."""
        return all(device.sound for device in self.devices)

    def to_json(self) -> str:
        """The diagnosis in one line of JSON."""
        return json.dumps({"sound": self.sound, **asdict(self)})

    def tables(self) -> list[Table]:
        """Versions, extras and devices, for people."""
        return [self._versions(), self._extras(), self._devices()]

    def _versions(self) -> Table:
        table = _table("versions")
        for name, version in self.versions.items():
            table.add_row(name, version or "not installed")
        return table

    def _extras(self) -> Table:
        table = _table("extras")
        for extra in self.extras:
            lack = f"lacks {', '.join(extra.missing)}: {extra.command}"
            table.add_row(extra.name, lack if extra.missing else "complete")
        return table

    def _devices(self) -> Table:
        table = _table("devices")
        for device in self.devices:
            verdict = "ok" if device.sound else "WRONG"
            agreement = device.failure if device.error is None else f"differs by {device.error:.1e}"
            table.add_row(device.name, device.description)
            table.add_row("", f"backend {device.backend}: {device.reason}")
            table.add_row("", f"self-check {verdict}: {agreement} from the reference")
        return table


def diagnose() -> Diagnosis:
    """Look at packages and devices, and run the self-check on each device (well under a second on a CPU)."""
    names = (DISTRIBUTION, "torch", "transformers", "triton")
    return Diagnosis(
        versions={"python": platform.python_version(), **{name: installed_version(name) for name in names}},
        extras=list(_extras()),
        devices=[_examine(name, description) for name, description in _devices()],
    )


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[Extra]:
    """From the distribution's own metadata; nothing when it runs from a folder without being installed."""
    if installed_version(DISTRIBUTION) is None:
        return
    requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    for name in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        wanted = [
            each.name
            for each in requirements
            if each.marker is not None and each.marker.evaluate({"extra": name})
        ]
        missing = [package for package in wanted if installed_version(package) is None]
        yield Extra(name, missing, f"pip install '{DISTRIBUTION}[{name}]'")


def _devices() -> Iterator[tuple[str, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{torch.get_num_threads()} of {os.cpu_count()} threads, {capability}"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = (amount / 2**30 for amount in torch.cuda.mem_get_info(index))
        yield (
            f"cuda:{index}",
            f"{card.name}, {free:.1f} of {total:.1f} GiB free, capability {card.major}.{card.minor}",
        )
    if torch.backends.mps.is_available():
        yield "mps", "Apple GPU"


def _examine(name: str, description: str) -> Device:
    backend, reason = choose_backend(name)
    try:
        return Device(name, description, backend, reason, error=_self_check(name, backend))
    except RuntimeError as error:  # torch's own, such as a driver too old or memory that is full
        return Device(name, description, backend, reason, error=None, failure=str(error).splitlines()[0])


def _self_check(device: str, backend: str) -> float:
    """Largest relative difference between `backend` and the reference, over both rules, on five segments."""
    return max(_difference(device, backend, rule) for rule in ("linear", "delta"))


def _difference(device: str, backend: str, update_rule: str) -> float:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(2, heads, 75, 32, generator=generator).to(device)

    query, key, value, gate = normal(4), normal(2), normal(2), torch.zeros(4, device=device)
    ours, reference = (
        infini_attention(query, key, value, gate, segment_length=16, update_rule=update_rule, backend=which)[
            0
        ]
        for which in (backend, "reference")
    )
    return float((ours - reference).abs().max() / reference.abs().max())


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
