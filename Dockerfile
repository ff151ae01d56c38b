# docker build --target=cuda --tag=nfnets_jax:cuda .       also: --target=cpu, --target=tpu
# docker run --gpus=all --volume="$PWD/runs:/runs" nfnets_jax:cuda \
#     python -m experiments.train --config=configs/digits.py --workdir=/runs/digits
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /nfnets_jax
# Before the code, so that a change of code does not install everything anew.
COPY requirements.txt .
RUN pip install -r requirements.txt
COPY . .
RUN pip install --no-deps --editable .
VOLUME /runs
# Kubernetes, SLURM and docker stop send SIGTERM, after which training saves a checkpoint.
STOPSIGNAL SIGTERM

FROM cpu AS cuda
RUN pip install 'jax[cuda12,k8s]>=0.10'

FROM cpu AS tpu
RUN pip install 'jax[tpu,k8s]>=0.10'
