# The demo in a box: both environments in place, nothing is downloaded when it runs.
# Build from the project's folder: docker build -f docker/demo.Dockerfile -t spikeguard-demo .

FROM docker.io/library/python:3.10-slim AS python310

FROM docker.io/library/python:3.11-slim AS build
# The Lava simulator runs on Python 3.10 only; its interpreter comes from the stage above.
COPY --from=python310 /usr/local /opt/python3.10
RUN echo /opt/python3.10/lib > /etc/ld.so.conf.d/python3.10.conf && ldconfig
WORKDIR /opt/spikeguard
COPY LICENSE README.md pyproject.toml constraints.txt ./
COPY hardware hardware
COPY exporters exporters
COPY pipeline pipeline
RUN PIP_NO_CACHE_DIR=1 SPIKEGUARD_TORCH=cpu SPIKEGUARD_PYTHON310=/opt/python3.10/bin/python3.10 \
    python3 -I hardware/environments.py main lava --extras train

FROM docker.io/library/python:3.11-slim
LABEL org.opencontainers.image.title="spikeguard-demo" \
      org.opencontainers.image.description="Trains, quantises, exports and checks a robust spiking network on the bundled digits" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/python3.10 /opt/python3.10
COPY --from=build /etc/ld.so.conf.d/python3.10.conf /etc/ld.so.conf.d/python3.10.conf
RUN ldconfig && useradd --uid 10001 --no-create-home --home-dir /tmp spikeguard && install -d -o 10001 -g 10001 /runs
COPY --from=build /opt/spikeguard /opt/spikeguard
# The root file system may be read-only: everything temporary goes to /tmp, results to /runs.
ENV PATH=/opt/spikeguard/.venv/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /
VOLUME /runs
ENTRYPOINT ["spikeguard"]
CMD ["demo"]
