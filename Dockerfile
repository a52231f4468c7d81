# The environment of a run (docs/docker.md), for GPUs:
#   docker build --tag megatron-tst .
# and for the CPU, with the small build of torch:
#   docker build --tag megatron-tst:cpu --build-arg BASE_IMAGE=python:3.12-slim \
#     --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .

# Megatron-LM builds its own tests of megatron-core 0.19 on this base (docker/.ngc_version.dev at tag core_v0.19.0). It has
# Python 3.12 and, compiled for each other, torch 2.13, Transformer Engine 2.16 and NVIDIA's apex. The base and
# MEGATRON_CORE are chosen together; the last step fails for a Transformer Engine that belongs to another megatron-core.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

RUN useradd --uid 10001 --create-home tst && install --directory --owner tst /opt/megatron-tst
WORKDIR /opt/megatron-tst

# Dependencies: a layer that changes with their pins, not with the source.
COPY pyproject.toml constraints.txt LICENSE ./
COPY tools/setup_image.sh tools/
COPY megatron_tst/__init__.py megatron_tst/
ARG PIP_EXTRA_INDEX_URL
ARG MEGATRON_CORE=0.19.2
RUN bash tools/setup_image.sh plot,hf,wandb,tensorboard,dev
# The base's torchrun would start its workers with the base's interpreter, which does not see .venv.
ENV PATH=/opt/megatron-tst/.venv/bin:${PATH} PYTHON_EXEC=/opt/megatron-tst/.venv/bin/python

COPY --chown=tst . .
USER 10001
ARG IMAGE_VERSION
ENV TST_IMAGE_VERSION=${IMAGE_VERSION}
RUN python -m pip list --format=freeze >versions.txt && cat versions.txt && python tools/check_environment.py
