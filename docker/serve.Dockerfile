# Serves a bundle over the Open Inference Protocol on ONNX Runtime or the emulator: no torch, no training code.
# Build from the project's folder: docker build -f docker/serve.Dockerfile -t spikeguard-serve .

FROM docker.io/library/python:3.11-slim AS build
# The processors that kernels are compiled for ahead of time; 'generic' for others than x86 of the last ten years.
ARG KERNEL_CPU=x86-64-v3
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --without-pip /opt/spikeguard
ENV PATH=/opt/spikeguard/bin:$PATH
WORKDIR /src
COPY LICENSE README.md pyproject.toml constraints.txt ./
COPY hardware hardware
# Of the pipeline only the command line and what it prints with.
COPY pipeline/__init__.py pipeline/cli.py pipeline/bundle_tables.py pipeline/target_tables.py pipeline/interruption.py pipeline/
COPY pipeline/commands pipeline/commands
COPY pipeline/fidelity/__init__.py pipeline/fidelity/tables.py pipeline/fidelity/wording.py pipeline/fidelity/
RUN /usr/local/bin/python3 -m pip --python /opt/spikeguard/bin/python3 install --no-cache-dir --no-compile \
        --constraint constraints.txt ".[serve]" \
    && python3 -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0 \
    && /opt/sbom/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml \
        --output-file /opt/spikeguard/sbom.cdx.json /opt/spikeguard/bin/python3
# What is never imported here: tests, tools that make models, a second copy of ONNX Runtime for programs in C.
WORKDIR /opt/spikeguard/lib/python3.11/site-packages
RUN rm -rf numba/tests numpy/*/tests numpy/tests numpy/f2py numpy/distutils pygments/lexers/[!_]*.py \
        onnxruntime/transformers onnxruntime/tools onnxruntime/quantization onnxruntime/capi/libonnxruntime.so* \
    && strip --strip-unneeded llvmlite/binding/libllvmlite.so uvloop/*.so
# Kernels are compiled, and of the Python files those that are imported.
RUN NUMBA_CACHE_DIR=/opt/spikeguard/kernels NUMBA_CPU_NAME=$KERNEL_CPU python3 -m hardware.kernel_cache \
    && python3 -c "import onnxruntime, hardware.server.serving" \
    && spikeguard serve --help > /dev/null

FROM docker.io/library/python:3.11-slim
ARG KERNEL_CPU=x86-64-v3
LABEL org.opencontainers.image.title="spikeguard-serve" \
      org.opencontainers.image.description="Serves a verified bundle over the Open Inference Protocol, bit-exact" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/spikeguard /opt/spikeguard
# The root file system may be read-only. With a /tmp that can be written to, the emulator starts faster.
ENV PATH=/opt/spikeguard/bin:$PATH \
    HOME=/tmp \
    NUMBA_CACHE_DIR=/tmp/spikeguard-kernels \
    NUMBA_CPU_NAME=$KERNEL_CPU \
    OMP_NUM_THREADS=1 \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SPIKEGUARD_KERNELS=/opt/spikeguard/kernels
USER 10001:10001
WORKDIR /
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["spikeguard", "serve"]
CMD ["/bundle", "--runtime", "onnx", "--host", "0.0.0.0"]
