# docker build -t numprune .
# mkdir -p numprune-workspace
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/numprune-workspace:/workspace/numprune-workspace" numprune
#
# For a GPU: docker build --build-arg EXTRAS=gpu --build-arg PIP_FLAGS= …, and docker run --gpus all …

FROM python:3.11-slim-bookworm AS build
# pip reads the index of CPU builds of torch here, and so leaves CUDA out.
ARG EXTRAS=cpu
ARG PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make=4.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /numprune
COPY . .
RUN PIP_NO_CACHE_DIR=1 make env EXTRAS="$EXTRAS" PIP_FLAGS="$PIP_FLAGS"

FROM python:3.11-slim-bookworm
RUN install --directory --owner 1000 --group 1000 /workspace
COPY --from=build /numprune /numprune
# The user that --user names has no home of its own.
ENV HOME=/tmp
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["/numprune/.venv/bin/numprune"]
CMD ["optimize"]
