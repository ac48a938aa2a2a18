# vit_dist in a container, for the CPU or, by EXTRA, an accelerator:
#
#   docker build -t vit-dist .                              docker run -v vit-runs:/runs vit-dist
#   docker build -t vit-dist:gpu --build-arg EXTRA=gpu .    docker run -v vit-runs:/runs --gpus all vit-dist:gpu ...
#   docker build -t vit-dist:tpu --build-arg EXTRA=tpu .    docker run -v vit-runs:/runs --privileged vit-dist:tpu ...
#
# What follows the image's name goes to vit-dist in place of the default, which trains the digits into the volume, on
# fake devices; on an accelerator give the verb yourself, such as: train --config=F --workdir=/runs/F
# Not yet built on a machine with Docker; its pip commands were run in an empty environment.
FROM python:3.12-slim

ARG EXTRA=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=agg

RUN useradd --create-home --uid 1000 vit
RUN install --directory --owner=vit /runs
WORKDIR /opt/vit_dist

# What changes seldom comes first: the libraries are installed beside an empty package, and kept as a layer.
COPY pyproject.toml constraints.txt ./
RUN mkdir vit_dist && touch vit_dist/__init__.py README.md
RUN pip install --constraint constraints.txt --editable ".[$EXTRA]"
COPY README.md ./
COPY launch launch
COPY configs configs
COPY vit_dist vit_dist

USER vit
VOLUME /runs
ENTRYPOINT ["vit-dist"]
CMD ["train", "--config=configs/digits.py", "--workdir=/runs/digits"]
