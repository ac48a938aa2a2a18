# vit_dist in a container, for the CPU (the last target, and so the default), NVIDIA GPUs or TPUs:
#
#   docker build -t vit-dist .                      docker run -v vit-runs:/runs vit-dist
#   docker build -t vit-dist:gpu --target gpu .     docker run -v vit-runs:/runs --gpus all --shm-size=16g vit-dist:gpu \
#                                               launch -- train --config=configs/vit_b16_i1k_8gpu.py --workdir=/runs/b16
#   docker build -t vit-dist:tpu --target tpu .     docker run -v vit-runs:/runs --privileged --net=host vit-dist:tpu ...
#
# What follows the image's name goes to vit-dist in place of the default, which trains the digits into the volume, on
# fake devices. Not yet built by Docker: tests/launch/test_dockerfile.py does what the target `cpu` says, step by step,
# in an empty environment.
FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=agg
RUN useradd --create-home --uid 1000 vit && install --directory --owner=vit /runs
WORKDIR /opt/vit_dist
# What changes seldom comes first: the libraries are installed beside an empty package, and kept as a layer.
COPY pyproject.toml setup.py constraints.txt ./
RUN mkdir vit_dist && touch vit_dist/__init__.py README.md
VOLUME /runs
ENTRYPOINT ["vit-dist"]
CMD ["train", "--config=configs/digits.py", "--workdir=/runs/digits"]

# What changes often, for every target to lay over its libraries.
FROM scratch AS code
COPY README.md /
COPY launch /launch
COPY configs /configs
COPY vit_dist /vit_dist

FROM base AS gpu
# Asks NVIDIA's container tools, Enroot's among them, for the GPUs and their driver's libraries (580 or newer, for CUDA
# 13). XLA takes this share of a GPU's memory at the start; its own default is 0.75.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility XLA_CLIENT_MEM_FRACTION=0.92
# libibverbs and its drivers: without them NCCL takes TCP between nodes, and does not say so.
RUN apt-get update && apt-get install --yes --no-install-recommends rdma-core ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --constraint constraints.txt --editable ".[gpu]"
COPY --from=code / ./
USER vit

FROM base AS tpu
RUN pip install --constraint constraints.txt --editable ".[tpu]"
COPY --from=code / ./
USER vit

FROM base AS cpu
RUN pip install --constraint constraints.txt --editable ".[cpu]"
COPY --from=code / ./
USER vit
