# Runs a bundle on Intel's Lava and on lava-dl's netx, and certifies it on both; serves it on Lava, if need be.
# Build from the project's folder: docker build -f docker/lava.Dockerfile -t spikeguard-lava .

FROM docker.io/library/python:3.10-slim AS python310

FROM docker.io/library/python:3.11-slim AS build
# Lava runs on Python 3.10 only; its interpreter comes from the stage above.
COPY --from=python310 /usr/local /opt/python3.10
RUN echo /opt/python3.10/lib > /etc/ld.so.conf.d/python3.10.conf && ldconfig
WORKDIR /opt/spikeguard
COPY constraints.txt pyproject.toml ./
COPY hardware/environments.py hardware/environments.py
RUN PIP_NO_CACHE_DIR=1 SPIKEGUARD_PYTHON310=/opt/python3.10/bin/python3.10 python3 -I hardware/environments.py lava \
    && python3 -m venv --without-pip .venv
WORKDIR /src
COPY LICENSE README.md pyproject.toml constraints.txt ./
COPY hardware hardware
COPY pipeline/__init__.py pipeline/cli.py pipeline/bundle_tables.py pipeline/target_tables.py pipeline/interruption.py pipeline/
COPY pipeline/commands pipeline/commands
COPY pipeline/fidelity/__init__.py pipeline/fidelity/tables.py pipeline/fidelity/wording.py pipeline/fidelity/
RUN python3 -m pip --python /opt/spikeguard/.venv/bin/python3 install --no-cache-dir \
        --constraint constraints.txt ".[serve,verify]" \
    && python3 -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && for name in .venv .venv-lava; do /opt/sbom/bin/cyclonedx-py environment --output-reproducible \
        --output-file "/opt/spikeguard/sbom$name.cdx.json" "/opt/spikeguard/$name/bin/python"; done \
    && rm -r /opt/spikeguard/hardware /opt/spikeguard/constraints.txt /opt/spikeguard/pyproject.toml \
    && /opt/spikeguard/.venv-lava/bin/python -m pip uninstall --quiet --yes --root-user-action ignore pip

FROM docker.io/library/python:3.11-slim
LABEL org.opencontainers.image.title="spikeguard-lava" \
      org.opencontainers.image.description="Runs a bundle on Lava and netx and certifies every spike and membrane" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/python3.10 /opt/python3.10
COPY --from=build /etc/ld.so.conf.d/python3.10.conf /etc/ld.so.conf.d/python3.10.conf
RUN ldconfig
COPY --from=build /opt/spikeguard /opt/spikeguard
# Lava exchanges files in /tmp and spikes through shared memory (--shm-size).
ENV PATH=/opt/spikeguard/.venv/bin:$PATH \
    HOME=/tmp \
    NUMBA_CACHE_DIR=/tmp/spikeguard-kernels \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SPIKEGUARD_LAVA_PYTHON=/opt/spikeguard/.venv-lava/bin/python
USER 10001:10001
WORKDIR /
ENTRYPOINT ["spikeguard"]
CMD ["verify", "/bundle", "--runtime", "lava", "--runtime", "netx"]
