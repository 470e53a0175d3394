"""The checks of one machine, in the order in which they are shown."""

from __future__ import annotations

from distrain.doctor.checks import COMPUTE_LIMIT_S, Check
from distrain.doctor.machine import devices, folders, gpus, network, packages, processes, recipes

CHECKS: tuple[Check, ...] = (
    Check("versions", packages.versions),
    Check("copies", packages.copies),
    Check("installation", packages.installation),
    Check("libraries", network.preloaded),
    Check("driver", gpus.driver),
    Check("visible GPUs", gpus.visible),
    Check("GPUs", gpus.state),
    Check("PyTorch", devices.build, COMPUTE_LIMIT_S, then_import="torch"),
    Check("matrix product", devices.products, COMPUTE_LIMIT_S),
    Check("CPUs", processes.processors),
    Check("threads", processes.threads),
    Check("memory", processes.memory),
    Check("shared memory", processes.shared_memory),
    Check("open files", processes.open_files),
    Check("processes", processes.process_count),
    Check("locked memory", processes.locked_memory),
    Check("file size", processes.file_size),
    Check("loopback", network.loopback),
    Check("host name", network.host_name),
    Check("interfaces", network.interfaces),
    Check("launchers", network.leftovers),
    Check("run folder", folders.run_folder),
    Check("clock", folders.clock),
    Check("temporary folder", folders.temporary_folder),
    Check("caches", folders.caches),
    Check("recipe", recipes.recipe, COMPUTE_LIMIT_S, then_import="distrain.training.checks"),
    Check("weights", recipes.weights),
    Check("data", recipes.data, COMPUTE_LIMIT_S),
    Check("trackers", recipes.trackers),
    Check("space", folders.space, COMPUTE_LIMIT_S),
)
