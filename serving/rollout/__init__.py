"""Blue/green on one host: a new version takes over behind a router without losing requests, or not at all.

    roll_out("my-model", prepare, workspace, settings)   # green is started, compared, loaded, switched to; blue drained
    status("my-model", workspace)
    stop("my-model", workspace)

The router (vLLM's own) keeps the public port; the servers behind it use free local ports. Router and servers outlive
the command. A state file records what runs; every process carries a tag in its environment, so that leftovers of a
killed rollout can be found. Nothing restarts a server that dies later; use a supervisor for that.
"""

from numprune.serving.rollout.settings import Settings
from numprune.serving.rollout.state import RolloutBusy, RolloutFailed
from numprune.serving.rollout.status import serving, status, stop
from numprune.serving.rollout.swap import roll_out

__all__ = ["RolloutBusy", "RolloutFailed", "Settings", "roll_out", "serving", "status", "stop"]
