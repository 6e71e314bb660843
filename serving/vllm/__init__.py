"""vLLM servers, each a process in vLLM's own environment: found, started, watched and stopped.

`environment` finds the interpreter that has vLLM; `server` starts a server for a checkpoint; `process` is the common
part of servers and router. Nothing here imports vLLM or a tensor library.
"""
