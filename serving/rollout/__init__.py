"""Blue/green on one host: a new version takes over behind a router without a request lost, or it does not take over.

    roll_out("my-model", prepare, workspace, settings)   # green is started, compared, loaded, switched to; blue drained
    status("my-model", workspace)
    stop("my-model", workspace)

The router (vLLM's own) keeps the public port; the servers behind it have free local ones. Router and servers outlive
the command. What runs stands in a state file; everything that was started carries a tag in its environment, so that
what a killed rollout left behind is found. Nothing restarts a server that dies later: that is a supervisor's work.
"""

from numprune.serving.rollout.settings import Settings
from numprune.serving.rollout.state import RolloutBusy, RolloutFailed
from numprune.serving.rollout.status import serving, status, stop
from numprune.serving.rollout.swap import roll_out

__all__ = ["RolloutBusy", "RolloutFailed", "Settings", "roll_out", "serving", "status", "stop"]
