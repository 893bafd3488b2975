# One file, four images:
#
#   docker build --target cpu           gateway and engines on CPUs
#   docker build --target cuda          gateway and engines on NVIDIA GPUs
#   docker build --target quantize-cpu  the former, and what builds checkpoints
#   docker build --target quantize-cuda likewise
#
# `cpu` needs PyTorch's CPU builds: give their wheel index as --build-arg PIP_EXTRA_INDEX_URL=…
#
# The base is pinned by its version. For a build that is the same to the byte, pin its digest as well:
# --build-arg BASE=python:3.11.14-slim-bookworm@sha256:…
# The CUDA libraries come with PyTorch's wheels and the driver from the host: no image of NVIDIA's is needed.
#
# What is run is in deploy/image/*.sh, where tests run it too.
ARG BASE=python:3.11.14-slim-bookworm


FROM ${BASE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Assay" \
      org.opencontainers.image.description="A self-hosted inference server for Llama 3.1 that sells three grades of one model and tests each." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY deploy/image/packages.sh deploy/image/user.sh /opt/assay/deploy/image/
RUN /opt/assay/deploy/image/packages.sh cpu \
 && /opt/assay/deploy/image/user.sh / 10001 /var/lib/assay
# HOME is where vLLM, Triton, Numba and the hub's client keep what they compile and fetch: with the rest of the home it
# is the one thing that must be writable.
ENV PATH=/opt/assay/.venv/bin:${PATH} \
    HOME=/var/lib/assay \
    ASSAY_HOME=/var/lib/assay \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/assay
USER 10001:10001
VOLUME /var/lib/assay
# The gateway; an engine by itself.
EXPOSE 8000 8100
# Of the gateway; whoever runs an engine by itself names its own (deploy/compose/compose.yaml).
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-I", "/opt/assay/deploy/image/healthcheck.py", "http://127.0.0.1:8000/healthz"]
# tini is the first process: it collects orphans, whose parent it becomes, and hands signals on. Python as the first
# process would not be ended by SIGTERM before `serve` listens for it, nor would any other command.
ENTRYPOINT ["tini", "--", "assay"]
# On all of the container's addresses, without which nobody could reach it; keys are asked for then.
CMD ["serve", "--host", "0.0.0.0"]


# What the environments are made from: all that pip reads, and no module of ours but the installer's.
FROM ${BASE} AS installer
ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/assay
COPY pyproject.toml LICENSE ./
COPY deploy/install.py deploy/
COPY deploy/image/packages.sh deploy/image/environment.sh deploy/image/
COPY server/__init__.py server/progress.py server/logs.py server/
COPY tiers/__init__.py tiers/
COPY kernels/__init__.py kernels/
# Importing vLLM is how an environment is tried.
RUN deploy/image/packages.sh cpu

FROM installer AS gateway-cpu
RUN --mount=type=cache,target=/root/.cache/pip deploy/image/environment.sh cpu gateway

FROM installer AS gateway-cuda
RUN --mount=type=cache,target=/root/.cache/pip deploy/image/environment.sh cuda gateway

FROM installer AS llmcompressor-cpu
RUN --mount=type=cache,target=/root/.cache/pip deploy/image/environment.sh cpu quantize

FROM installer AS llmcompressor-cuda
RUN --mount=type=cache,target=/root/.cache/pip deploy/image/environment.sh cuda quantize


FROM runtime AS cpu
COPY --from=gateway-cpu /opt/assay/.venv .venv
COPY pyproject.toml LICENSE ./
COPY deploy deploy
COPY kernels kernels
COPY tiers tiers
COPY server server
USER 0
RUN deploy/image/application.sh
USER 10001:10001

FROM runtime AS cuda
# Of the driver, what computes and what nvidia-smi asks; and one that PyTorch's libraries run on, or no container starts.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=13.0"
USER 0
# The one image with a compiler: packages.sh says why.
RUN deploy/image/packages.sh cuda
COPY --from=gateway-cuda /opt/assay/.venv .venv
COPY pyproject.toml LICENSE ./
COPY deploy deploy
COPY kernels kernels
COPY tiers tiers
COPY server server
RUN deploy/image/application.sh
USER 10001:10001


FROM cpu AS quantize-cpu
COPY --from=llmcompressor-cpu /opt/assay/.venv-quantize .venv-quantize
HEALTHCHECK NONE
CMD ["build"]

FROM cuda AS quantize-cuda
COPY --from=llmcompressor-cuda /opt/assay/.venv-quantize .venv-quantize
HEALTHCHECK NONE
CMD ["build"]
