# The image for GPUs (docs/docker.md):
#   docker build --tag megatron-tst .
# The image for the CPU, with the small build of torch:
#   docker build --tag megatron-tst:cpu --build-arg BASE_IMAGE=python:3.12-slim \
#     --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .

# Megatron-LM tests megatron-core 0.19 on this base (docker/.ngc_version.dev at tag core_v0.19.0). It has Python 3.12 and
# torch 2.13, Transformer Engine 2.16 and NVIDIA's apex, which are compiled for each other. The base and MEGATRON_CORE must
# match: the last step fails if Transformer Engine belongs to another megatron-core.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

RUN useradd --uid 10001 --create-home tst && install --directory --owner tst /opt/megatron-tst
WORKDIR /opt/megatron-tst

# The dependencies are a layer that depends on their pins, not on the source.
COPY pyproject.toml constraints.txt LICENSE ./
COPY tools/setup_image.sh tools/
COPY megatron_tst/__init__.py megatron_tst/
ARG PIP_EXTRA_INDEX_URL
ARG MEGATRON_CORE=0.19.2
RUN bash tools/setup_image.sh plot,hf,wandb,tensorboard,dev
# Without PYTHON_EXEC, the base's torchrun would start its workers with the base's interpreter, which does not use .venv.
ENV PATH=/opt/megatron-tst/.venv/bin:${PATH} PYTHON_EXEC=/opt/megatron-tst/.venv/bin/python

COPY --chown=tst . .
USER 10001
ARG IMAGE_VERSION
ENV TST_IMAGE_VERSION=${IMAGE_VERSION}
RUN python -m pip list --format=freeze >versions.txt && cat versions.txt && python tools/check_environment.py
