# Trains, exports and checks: every command but those that need Lava.
# Build from the project's folder: docker build -f docker/pipeline.Dockerfile -t spikeguard-pipeline .
# For NVIDIA GPUs: --build-arg BASE=IMAGE --build-arg TORCH=cuda, on a CUDA image with Python 3.11 or newer and venv.

ARG BASE=docker.io/library/python:3.11-slim
# hadolint ignore=DL3006
FROM ${BASE} AS build
ARG TORCH=cpu
WORKDIR /opt/spikeguard
COPY LICENSE README.md pyproject.toml constraints.txt ./
COPY hardware/environments.py hardware/environments.py
# The environment refers to these folders; what is in them may change without installing everything again.
RUN mkdir exporters pipeline && touch hardware/__init__.py exporters/__init__.py pipeline/__init__.py \
    && PIP_NO_CACHE_DIR=1 SPIKEGUARD_TORCH=${TORCH} python3 -I hardware/environments.py main --extras train \
    && python3 -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
        --output-file sbom.cdx.json .venv/bin/python \
    && .venv/bin/python -m pip uninstall --quiet --yes --root-user-action ignore pip
COPY hardware hardware
COPY exporters exporters
COPY pipeline pipeline

# hadolint ignore=DL3006
FROM ${BASE}
LABEL org.opencontainers.image.title="spikeguard-pipeline" \
      org.opencontainers.image.description="Trains robust spiking networks, exports them and checks what is deployed" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/spikeguard /opt/spikeguard
RUN install -d -o 10001 -g 10001 /runs
ENV PATH=/opt/spikeguard/.venv/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/spikeguard-kernels \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /runs
VOLUME /runs
ENTRYPOINT ["spikeguard"]
CMD ["--help"]
