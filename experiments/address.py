"""Where the processes of a job meet, as a command line says it."""
# SPDX-License-Identifier: Apache-2.0

import dataclasses


@dataclasses.dataclass(frozen=True)
class Address:
  """How processes find each other; all None: from SLURM, JobSet or the TPU's metadata.

  Raises:
    ValueError: parts of an address, or a process that is not among them.
  """

  coordinator: str | None = None  # HOST:PORT of process 0
  processes: int | None = None
  process: int | None = None

  def __post_init__(self):
    given = [self.coordinator, self.processes, self.process]
    if None in given:
      if given != [None] * 3:
        raise ValueError(
          "--coordinator, --processes and --process go together; give all three, or "
          "none where the cluster tells them."
        )
      return
    host, _, port = str(self.coordinator).rpartition(":")
    if not host or not port.isdecimal():
      raise ValueError(
        f"--coordinator {self.coordinator} is not HOST:PORT; write it as in "
        "10.0.0.1:1234."
      )
    assert self.processes is not None and self.process is not None
    if not 0 <= self.process < self.processes:
      raise ValueError(
        f"--process {self.process} is none of --processes {self.processes}; give 0 to "
        f"{self.processes - 1}."
      )
